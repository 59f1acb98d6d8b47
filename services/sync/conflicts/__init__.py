"""Conflicts: forks that an operator must decide.

Guarantee: both sides of a fork are kept, and payments of both sides count. If a decision needs a new change, that
change is recorded first. Then the decision is committed together with its row in `audit`.

    store.py            reads conflicts and closes them
    decisions.py        shows both sides, and enforces the change that an operator keeps
    forked_payments.py  restores payments that the losing side of a fork has and the order lacks
    routes.py, requests.py, commands.py    the HTTP API and `ticketrail conflicts`

Others may use: `forked_payments` (maintenance), `routes` (api.py), `commands` (the command line). The rest is internal.
The PostgreSQL writer opens conflicts (`writer/upsert.py`).
"""
