"""The two sides that the ledger compares: change ids that only the log has, and ids that only the feed has. Pure.

Each side is read in order. An id that both have leaves both. What is left at the beginning of a side says from where
the comparison must begin again after a restart (`log_low`, `feed_low`).
"""

from collections.abc import Iterator
from typing import NamedTuple

from shared.messaging.position import LogPosition

MAX_IDS = 100_000
"""The maximum number of ids that one side alone may have; then its reader pauses."""


class LogOnly(NamedTuple):
    """A change that only the log has."""

    at: LogPosition
    """The position of its message."""
    before: LogPosition
    """The position of the message before it."""
    lane: str
    restaurant_id: str


class FeedOnly(NamedTuple):
    """A change that only the feed has."""

    xid: int
    seq: int
    restaurant_id: str
    seen_at: float
    """When it was read, on the monotonic clock."""


class Sides:
    def __init__(self, low: LogPosition, at: LogPosition, feed: tuple[int, int]) -> None:
        """`low`: the log is read from here. `at`: the position that was read before, at `low` or later. `feed`: the
        (xid, seq) from which the feed is read."""
        self.log: dict[str, LogOnly] = {}
        self.feed: dict[str, FeedOnly] = {}
        self.log_position = low
        self.log_at = at
        """The largest position that was read, in this session or before it."""
        self.feed_position = feed

    def from_log(self, change_id: str, found: LogOnly) -> None:
        if self.feed.pop(change_id, None) is None:
            self.log.setdefault(change_id, found)

    def from_feed(self, change_id: str, found: FeedOnly) -> None:
        if self.log.pop(change_id, None) is None:
            self.feed.setdefault(change_id, found)

    def read_log_to(self, position: LogPosition) -> bool:
        """Moves the log position. Returns False if the log does not prove what was read before: it has another message
        there. Everything that was read before is then doubtful."""
        if position.offset < self.log_at.offset:
            self.log_position = position
            return True
        # The log may have been cut and grown again while it was being read again.
        if self.log_position.offset < self.log_at.offset and position != self.log_at:
            return False
        self.log_position = self.log_at = position
        return True

    @property
    def rereads(self) -> bool:
        """True until the log is read to the position that was read before."""
        return self.log_position.offset < self.log_at.offset

    @property
    def log_low(self) -> LogPosition:
        """Log entries up to this position are in `changes`, or dead."""
        # Both sides are filled in order, but a change that the log has twice may be added late.
        first = min(self.log.values(), key=lambda one: one.at.offset, default=None)
        return self.log_position if first is None else first.before

    @property
    def feed_low(self) -> tuple[int, int]:
        """Changes up to this (xid, seq) are in the log."""
        first = min(((one.xid, one.seq - 1) for one in self.feed.values()), default=None)
        return self.feed_position if first is None else first

    def overdue(self, before: float) -> Iterator[tuple[str, FeedOnly]]:
        """Yields the changes that only the feed has since before this time."""
        for change_id, found in self.feed.items():
            if found.seen_at <= before:
                yield change_id, found
