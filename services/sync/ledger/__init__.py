"""The ledger: finds the place of every accepted change, and reports changes that are in no place.

Guarantee: each accepted change counts exactly once. A change counts as unexplained only after the ledger has searched
every place where it could be. Under load, the ledger reports unexplained changes late rather than falsely.

    ledger.py         takes balances
    balance.py        the figures of a balance, and the classification of missing changes; pure
    accepted_log.py   reads the accepted changes from the change log
    sources.py        asks PostgreSQL, the broker, the journals and the mirror
    store.py          the SQL that finds changes
    queues.py         depths, rates and ages of the queues
    routes.py, requests.py, commands.py    the HTTP API and `ticketrail ledger`

Others may use: `store` (maintenance), `routes` (api.py), `commands` (the command line). The rest is internal.
"""
