"""Assembles everything that is known about a dead letter, for the API and for `ticketrail dlq show`."""

from typing import Any

from msgspec import Struct

from services.sync import audit
from services.sync.audit import OperatorAction
from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.editing import event_in
from services.sync.dead_letters.replay_jobs import ReplayItem, ReplayJob
from services.sync.dead_letters.store import DeadLetter, DeadLetterEdit
from services.sync.failures.dead_letter_store import Attempt
from shared.errors import NotFound
from shared.postgres.pool import Connection

_MAX_BODY_BYTES = 65_536


class ReplayOf(Struct, frozen=True):
    """A replay job that the dead letter is part of."""

    job: ReplayJob
    item: ReplayItem


class DeadLetterView(Struct, frozen=True, kw_only=True):
    dead_letter: DeadLetter
    attempts: tuple[Attempt, ...]
    headers: dict[str, Any]
    event: Any
    """The event; None if the body is not one event or is too long."""
    body: str | None
    """The body as text; None if `event` is set. The route …/body returns the exact bytes."""
    body_cut: bool
    edits: list[DeadLetterEdit]
    replays: list[ReplayOf]
    actions: list[OperatorAction]


async def dead_letter_view(connection: Connection, id_: str, *, operator: bool) -> DeadLetterView:
    """Returns everything that is known about a dead letter. `operator`: whether to include edits, replays and actions,
    which only operators may see. Raises NotFound."""
    dead_letter = await dead_letter_store.one(connection, id_)
    if dead_letter is None:
        raise NotFound("no such dead letter")
    event, body, cut = shown_body(dead_letter.body)
    return DeadLetterView(
        dead_letter=DeadLetter(**{name: getattr(dead_letter, name) for name in DeadLetter.__struct_fields__}),
        attempts=dead_letter.attempts,
        headers=dead_letter.headers,
        event=event,
        body=body,
        body_cut=cut,
        edits=await dead_letter_store.edits(connection, id_) if operator else [],
        replays=[ReplayOf(*pair) for pair in await replay_jobs.of_dead_letter(connection, id_)] if operator else [],
        actions=await audit.actions_on(connection, f"dead_letter/{id_}") if operator else [],
    )


def shown_body(body: bytes, max_bytes: int = _MAX_BODY_BYTES) -> tuple[Any, str | None, bool]:
    """Returns (event or None, body as text or None, whether that text was cut)."""
    event = event_in(body)
    if event is not None and len(body) <= max_bytes:
        return event, None, False
    return None, body[:max_bytes].decode(errors="replace"), len(body) > max_bytes
