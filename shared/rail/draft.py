"""A change before it is committed, and the event that is made from it."""

from datetime import datetime
from typing import Any

from msgspec import Raw, Struct

from shared.entities import registry
from shared.entities.change_id import change_id
from shared.entities.contract import (
    MAX_DATA_BYTES,
    BrokenContract,
    Change,
    ChangeData,
    Head,
    Lane,
    changed_fields,
    encode,
)
from shared.entities.entity import Entity
from shared.entities.overlay import old_values
from shared.errors import InvalidInput
from shared.observability import tracing
from shared.rail.head import Standing


class Draft(Struct, kw_only=True):
    """A requested change: the whole state after it, and the head that it is based on."""

    entity: Entity
    event: str
    """The kind of change, in the past tense, such as `created`."""
    state: Any
    """The Struct of the entity after the change."""
    base: Standing | None
    """The base of the change; None for a creation."""
    made_from: bytes | None = None
    """The encoded state that `state` was made from; None for that of the base. The new state keeps its fields that this
    release does not know."""
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
    keyed: bool = False
    """Whether the id of a new entity is derived from the request, so that a repeat has the same id."""
    sold: bool = False
    """Whether the change takes its stock without a check, because the goods are already sold."""

    @property
    def base_head(self) -> Head | None:
        return None if self.base is None else self.base.head

    @property
    def before(self) -> Any:
        """The state of the base; None for a creation."""
        return None if self.base is None else self.base.state

    @property
    def record_lane(self) -> Lane:
        return self.lane or self.entity.lane


def change_of(draft: Draft) -> Change:
    """Returns the event of a draft. The id covers the type, the base and both states, so that the same draft gives the
    same id."""
    on = draft.base
    schema, after = draft.entity.encode_state(draft.state, draft.made_from or (on.raw if on else None))
    changed = changed_fields(draft.before, draft.state)
    partly = draft.entity.partly_before
    before = old_values(on.raw, changed, draft.state, after, partly=partly) if on else encode(changed)
    version = on.head.version + 1 if on else 1
    base = on.head.change_id if on else None
    type_ = draft.entity.type(draft.event, schema)
    return Change(
        id=change_id(draft.state.id, version, b"\0".join((type_.encode(), (base or "").encode(), before, after))),
        source=draft.source,
        type=type_,
        subject=f"{draft.entity.name}/{draft.state.id}",
        time=draft.at,
        restaurantid=draft.state.restaurant_id,
        priority=draft.record_lane.priority,
        entityversion=version,
        basechangeid=base,
        traceparent=draft.traceparent,
        actor=draft.actor,
        data=ChangeData(after=Raw(after), before=Raw(before)),
    )


def checked_change(draft: Draft) -> Change:
    """Returns the event of a draft, and notes it in the current trace. Raises InvalidInput unless every store can read
    the event: constructing a Struct checks nothing."""
    trace = tracing.current()
    if draft.traceparent is None and trace is not None:
        draft.traceparent = trace.context_of(tracing.new_span_id())
    change = change_of(draft)
    if trace is not None:
        trace.attributes[f"ticketrail.{draft.entity.name}_id"] = draft.state.id
        trace.attributes["ticketrail.change_id"] = change.id
    try:
        registry.read(change)
    except BrokenContract as error:
        raise InvalidInput(str(error), field="data", code="contract_broken") from error
    if len(memoryview(change.data.after)) + len(memoryview(change.data.before)) > MAX_DATA_BYTES:
        raise InvalidInput("too large for one change", field="data", code="too_large", max_bytes=MAX_DATA_BYTES)
    return change
