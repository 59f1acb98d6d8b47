"""What stands of an entity, and a new change on it by hand: for those who work outside the orders service."""

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
    """What a warm mirror has; None: it has none such. Raises Unavailable without a warm mirror: then nobody can say
    what stands."""
    try:
        warm, (document,) = await mirror.read(restaurant, entity.name, [id_])
    except (MirrorUnavailable, MirrorInDoubt) as error:
        raise Unavailable("changes wait until the mirror is warm", retry_after=2.0) from error
    if not warm:
        raise Unavailable("changes wait until the mirror is warm", retry_after=2.0)
    return None if document is None else (document.head, entity.decode_state(document.state))


async def head_in_postgres(
    connection: Connection, entity: Entity, restaurant: str, id_: str
) -> tuple[Head, Any] | None:
    """What PostgreSQL has; `connection` as a role that sees this restaurant."""
    found = await states.one(connection, entity, restaurant, id_)
    return None if found is None else (found.head, entity.decode_state(found.state))


async def current_head(
    connection: Connection, mirror: Mirror, entity: Entity, restaurant: str, id_: str
) -> tuple[Head, Any] | None:
    """What a new change is to be built on. Raises Unavailable without a warm mirror, and while the mirror is behind
    PostgreSQL: a change on what it shows would be one side of a fork."""
    shown = await head_in_mirror(mirror, entity, restaurant, id_)
    kept = await head_in_postgres(connection, entity, restaurant, id_)
    if shown is None:
        return kept
    if kept is not None and shown[0] < kept[0]:
        raise Unavailable("changes wait until the mirror has caught up", retry_after=1.0)
    return shown


async def commit(
    rail: Rail, entity: Entity, event: str, state: Any, base: tuple[Head, Any] | None, *, actor: str
) -> str:
    """The id of the change at head + 1; a `created` of what is there already is an update, and anything of what is not
    there a creation. Raises Conflict, InvalidInput, Unavailable, OutcomeUnknown."""
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
        raise Conflict("another change came first: try again", code="version_conflict") from error
    except OutOfStock as error:
        raise Conflict("what it needs has been sold since", code="out_of_stock", items=error.left) from error


class Recorded(Struct):
    """The change that was made for a letter or a conflict, before that says so itself."""

    change_id: str | None = None


@contextmanager
def record_first(what: str) -> Iterator[Recorded]:
    """Around the transaction that takes `what` (such as "the letter"), makes a change and notes it there: 503 only
    while nothing was recorded. Raises Unavailable, OutcomeUnknown."""
    recorded = Recorded()
    try:
        yield recorded
    except (asyncpg.PostgresError, *UNAVAILABLE) as error:
        if recorded.change_id is not None:
            raise OutcomeUnknown(
                f"change {recorded.change_id} is recorded, {what} does not say so yet: do it again",
                change_id=recorded.change_id,
            ) from error
        if isinstance(error, UNAVAILABLE):
            raise Unavailable(f"{what} waits for the database", retry_after=2.0) from error
        raise
