"""Mending a dead letter by hand: an operator's event instead of the one that died. Pure.

The event that is wanted is checked against the contract as a writer would check it. What says whose it is (restaurant,
entity, id) is locked, as far as it could be read in the letter. The change that comes of it is a new one, at the
version after the one that stands: its id, version, base and time are ours to make, whatever the event says.
"""

import re
from typing import Any
from uuid import uuid4

import msgspec

from shared.entities import registry
from shared.entities.contract import BrokenContract, decode_change, encode, now, split_batch
from shared.entities.entity import Entity
from shared.errors import InvalidInput

_OURS = ("id", "time", "entityversion", "basechangeid", "traceparent", "actor", "specversion", "datacontenttype")
_NEEDED = ("restaurantid", "subject", "type", "data")
_AFTER = "data.after"
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_NAMED = re.compile(r"(?:unknown|required) field `([^`]*)`")


def event_in(body: bytes) -> dict[str, Any] | None:
    """The event of a letter, as far as it is JSON; None where it is not one event."""
    try:
        events = split_batch(body)
        found = msgspec.json.decode(events[0]) if len(events) == 1 else None
    except (BrokenContract, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def edited_event(original: dict[str, Any] | None, wanted: dict[str, Any]) -> tuple[Entity, str, Any]:
    """(entity, event, state after it) of the event that an operator wants; raises InvalidInput that names the field."""
    for name in _NEEDED:
        if name not in wanted:
            raise InvalidInput("is missing", field=f"event.{name}")
    for name in sorted(set(wanted) - {*_NEEDED, *_OURS, "source", "priority"}):
        raise InvalidInput("unknown attribute", field=f"event.{name}")
    for name in ("restaurantid", "subject"):
        if original is not None and isinstance(before := original.get(name), str) and wanted[name] != before:
            raise InvalidInput(
                f"is locked: it says whose the letter is ({before})", field=f"event.{name}", code="locked"
            )
    data = wanted["data"]
    if not isinstance(data, dict) or "after" not in data:
        raise InvalidInput("an object with the state `after`", field="event.data")
    whole = {
        "id": str(uuid4()),
        "source": "sync",
        "type": wanted["type"],
        "subject": wanted["subject"],
        "time": now(),
        "restaurantid": wanted["restaurantid"],
        "priority": wanted.get("priority", 10),
        "entityversion": 1,
        "data": {"after": data["after"], "before": {}},
    }
    try:
        change = decode_change(encode(whole))
        entity, state = registry.read(change)
    except BrokenContract as error:
        raise InvalidInput(str(error), field=_field(error), code=error.reason) from error
    return entity, change.type.split(".")[2], state


def _field(error: BrokenContract) -> str:
    """Its path in the request, as far as the error tells."""
    text = str(error)
    if error.reason in ("unknown_type", "unsupported_version"):
        return "event.type"
    if text.startswith(f"{_AFTER}."):
        return f"event.{text.split()[0]}"
    found = [match[1] for pattern in (_PATH, _NAMED) if (match := pattern.search(text))]
    return ".".join(name for name in ("event", _AFTER if text.startswith(_AFTER) else "", *found) if name)
