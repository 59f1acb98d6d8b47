"""The cursor of a subscriber, a position in the change log: `<epoch>-<offset>-<index>`.

It depends only on the log, so it is valid on every instance, over every transport and after restarts. The epoch detects
cursors of an older log. The index is needed because one message carries up to 256 changes.
"""

import re
from typing import NamedTuple

from msgspec import Struct

from shared.errors import InvalidInput

PATTERN = r"([0-9A-Za-z][0-9A-Za-z-]{0,63})-([0-9]{1,18})-([0-9]{1,6})"
_FORM = re.compile(PATTERN, re.ASCII)


class Position(NamedTuple):
    """The position of a change in one log. Positions compare in the order of the log."""

    offset: int
    place: int
    """Index in the message's batch, from 0."""


class Cursor(Struct, frozen=True):
    """The subscriber has everything up to and including `position`."""

    epoch: str
    position: Position

    def __str__(self) -> str:
        return f"{self.epoch}-{self.position.offset}-{self.position.place}"


def parse_cursor(text: str, *, field: str) -> Cursor:
    """Parses a cursor. Raises InvalidInput with `field`. A cursor that was valid once always parses; the window decides
    whether it can still be resumed."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidInput("not a cursor; send the id of a received event", field=field)
    return Cursor(found[1], Position(int(found[2]), int(found[3])))
