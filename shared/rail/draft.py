"""A change before it is committed, and the event that is made from it."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from msgspec import Raw, Struct

from shared.entities.change_id import change_id
from shared.entities.contract import Change, ChangeData, Head, Lane, changed_fields, encode
from shared.entities.entity import Entity
from shared.entities.overlay import old_values


class Draft(Struct, kw_only=True):
    """A requested change: the whole state after it, and the head that it is based on."""

    entity: Entity
    event: str
    """The kind of change, in the past tense, such as `created`."""
    state: Any
    """The Struct of the entity after the change."""
    base: Head | None
    """The head that the change is built on; None for a creation."""
    before: Struct | None
    """The state of the base; None for a creation."""
    base_raw: bytes | None = None
    """The encoded state of the base. Its fields that this release does not know are kept in the new state."""
    made_from: bytes | None = None
    """The encoded state that `state` was made from, if that is not the base. Its unknown fields are kept instead."""
    at: datetime
    """The time when the change was accepted."""
    source: str
    """The component that makes the change, such as `orders` or `sync`."""
    lane: Lane | None = None
    """The lane of the change; None for the lane of its entity."""
    actor: str | None = None
    """Id of the user or of the guest's session that requested the change."""
    traceparent: str | None = None
    """The context of the span that makes the change durable. The default is a new span of the current trace."""
    existing: Callable[[], Awaitable[tuple[Head, Any] | None]] | None = None
    """Finds an earlier creation with the same id while there is no warm mirror. Returns its head and state, or None.
    Raises Unavailable if no store can answer."""


def change_of(draft: Draft) -> Change:
    """Returns the event of a draft. The id covers the type, the base and both states, so that the same draft gives the
    same id."""
    schema, after = draft.entity.encode_state(draft.state, draft.made_from or draft.base_raw)
    changed = changed_fields(draft.before, draft.state)
    before = encode(changed) if draft.base_raw is None else old_values(draft.base_raw, changed, draft.state, after)
    version = draft.base.version + 1 if draft.base else 1
    base = draft.base.change_id if draft.base else None
    type_ = draft.entity.type(draft.event, schema)
    return Change(
        id=change_id(draft.state.id, version, b"\0".join((type_.encode(), (base or "").encode(), before, after))),
        source=draft.source,
        type=type_,
        subject=f"{draft.entity.name}/{draft.state.id}",
        time=draft.at,
        restaurantid=draft.state.restaurant_id,
        priority=(draft.lane or draft.entity.lane).priority,
        entityversion=version,
        basechangeid=base,
        traceparent=draft.traceparent,
        actor=draft.actor,
        data=ChangeData(after=Raw(after), before=Raw(before)),
    )
