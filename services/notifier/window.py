"""The window holds the recent changes of all tenants in memory, from which a subscriber can resume.

Invariants: for every position from `floor` to `present` the window holds every push event after it, and each change
once. `floor` only rises, until another log begins. Age, number and bytes are bounded.
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
        self.gone = 0

    def drop_first(self) -> None:
        self.events[self.gone] = None  # frees the event; the list is cut when half of it is empty
        self.gone += 1
        if self.gone * 2 > len(self.events):
            del self.events[: self.gone]
            self.gone = 0

    def after(self, position: Position, limit: int) -> list[PushEvent]:
        begin = bisect_right(self.events, position, lo=self.gone, key=_position)
        return self.events[begin : begin + limit]  # type: ignore[return-value]  # None stands only before `gone`


class Window:
    def __init__(self, *, seconds: float, changes: int, size: int) -> None:
        """`seconds`: the greatest age. `size`: bytes of encoded events."""
        self._seconds = seconds
        self._max_changes = changes
        self._max_bytes = size
        self._held: deque[tuple[float, PushEvent]] = deque()
        self._tracks: dict[str, _Track] = {}
        self._known: set[str] = set()
        self._bytes = 0
        self.epoch: str | None = None
        self.floor = self.present = Position(0, 0)

    def __len__(self) -> int:
        return len(self._held)

    def begin(self, epoch: str | None, first_offset: int) -> None:
        """Starts an empty window on a log that is read from `first_offset`."""
        self._held.clear()
        self._tracks.clear()
        self._known.clear()
        self._bytes = 0
        self.epoch = epoch
        self.floor = Position(first_offset, -1)
        self.present = Position(first_offset, 0)

    @property
    def cursor(self) -> Cursor:
        """The cursor of a subscriber that is fully caught up."""
        return Cursor(self.epoch or "", self.present)

    def add(self, events: Sequence[PushEvent], upto: Position, at: float) -> list[PushEvent]:
        """Adds events that arrived `at` (seconds of a monotonic clock) and returns the new ones, because a change may
        be in the log twice. `upto`: how far the log has been read, also without an event."""
        new = []
        for event in events:
            if event.change_id in self._known:
                continue
            self._known.add(event.change_id)
            self._held.append((at, event))
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
        """Drops events beyond the bounds. Age counts from the arrival, because a journal brings old changes late."""
        oldest = at - self._seconds
        while self._held and (
            self._held[0][0] < oldest or len(self._held) > self._max_changes or self._bytes > self._max_bytes
        ):
            _, event = self._held.popleft()
            self._known.discard(event.change_id)
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
