"""Commits a change for the tools of operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import msgspec
from msgspec import Struct

from shared.entities.contract import now
from shared.entities.entity import Entity
from shared.errors import Conflict, OutcomeUnknown, Unavailable
from shared.postgres.pool import UNAVAILABLE
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Standing
from shared.rail.outcomes import ClaimLost, NoClaim, OutOfStock


async def commit(
    rail: Rail,
    entity: Entity,
    event: str,
    state: Any,
    base: Standing | None,
    *,
    actor: str,
    made_from: bytes | None = None,
) -> str:
    """Commits a change at head version + 1 and returns its id. `base`: the current state of the entity, or None if it
    does not exist. `made_from`: see Draft. `event` is replaced by `created` if `base` is None; otherwise `created` is
    replaced by `updated`. Raises Conflict, InvalidInput, Unavailable, OutcomeUnknown."""
    at = now()
    if base is None:
        event = "created"
    elif event == "created":
        event = "updated"
    draft = Draft(
        entity=entity,
        event=event,
        state=msgspec.structs.replace(state, updated_at=at),
        base=base,
        made_from=made_from,
        at=at,
        source="sync",
        actor=actor,
    )
    try:
        return (await rail.commit(draft)).head.change_id
    except ClaimLost as error:
        raise Conflict("another change came first; retry", code="version_conflict") from error
    except NoClaim as error:
        raise error.refusal() from error
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
