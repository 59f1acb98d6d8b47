"""Cursors of subscribers. A cursor is a position in the change log: `<epoch>-<offset>-<index>`.

It depends only on the log, so it is valid on every instance, over every transport and after restarts. The epoch detects
cursors of an older log. The index is needed because one message carries up to 256 changes.
"""

import re
from typing import NamedTuple

from msgspec import Struct

from shared.errors import InvalidInput

PATTERN = r"([0-9A-Za-z][0-9A-Za-z-]{0,63})-([0-9]{1,18})-([0-9]{1,6})"
_CURSOR = re.compile(PATTERN, re.ASCII)


class Position(NamedTuple):
    """The position of a change in one log. Positions compare in the order of the log."""

    offset: int
    batch_index: int
    """Index of the change in the batch of its message, from 0."""


class Cursor(Struct, frozen=True):
    """The subscriber has everything up to and including `position`."""

    epoch: str
    position: Position

    def __str__(self) -> str:
        return f"{self.epoch}-{self.position.offset}-{self.position.batch_index}"


def parse_cursor(text: str, *, field: str) -> Cursor:
    """Parses a cursor. Raises InvalidInput with `field`. A cursor that was valid once always parses. The window decides
    whether a client can still resume from it."""
    found = _CURSOR.fullmatch(text)
    if found is None:
        raise InvalidInput("the cursor is not valid; send the id of a received event", field=field)
    return Cursor(found[1], Position(int(found[2]), int(found[3])))
