"""Converts a change into a push event, with pure functions.

| change                        | event          | for a subscriber of one order |
|-------------------------------|----------------|-------------------------------|
| order.created                 | order_created  |                               |
| order.deleted                 | order_deleted  |                               |
| order.status_changed          | stage_change   | order_stage_change            |
| any other change of an order  | status_update  |                               |
| any other entity              | none yet       |                               |

`{"eventType", "data": <the whole state after the change>, "orderID", "timestamp", "version", "changeId", "traceId"}`;
the data of a stage change also has `previousStage` and `newStage`. The event is encoded once for all subscribers. A
screen keeps the state with the largest (version, changeId) of an order, as every store does."""

from enum import IntEnum
from typing import Any

import msgspec
from msgspec import Raw, Struct

from services.notifier.cursor import Cursor
from shared.entities import order
from shared.entities.contract import Change, decode_change, encode
from shared.entities.entity import event_of
from shared.entities.internal_fields import without_internal_fields
from shared.entities.registry import read
from shared.observability.tracing import trace_id_of


class PushKind(IntEnum):
    """One bit per kind, so that a filter is one `&` of integers."""

    ORDER_CREATED = 1
    ORDER_DELETED = 2
    STAGE_CHANGE = 4
    STATUS_UPDATE = 8
    VALIDATED = 16


EVERY_KIND = sum(PushKind)

# The names that a subscriber may request. A stage change has two names, and either one requests it.
KINDS = {
    "order_created": PushKind.ORDER_CREATED,
    "order_deleted": PushKind.ORDER_DELETED,
    "stage_change": PushKind.STAGE_CHANGE,
    "order_stage_change": PushKind.STAGE_CHANGE,
    "status_update": PushKind.STATUS_UPDATE,
    "validated": PushKind.VALIDATED,
}

_OF_ORDER = {
    "created": (PushKind.ORDER_CREATED, "order_created"),
    "deleted": (PushKind.ORDER_DELETED, "order_deleted"),
    "status_changed": (PushKind.STAGE_CHANGE, "stage_change"),
}
_OTHER_CHANGES = (PushKind.STATUS_UPDATE, "status_update")

_fields = msgspec.json.Decoder(dict[str, Raw])
_NO_HOLDS = Raw(b"[]")


class PushEvent(Struct, frozen=True):
    cursor: Cursor
    change_id: str
    tenant: str
    order_id: str
    session_id: str | None
    """The customer session that may see the event."""
    kind: PushKind
    _name: str
    _rest: bytes
    """The JSON after the event's name, which the two names of a stage change share."""
    _rest_without_holds: bytes = b""
    """The same without the stock that the order holds; empty if it holds none."""
    traceparent: str | None = None
    accepted_at: float = 0.0
    """Unix time in seconds."""

    def name(self, *, of_one_order: bool) -> str:
        return "order_stage_change" if of_one_order and self.kind is PushKind.STAGE_CHANGE else self._name

    def payload(self, *, of_one_order: bool, holds: bool = True) -> bytes:
        """Returns the event as JSON on one line. `holds`: with the stock that the order holds, which reveals the
        recipes of its dishes."""
        rest = self._rest if holds else self._rest_without_holds or self._rest
        return b'{"eventType":"%b",%b' % (self.name(of_one_order=of_one_order).encode(), rest)

    @property
    def size(self) -> int:
        return len(self._rest) + len(self._rest_without_holds)


def push_event(encoded: bytes, cursor: Cursor) -> PushEvent | None:
    """Returns the push event of an encoded change, or None if the change is not pushed. Raises BrokenContract for a
    change that no store accepts either."""
    change = decode_change(encoded)
    entity, state = read(change)
    if entity is not order.ENTITY:
        return None
    kind, name = _OF_ORDER.get(event_of(change.type)[1], _OTHER_CHANGES)
    # The fields stay encoded, so that fields of a newer release reach the screens.
    data: dict[str, Any] = dict(_fields.decode(without_internal_fields(bytes(change.data.after))))
    if kind is PushKind.STAGE_CHANGE:
        data["previousStage"] = _previous_stage(change)
        data["newStage"] = state.status
    return PushEvent(
        cursor=cursor,
        change_id=change.id,
        tenant=change.restaurantid,
        order_id=state.id,
        session_id=state.customer_session_id,
        kind=kind,
        traceparent=change.traceparent,
        accepted_at=change.time.timestamp(),
        _name=name,
        _rest=_rest(change, data),
        _rest_without_holds=_rest(change, {**data, "holds": _NO_HOLDS}) if state.holds else b"",
    )


def _previous_stage(change: Change) -> Raw | None:
    try:
        return _fields.decode(change.data.before).get("status")
    except msgspec.DecodeError:
        return None  # no store reads `before`, so a malformed one is not an error


def _rest(change: Change, data: dict[str, Any]) -> bytes:
    encoded = encode(
        {
            "data": data,
            "orderID": change.entity_id,
            "timestamp": change.time,
            "version": change.entityversion,
            "changeId": change.id,
            "traceId": trace_id_of(change.traceparent),
        }
    )
    if b"\n" in encoded or b"\r" in encoded:
        # A line break between JSON tokens would end the SSE field. Inside strings, line breaks are escaped.
        encoded = msgspec.json.format(encoded, indent=-1)
    return encoded[1:]
