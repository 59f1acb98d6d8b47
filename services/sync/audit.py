"""The audit: one row for each action of an operator, with the reason. Rows are added and never changed.

Write the row in the transaction of the action, so that both are committed or neither is. The connection has the ops
role.
"""

from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from shared.postgres.pool import Connection

_RECORD = """
insert into audit (actor, role, restaurant_id, action, target, why, details)
values ($1, $2, $3, $4, $5, $6, $7::json)
"""
_ACTIONS = """
select at, actor, role, restaurant_id::text, action, target, why, details::text
from audit where target = $1 order by at desc, id desc limit $2
"""


class OperatorAction(Struct, frozen=True, kw_only=True):
    at: datetime
    actor: str
    role: str
    restaurant_id: str | None
    action: str
    """The action, for example `dead_letter.discard`."""
    target: str
    """The thing that the action changed, for example `dead_letter/<id>`."""
    why: str | None
    details: dict[str, Any]


async def record(
    connection: Connection,
    *,
    actor: str,
    role: str,
    action: str,
    target: str,
    restaurant_id: str | None = None,
    why: str | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    """Adds one row to `audit`."""
    encoded = msgspec.json.encode(details or {}).decode()
    await connection.execute(_RECORD, actor, role, restaurant_id, action, target, why, encoded)


async def actions_on(connection: Connection, target: str, *, limit: int = 100) -> list[OperatorAction]:
    """Returns the actions on a target, newest first."""
    return [
        OperatorAction(**{**row, "details": msgspec.json.decode(row["details"])})
        for row in await connection.fetch(_ACTIONS, target, limit)
    ]
