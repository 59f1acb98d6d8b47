"""The window holds the recent changes of all tenants in memory, from which a subscriber can resume.

Invariants: for every position from `floor` to `present` the window holds every push event after it, and each change
once. `floor` only rises, until the window begins again. The age, number and bytes of the events are limited.

The window also knows the position of every message in this range, which proves a cursor. If it gets another message at
an offset that it knows, the log has lost its end: the window forgets that message and everything after it.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from services.notifier.cursor import Cursor, cursor_at
from services.notifier.events import PushEvent
from shared.messaging.position import LogPosition

_cursor = attrgetter("cursor")


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

    def after(self, cursor: Cursor, limit: int) -> list[PushEvent]:
        begin = bisect_right(self.events, cursor, lo=self.dropped, key=_cursor)
        return self.events[begin : begin + limit]  # type: ignore[return-value]  # None occurs only before `dropped`


class _Messages:
    """The positions of the messages in the window, oldest first, in twelve bytes each."""

    def __init__(self) -> None:
        self._offsets = array("q")
        self._crcs = array("I")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> LogPosition:
        return LogPosition(self._offsets[index], self._crcs[index])

    def find(self, offset: int) -> int:
        """Returns the index of the first message that is not before `offset`."""
        return bisect_left(self._offsets, offset)

    def has(self, offset: int, crc: int) -> bool:
        index = self.find(offset)
        return index < len(self) and self[index] == (offset, crc)

    def append(self, position: LogPosition) -> None:
        self._offsets.append(position.offset)
        self._crcs.append(position.crc)

    def drop(self, begin: int, end: int) -> None:
        del self._offsets[begin:end]
        del self._crcs[begin:end]


class Window:
    def __init__(self, *, seconds: float, changes: int, size: int) -> None:
        """`seconds` is the maximum age of a change, and `size` the maximum number of bytes of the encoded events.
        The window knows at most twice `changes` messages."""
        self._seconds = seconds
        self._max_changes = changes
        self._max_bytes = size
        self.floor: Cursor
        self.present: Cursor
        """The cursor of a subscriber that is fully caught up. It can be sent after the first messages are added."""
        self.begin(LogPosition(0, 0))

    def __len__(self) -> int:
        return len(self._events)

    def begin(self, first: LogPosition) -> None:
        """Starts an empty window on a log that is read from `first` on."""
        self._events: deque[tuple[float, PushEvent]] = deque()
        self._tracks: dict[str, _Track] = {}
        self._change_ids: set[str] = set()
        self._bytes = 0
        self._messages = _Messages()
        self.floor = self.present = cursor_at(first, -1)

    def add(
        self, events: Sequence[PushEvent], positions: Sequence[LogPosition], upto: Cursor, at: float
    ) -> list[PushEvent]:
        """Adds events that arrived at `at` (monotonic seconds). Returns only the new ones, because the log may have a
        change twice. `positions`: of the messages that were read, with or without events. The log has been read up to
        `upto`, which may be after the last event."""
        unread = {position.offset for position in positions if self._add_message(position)}
        new = []
        for event in events:
            if event.change_id in self._change_ids or event.cursor.offset not in unread:
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

    def _add_message(self, position: LogPosition) -> bool:
        """Returns False if the message was read before, so that its events are in the window or too old for it."""
        if len(self._messages) and position.offset <= self._messages[-1].offset:
            if self._messages.has(*position):
                return False
            self._forget_from(position.offset)
        self._messages.append(position)
        return True

    def _forget_from(self, offset: int) -> None:
        """Forgets the messages from `offset` on, which the log has lost."""
        self._messages.drop(self._messages.find(offset), len(self._messages))
        while self._events and self._events[-1][1].cursor.offset >= offset:
            _, event = self._events.pop()
            self._tracks[event.tenant].events.pop()
            self._removed(event)
        self.present = cursor_at(self._messages[-1]) if len(self._messages) else Cursor(offset, 0, -1)
        if self.floor.offset >= offset:
            self.floor = self.present

    def forget(self, at: float) -> None:
        """Drops events beyond the limits. Age counts from the arrival, because a journal brings old changes late."""
        oldest = at - self._seconds
        while self._events and (
            self._events[0][0] < oldest or len(self._events) > self._max_changes or self._bytes > self._max_bytes
        ):
            _, event = self._events.popleft()
            self._tracks[event.tenant].drop_first()
            self._removed(event)
            self.floor = event.cursor
        if (extra := len(self._messages) - 2 * self._max_changes) > 0:
            self.floor = max(self.floor, cursor_at(self._messages[extra], -1))
        before = self._messages.find(self.floor.offset)
        if before * 2 > len(self._messages):
            self._messages.drop(0, before)

    def _removed(self, event: PushEvent) -> None:
        """Updates the figures after the first or last event was removed from its track."""
        self._change_ids.discard(event.change_id)
        self._bytes -= event.size
        track = self._tracks[event.tenant]
        if len(track.events) == track.dropped:
            del self._tracks[event.tenant]

    def holds_all_after(self, cursor: Cursor) -> bool:
        return (cursor.offset, cursor.batch_index) >= (self.floor.offset, self.floor.batch_index)

    def proves(self, cursor: Cursor) -> bool:
        """Returns whether the log has the message of the cursor."""
        return cursor <= self.present and self._messages.has(cursor.offset, cursor.crc)

    def older_positions(self) -> list[LogPosition]:
        """Returns some positions, newest first, for a reader that goes back. The distance to the end doubles; the
        last one is the oldest."""
        found, back = [], 2
        while back < len(self._messages):
            found.append(self._messages[-back])
            back *= 2
        return [*found, self._messages[0]] if len(self._messages) else []

    def after(self, tenant: str, cursor: Cursor, limit: int) -> list[PushEvent]:
        track = self._tracks.get(tenant)
        return track.after(cursor, limit) if track is not None else []
