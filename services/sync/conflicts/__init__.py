"""Conflicts: forks that an operator must decide.

Guarantee: both sides of a fork are kept, and payments of both sides count. A decision may need a change. It is recorded
first, and then the decision is committed together with its row in `audit`.

    store.py            reads conflicts and closes them
    decisions.py        shows both sides and decides which change holds
    forked_payments.py  restores payments that the losing side of a fork has and the order lacks
    routes.py, requests.py, commands.py    the HTTP API and `ticketrail conflicts`

Others may use: `forked_payments` (maintenance), `routes` (api.py), `commands` (the command line). The rest is internal.
Conflicts are opened where changes are written, in `services/sync/writer/upsert.py`.
"""
