"""Reads the head of an entity and commits a change on it, for the tools of operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import msgspec
from msgspec import Struct

from shared.entities.contract import Head, now
from shared.entities.entity import Entity
from shared.errors import Conflict, OutcomeUnknown, Unavailable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Connection
from shared.rail.commit import ClaimLost, OutOfStock, Rail
from shared.rail.draft import Draft


async def head_in_mirror(mirror: Mirror, entity: Entity, restaurant: str, id_: str) -> tuple[Head, Any] | None:
    """Returns (head, state) in the mirror, or None if the mirror has no such entity. Raises Unavailable unless the
    mirror is warm, because the head is unknown otherwise."""
    try:
        warm, (document,) = await mirror.read(restaurant, entity.name, [id_])
    except (MirrorUnavailable, MirrorInDoubt) as error:
        raise Unavailable("the mirror is not warm; retry", retry_after=2.0) from error
    if not warm:
        raise Unavailable("the mirror is not warm; retry", retry_after=2.0)
    return None if document is None else (document.head, entity.decode_state(document.state))


async def head_in_postgres(
    connection: Connection, entity: Entity, restaurant: str, id_: str
) -> tuple[Head, Any] | None:
    """Returns (head, state) in PostgreSQL, or None if it has no such entity. The role of the connection must see this
    restaurant."""
    found = await states.find_state(connection, entity, restaurant, id_)
    return None if found is None else (found.head, entity.decode_state(found.state))


async def current_head(
    connection: Connection, mirror: Mirror, entity: Entity, restaurant: str, id_: str
) -> tuple[Head, Any] | None:
    """Returns (head, state) that a new change must be built on, or None if the entity does not exist. Raises
    Unavailable unless the mirror is warm and at least as new as PostgreSQL, because a change on an outdated head would
    cause a fork."""
    in_mirror = await head_in_mirror(mirror, entity, restaurant, id_)
    in_postgres = await head_in_postgres(connection, entity, restaurant, id_)
    if in_mirror is None:
        return in_postgres
    if in_postgres is not None and in_mirror[0] < in_postgres[0]:
        raise Unavailable("the mirror is behind PostgreSQL; retry", retry_after=1.0)
    return in_mirror


async def commit(
    rail: Rail, entity: Entity, event: str, state: Any, base: tuple[Head, Any] | None, *, actor: str
) -> str:
    """Commits a change at head version + 1 and returns its id. `base`: the current head and state, or None if the
    entity does not exist. `event` is replaced by `created` if `base` is None; otherwise `created` is replaced by
    `updated`. Raises Conflict, InvalidInput, Unavailable, OutcomeUnknown."""
    at = now()
    if base is None:
        event = "created"
    elif event == "created":
        event = "updated"
    draft = Draft(
        entity=entity,
        event=event,
        state=msgspec.structs.replace(state, updated_at=at),
        base=base[0] if base else None,
        before=base[1] if base else None,
        at=at,
        source="sync",
        actor=actor,
    )
    try:
        return (await rail.commit(draft)).head.change_id
    except ClaimLost as error:
        raise Conflict("another change came first; retry", code="version_conflict") from error
    except OutOfStock as error:
        raise Conflict("the stock that the order needs is sold out", code="out_of_stock", items=error.left) from error


class Recorded(Struct):
    """The change that was recorded for a dead letter or a conflict before its row is updated."""

    change_id: str | None = None


@contextmanager
def record_first(what: str) -> Iterator[Recorded]:
    """Wraps a transaction that locks a row, records a change and then updates the row. `what`: the name of the row in
    error messages, such as "the dead letter".

    If the database fails, raises Unavailable before the change is recorded, and OutcomeUnknown after it."""
    recorded = Recorded()
    try:
        yield recorded
    except (asyncpg.PostgresError, *UNAVAILABLE) as error:
        if recorded.change_id is not None:
            raise OutcomeUnknown(
                f"change {recorded.change_id} is recorded, but {what} is not updated yet; repeat the request",
                change_id=recorded.change_id,
            ) from error
        if isinstance(error, UNAVAILABLE):
            raise Unavailable(
                f"{what} cannot be read or updated: the database is unavailable; retry", retry_after=2.0
            ) from error
        raise
