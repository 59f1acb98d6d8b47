"""Cursors of subscribers. A cursor is a position in the change log: `<offset>-<crc>-<index>`.

It depends only on the log, so it is valid on every instance, over every transport and after restarts. The CRC says
which message stands at the offset (shared/messaging/position.py), because a log that has lost its end gives offsets
again. The index is needed because one message carries up to 256 changes.
"""

import re
from typing import Final, NamedTuple

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


UNREADABLE: Final = Cursor(0, 0, 0)
"""Stands for a cursor that is not one of this system, or of an older release. No log proves it, so that a client which
resumes from it loads its data again."""


def parse_cursor(text: str) -> Cursor:
    """Parses a cursor. Returns UNREADABLE for any other text: an error would end the EventSource of a browser for good.
    A cursor that was valid once always parses. The window decides whether a client can still resume from it."""
    found = _CURSOR.fullmatch(text)
    if found is None:
        return UNREADABLE
    return Cursor(int(found[1]), int(found[2], 16), int(found[3]))
