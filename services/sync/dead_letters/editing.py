"""Checks the event with which an operator replaces a dead letter. Pure.

The event must obey the contract; the check is the same as in the PostgreSQL writer. If restaurant and subject are
readable in the dead letter, they cannot be changed. The result is a new change at head version + 1. The rail assigns
its id, version, base and time, and the values in the event are ignored.
"""

import re
from typing import Any
from uuid import uuid4

import msgspec
from msgspec import Struct

from shared.entities import registry
from shared.entities.contract import BrokenContract, Change, decode_change, encode, now, split_batch
from shared.entities.entity import Entity
from shared.errors import InvalidInput
from shared.http.field_rules import in_words

_ASSIGNED = ("id", "time", "entityversion", "basechangeid", "traceparent", "actor", "specversion", "datacontenttype")
_REQUIRED = ("restaurantid", "subject", "type", "data")
_AFTER = "data.after"
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_NAMED = re.compile(r"(?:unknown|required) field `([^`]*)`")


def event_in(body: bytes) -> dict[str, Any] | None:
    """Returns the event in the body of a dead letter, or None if the body is not exactly one JSON event."""
    try:
        events = split_batch(body)
        found = msgspec.json.decode(events[0]) if len(events) == 1 else None
    except (BrokenContract, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def edited_event(original: dict[str, Any] | None, edited: dict[str, Any]) -> tuple[Entity, str, Any, bytes]:
    """Checks an operator's event. Returns (entity, name of the event, state after the event, the same state encoded
    with the fields that this release does not know). `original`: the event in the dead letter, or None if it is not
    readable. Raises InvalidInput, which names the field."""
    for name in _REQUIRED:
        if name not in edited:
            raise InvalidInput("is missing", field=f"event.{name}")
    for name in sorted(set(edited) - {*_REQUIRED, *_ASSIGNED, "source", "priority"}):
        raise InvalidInput("unknown attribute", field=f"event.{name}")
    for name in ("restaurantid", "subject"):
        if original is not None and isinstance(before := original.get(name), str) and edited[name] != before:
            raise InvalidInput(
                f"must stay as it is in the dead letter ({before})", field=f"event.{name}", code="locked"
            )
    data = edited["data"]
    if not isinstance(data, dict) or "after" not in data:
        raise InvalidInput("must be an object with the state `after`", field="event.data")
    whole = {
        "id": str(uuid4()),
        "source": "sync",
        "type": edited["type"],
        "subject": edited["subject"],
        "time": now(),
        "restaurantid": edited["restaurantid"],
        "priority": edited.get("priority", 10),
        "entityversion": 1,
        "data": {"after": data["after"], "before": {}},
    }
    try:
        change = decode_change(encode(whole))
        entity, state = registry.read(change)
    except BrokenContract as error:
        raise _refusal(error, edited["type"]) from error
    return entity, change.type.split(".")[2], state, bytes(change.data.after)


class Effect(Struct, frozen=True):
    """The effect that an edit would have."""

    type: str
    restaurant_id: str
    subject: str
    head: int | None
    """The version that stands; None if the entity does not exist."""


def event_types() -> list[str]:
    """Returns the types of all events that this release writes."""
    return sorted(entity.type(event) for entity in registry.ENTITIES.values() for event in entity.events)


def new_event(restaurant_id: str, type_: str, subject: str) -> dict[str, Any]:
    """Returns an event whose state has every field that its entity needs. Fields without an obvious value are null, so
    that the contract refuses the event until the operator fills them in."""
    name, _, id_ = subject.partition("/")
    at = now().isoformat()
    known = {"id": id_, "restaurant_id": restaurant_id, "created_at": at, "updated_at": at}
    fields = msgspec.structs.fields(registry.ENTITIES[name].state)
    after = {field.name: known.get(field.name) for field in fields if field.required}
    return {"restaurantid": restaurant_id, "type": type_, "subject": subject, "data": {"after": after}}


def _refusal(error: BrokenContract, type_: str) -> InvalidInput:
    """Returns the error in words, with the rule of a text or the allowed values of an enumeration."""
    text, of_state = str(error), str(error).startswith(f"{_AFTER}: ")
    found = _PATH.search(text)
    checked: Any = registry.ENTITIES[type_.split(".")[1]].state if of_state else Change
    message, details = in_words(
        _PATH.sub("", text.removeprefix(f"{_AFTER}: ")), found[1] if found is not None else "", checked
    )
    return InvalidInput(message, field=_field(error), code=error.reason, **details)


def _field(error: BrokenContract) -> str:
    """Returns the path of the field in the request, as precisely as the error names it."""
    text = str(error)
    if error.reason in ("unknown_type", "unsupported_version"):
        return "event.type"
    if text.startswith(f"{_AFTER}."):
        return f"event.{text.split()[0]}"
    found = [match[1] for pattern in (_PATH, _NAMED) if (match := pattern.search(text))]
    return ".".join(name for name in ("event", _AFTER if text.startswith(_AFTER) else "", *found) if name)
