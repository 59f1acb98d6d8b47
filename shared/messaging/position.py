"""Positions in a log. A position names one message of the stream and says what stands there.

A stream may lose its end in a power cut, and may be deleted and created again. Its offsets are then given again, so an
offset alone proves nothing. A position therefore also has a checksum of the message at that offset. A stream loses only
its end, so a position whose message is still there proves every message before it; it proves nothing after it.
"""

from typing import NamedTuple
from zlib import crc32


class LogPosition(NamedTuple):
    """The reader has everything up to and including the message at `offset`. Positions of one log compare in its
    order."""

    offset: int
    crc: int
    """See `checksum`."""


def checksum(body: bytes, message_id: str | None = None) -> int:
    """Returns the CRC-32 of a message: of its id, if it has one, and then of its body. The publisher gives each message
    an id of its own, so a body that is published again after a crash, perhaps at the same offset, has another
    checksum."""
    return crc32(body, crc32(message_id.encode()) if message_id else 0)
