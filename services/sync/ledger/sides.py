"""The two sides that the ledger compares: change ids that only the log has, and ids that only the feed has. Pure.

Each side is read in order. An id that both have leaves both. The oldest id that is left on a side says where the
comparison must begin again after a restart (`log_low`, `feed_low`).
"""

from collections.abc import Iterator
from typing import NamedTuple

from services.sync.ledger.log_changes import LogChange
from shared.messaging.position import LogPosition
from shared.postgres.feed import FeedChange

MAX_IDS = 100_000
"""The maximum number of ids that one side alone may have; then its reader pauses."""


class LogOnly(NamedTuple):
    """A change that only the log has."""

    at: LogPosition
    """The position of its message."""
    before: LogPosition
    """The position of the message before it."""
    lane: str
    change: LogChange


class FeedOnly(NamedTuple):
    """A change that only the feed has."""

    change: FeedChange
    seen_at: float
    """The monotonic time of the read."""

    @property
    def place(self) -> tuple[int, int]:
        return self.change.xid, self.change.seq


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
        self.committed = 0
        """The number of changes that the feed has brought."""
        self.early = 0
        """The number of changes of the log that were found in PostgreSQL before the feed brings them, because an older
        transaction holds it back."""
        self._looked_up: dict[str, bool] = {}
        """Change id -> True for these changes, and False for dead ones, which may be replayed."""
        self._pairs: list[tuple[tuple[int, int], LogPosition]] = []
        """Place in the feed, and position before it in the log, of changes that have left both sides while the feed had
        others alone."""

    def from_log(self, change_id: str, found: LogOnly) -> None:
        known = self.feed.pop(change_id, None)
        if known is None:
            self.log.setdefault(change_id, found)
        else:
            self._pair(known.place, found.before)

    def from_feed(self, found: FeedOnly) -> None:
        self.committed += 1
        change_id = found.change.change_id
        known = self.log.pop(change_id, None)
        if known is not None:
            self._pair(found.place, known.before)
        elif change_id in self._looked_up:
            self.early -= self._looked_up.pop(change_id)
        else:
            self.feed.setdefault(change_id, found)

    def _pair(self, place: tuple[int, int], before: LogPosition) -> None:
        if self.feed:
            self._pairs.append((place, before))

    def found(self, change_id: str, place: tuple[int, int] | None) -> None:
        """Takes a change from the log side that a look-up has found. `place`: its place in the feed; None if it is
        dead."""
        known = self.log.pop(change_id, None)
        if known is None or (place is not None and place <= self.feed_position) or len(self._looked_up) >= MAX_IDS:
            return  # the feed has brought it before, so the log has it twice
        self._looked_up[change_id] = place is not None
        if place is not None:
            self.early += 1
            self._pairs.append((place, known.before))

    def read_log_to(self, position: LogPosition) -> bool:
        """Moves the log position. Returns False if the log does not prove the earlier position: it has another message
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
        """Log entries up to this position are in `changes`, or dead. The changes of the feed after `feed_low` are not
        among them, so that both readers meet again after a restart."""
        feed_low = self.feed_low
        self._pairs = [pair for pair in self._pairs if pair[0] > feed_low]
        # Both sides are filled in order, but a change that the log has twice may be added late.
        firsts = [one.before for one in self.log.values()] + [before for _, before in self._pairs]
        return min(firsts, key=lambda one: one.offset, default=self.log_position)

    @property
    def feed_low(self) -> tuple[int, int]:
        """Changes up to this (xid, seq) are in the log."""
        xid, seq = min((one.place for one in self.feed.values()), default=(0, 0))
        return (xid, seq - 1) if self.feed else self.feed_position

    def overdue(self, before: float) -> Iterator[tuple[str, FeedOnly]]:
        """Yields the changes that only the feed has and that were read from it before this time."""
        for change_id, found in self.feed.items():
            if found.seen_at <= before:
                yield change_id, found
