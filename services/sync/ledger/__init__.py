"""The ledger: compares the change log with PostgreSQL, repairs what one of them lacks, and reports the place of every
accepted change.

Guarantee: each accepted change counts exactly once. A change counts as unexplained only after the ledger has searched
every place where it could be. Under load, the ledger reports unexplained changes late rather than falsely.

    ledger_loop.py   leads in one worker
    session.py       one comparison of log and PostgreSQL, with repairs (the leader) or without (a report)
    sides.py         what one side alone has; pure
    begin.py         the checkpoint at which a session begins
    log_changes.py   the changes in a message of the log; pure
    repairs.py       sends or publishes a change again
    report.py        where every change is, for the API and `ticketrail ledger`
    report_shapes.py the figures of a report
    journals.py      the changes in the journals on this host
    store.py         the SQL that finds changes
    queues.py        depths, rates and ages of the queues
    routes.py, requests.py, commands.py    the HTTP API and `ticketrail ledger`

Others may use: `ledger_loop` (the worker, maintenance), `routes` (api.py), `commands` (the command line). The rest is
internal.
"""
