"""Where a subscriber stands in the log: `<epoch>-<offset>-<index in batch>`.

It is made of nothing but the log, so it means the same on every instance, over every transport and across restarts. The
epoch tells a cursor into an older log apart; the index, because one message carries up to 256 changes.
"""

import re
from typing import NamedTuple

from msgspec import Struct

from shared.errors import InvalidInput

PATTERN = r"([0-9A-Za-z][0-9A-Za-z-]{0,63})-([0-9]{1,18})-([0-9]{1,6})"
_FORM = re.compile(PATTERN, re.ASCII)


class Position(NamedTuple):
    """Of a change within one log; positions compare as they stand in it."""

    offset: int
    place: int
    """In the batch of that message."""


class Cursor(Struct, frozen=True):
    """Everything up to and including `position` has been seen."""

    epoch: str
    position: Position

    def __str__(self) -> str:
        return f"{self.epoch}-{self.position.offset}-{self.position.place}"


def parse_cursor(text: str, *, field: str) -> Cursor:
    """Raises InvalidInput naming `field`. One that was valid once parses for ever: if it can still be served is for
    the window to say."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidInput("not a cursor: it is the id of an event that was received", field=field)
    return Cursor(found[1], Position(int(found[2]), int(found[3])))
