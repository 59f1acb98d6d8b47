"""The window holds the recent changes of all tenants in memory, from which a subscriber can resume.

Invariants: for every position from `floor` to `present` the window holds every push event after it, and each change
once. `floor` only rises, until another log begins. The age, number and bytes of the events are limited.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from services.notifier.cursor import Cursor, Position
from services.notifier.events import PushEvent

_position = attrgetter("position")


class _Track:
    """One tenant's events, oldest first. Removing the first one is cheap, and `bisect` works on the list."""

    def __init__(self) -> None:
        self.events: list[PushEvent | None] = []
        self.dropped = 0

    def drop_first(self) -> None:
        self.events[self.dropped] = None  # frees the event; the list is cut when more than half of it is empty
        self.dropped += 1
        if self.dropped * 2 > len(self.events):
            del self.events[: self.dropped]
            self.dropped = 0

    def after(self, position: Position, limit: int) -> list[PushEvent]:
        begin = bisect_right(self.events, position, lo=self.dropped, key=_position)
        return self.events[begin : begin + limit]  # type: ignore[return-value]  # None occurs only before `dropped`


class Window:
    def __init__(self, *, seconds: float, changes: int, size: int) -> None:
        """`seconds` is the maximum age of a change, and `size` the maximum number of bytes of the encoded events."""
        self._seconds = seconds
        self._max_changes = changes
        self._max_bytes = size
        self._events: deque[tuple[float, PushEvent]] = deque()
        self._tracks: dict[str, _Track] = {}
        self._change_ids: set[str] = set()
        self._bytes = 0
        self.epoch: str | None = None
        self.floor = self.present = Position(0, 0)

    def __len__(self) -> int:
        return len(self._events)

    def begin(self, epoch: str | None, first_offset: int) -> None:
        """Starts an empty window on a log that is read from `first_offset`."""
        self._events.clear()
        self._tracks.clear()
        self._change_ids.clear()
        self._bytes = 0
        self.epoch = epoch
        self.floor = Position(first_offset, -1)
        self.present = Position(first_offset, 0)

    @property
    def cursor(self) -> Cursor:
        """The cursor of a subscriber that is fully caught up."""
        return Cursor(self.epoch or "", self.present)

    def add(self, events: Sequence[PushEvent], upto: Position, at: float) -> list[PushEvent]:
        """Adds events that arrived at `at` (monotonic seconds). Returns only the new ones, because the log may have a
        change twice. The log has been read up to `upto`, which may be after the last event."""
        new = []
        for event in events:
            if event.change_id in self._change_ids:
                continue
            self._change_ids.add(event.change_id)
            self._events.append((at, event))
            self._bytes += event.size
            track = self._tracks.get(event.tenant)
            if track is None:
                track = self._tracks[event.tenant] = _Track()
            track.events.append(event)
            new.append(event)
        self.present = max(self.present, upto)
        self.forget(at)
        return new

    def forget(self, at: float) -> None:
        """Drops events beyond the limits. Age counts from the arrival, because a journal brings old changes late."""
        oldest = at - self._seconds
        while self._events and (
            self._events[0][0] < oldest or len(self._events) > self._max_changes or self._bytes > self._max_bytes
        ):
            _, event = self._events.popleft()
            self._change_ids.discard(event.change_id)
            self._bytes -= event.size
            track = self._tracks[event.tenant]
            track.drop_first()
            if not track.events:
                del self._tracks[event.tenant]
            self.floor = event.position

    def holds_all_after(self, position: Position) -> bool:
        return position >= self.floor

    def after(self, tenant: str, position: Position, limit: int) -> list[PushEvent]:
        track = self._tracks.get(tenant)
        return track.after(position, limit) if track is not None else []
