"""Cursors of subscribers. A cursor is a position in the change log: `<offset>-<crc>-<index>`.

It depends only on the log, so it is valid on every instance, over every transport and after restarts. The CRC says
which message stands at the offset (shared/messaging/position.py), because a log that has lost its end gives offsets
again. The index is needed because one message carries up to 256 changes.
"""

import re
from typing import NamedTuple

from shared.errors import InvalidInput
from shared.messaging.position import LogPosition

PATTERN = r"([0-9]{1,18})-([0-9a-f]{8})-([0-9]{1,6})"
_CURSOR = re.compile(PATTERN, re.ASCII)


class Cursor(NamedTuple):
    """The subscriber has everything up to and including this change. Cursors of one log compare in its order."""

    offset: int
    crc: int
    batch_index: int
    """Index of the change in the batch of its message, from 0."""

    def __str__(self) -> str:
        return f"{self.offset}-{self.crc:08x}-{self.batch_index}"


def cursor_at(position: LogPosition, batch_index: int = 0) -> Cursor:
    return Cursor(position.offset, position.crc, batch_index)


def parse_cursor(text: str, *, field: str) -> Cursor:
    """Parses a cursor. Raises InvalidInput with `field`. A cursor that was valid once always parses. The window decides
    whether a client can still resume from it."""
    found = _CURSOR.fullmatch(text)
    if found is None:
        raise InvalidInput("the cursor is not valid; send the id of a received event", field=field)
    return Cursor(int(found[1]), int(found[2], 16), int(found[3]))
