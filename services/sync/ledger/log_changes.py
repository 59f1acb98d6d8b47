"""Reads the changes in a message of the change log from the events that name them. Pure."""

import re
from typing import Any

import msgspec
from msgspec import Struct

from shared.entities.contract import BrokenContract, split_batch

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class LogChange(Struct, frozen=True, gc=False):
    """The attributes of an event with a valid change id. The others may have any type: the event may be poison."""

    id: Any = None
    restaurantid: Any = None
    subject: Any = None
    entityversion: Any = None
    time: Any = None
    traceparent: Any = None

    @property
    def restaurant_id(self) -> str:
        """The restaurant; empty if the event names none."""
        return self.restaurantid if is_id(self.restaurantid) else ""


_decoder = msgspec.json.Decoder(LogChange)


def changes_in(body: bytes) -> tuple[list[tuple[LogChange, bytes]], int]:
    """Returns ((change, event) of each event with a valid change id, number of the other events). The others are dead
    letters without a change."""
    try:
        events = split_batch(body)
    except BrokenContract:
        return [], 1
    found = []
    for event in events:
        try:
            change = _decoder.decode(event)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if is_id(change.id):
            found.append((change, event))
    return found, len(events) - len(found)


def is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None
