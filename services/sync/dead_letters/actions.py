"""Discards, restores and replaces dead letters, each action with its row in `audit`.

Each function runs in the caller's transaction, so that an action and its audit row are committed together. The
connection has the ops role. Each action names the revision that the operator saw; an outdated revision raises Conflict
`dead_letter_changed`.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from services.sync import audit
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.store import DeadLetter, FullDeadLetter
from shared.errors import Conflict, NotFound
from shared.postgres.pool import Connection

_LOCK = "select status, revision from dead_letters where id = $1 for update"
_DISCARD = """
update dead_letters set status = 'discarded', why = $2, replaced_by = $3, closed_at = now(), revision = revision + 1
where id = $1
"""
_RESTORE = """
update dead_letters set status = 'open', why = null, closed_at = null, revision = revision + 1 where id = $1
"""
_REPLACE = """
update dead_letters set status = 'resolved', replaced_by = $2, closed_at = now(), revision = revision + 1 where id = $1
"""
_STORE_EDIT = """
insert into dead_letter_edits (dead_letter_id, actor, why, event, difference, change_id)
values ($1, $2, $3, $4::json, $5::json, $6)
"""


async def take(connection: Connection, id_: str, *, revision: int, status: str = "open") -> FullDeadLetter:
    """Locks the dead letter until the transaction ends, and returns it. It must have this revision and status.

    Raises NotFound, and Conflict: `dead_letter_changed`, `dead_letter_not_open` or `dead_letter_not_discarded`."""
    found = await connection.fetchrow(_LOCK, id_)
    if found is None:
        raise NotFound("no such dead letter")
    if found["revision"] != revision:
        raise Conflict(
            "this dead letter has changed since you read it; read it again",
            code="dead_letter_changed",
            revision=found["revision"],
            status=found["status"],
        )
    if found["status"] != status:
        raise Conflict(
            f"this dead letter is {found['status']}", code=f"dead_letter_not_{status}", status=found["status"]
        )
    dead_letter = await dead_letter_store.one(connection, id_)
    assert dead_letter is not None
    return dead_letter


async def discard(
    connection: Connection, id_: str, *, revision: int, why: str, actor: str, role: str, replaced_by: str | None = None
) -> DeadLetter:
    """Changes the status from open to discarded. `replaced_by`: the change that reverts the dead letter's change in the
    mirror. Raises what `take` raises."""
    dead_letter = await take(connection, id_, revision=revision)
    await connection.execute(_DISCARD, id_, why, replaced_by)
    details = {"replaced_by": replaced_by} if replaced_by else {}
    return await _done(connection, dead_letter, "discard", why, actor, role, details)


async def restore(
    connection: Connection, id_: str, *, revision: int, why: str | None, actor: str, role: str
) -> DeadLetter:
    """Changes the status from discarded to open. Raises what `take` raises."""
    dead_letter = await take(connection, id_, revision=revision, status="discarded")
    await connection.execute(_RESTORE, id_)
    return await _done(connection, dead_letter, "restore", why, actor, role, {})


async def replace(
    connection: Connection,
    id_: str,
    *,
    revision: int,
    event: dict[str, Any],
    difference: Sequence[dict[str, Any]],
    change_id: str,
    why: str | None,
    actor: str,
    role: str,
) -> DeadLetter:
    """Changes the status from open to resolved, and stores the edit. Raises what `take` raises."""
    dead_letter = await take(connection, id_, revision=revision)
    await connection.execute(_REPLACE, id_, change_id)
    await connection.execute(_STORE_EDIT, id_, actor, why, _json(event), _json(difference), change_id)
    return await _done(connection, dead_letter, "edit", why, actor, role, {"change_id": change_id})


async def _done(
    connection: Connection,
    before: DeadLetter,
    action: str,
    why: str | None,
    actor: str,
    role: str,
    details: dict[str, Any],
) -> DeadLetter:
    await audit.record(
        connection,
        actor=actor,
        role=role,
        action=f"dead_letter.{action}",
        target=f"dead_letter/{before.id}",
        restaurant_id=before.restaurant_id,
        why=why,
        details={"status": before.status, "revision": before.revision, **details},
    )
    [dead_letter] = await dead_letter_store.page(
        connection, dead_letter_store.DeadLetterQuery(ids=(before.id,)), limit=1
    )
    return dead_letter


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
