"""The ledger: where every accepted change is, and which changes are nowhere.

Guarantee: each accepted change counts exactly once, and a change counts as unexplained only after every place where it
could be was searched. Under load the ledger reports an unexplained change late rather than wrongly.

    ledger.py         takes a balance, once or again and again
    balance.py        the figures, and how a missing change is classified; pure
    accepted_log.py   reads the changes that the change log holds
    sources.py        asks PostgreSQL, the broker, the journals and the mirror
    store.py          SQL that says where changes are
    queues.py         depths, rates and ages of the queues
    routes.py, requests.py, commands.py    the HTTP API and `ticketrail ledger`

Others may use: `store` (maintenance), `routes` (api.py), `commands` (the command line). The rest is internal.
"""
