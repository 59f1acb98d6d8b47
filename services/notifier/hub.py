"""The hub: who listens, and what reaches them.

Guarantees to a subscriber: it receives what its interest asks for, in the order of the log, each change once, without a
gap, from its cursor on. Where that cannot be kept (cursor older than the window, of another epoch, ahead of the log, or
a buffer that is full) it receives one `resync` that says why, and whoever is slow is let go. No event reaches another
tenant: fan-out begins with the tenant.

Subscribers with the same interest form an audience. A batch of events is filtered, framed and joined once for each
audience, and each subscriber only gets a reference to the bytes and one wake-up: the cost of an event hardly grows
with the number of screens.

A subscriber that comes back reads the window at its own pace; it joins its audience in the same step of the event loop
in which it finds nothing more there, so that between replay and live there is neither a gap nor a repetition.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import structlog
from msgspec import Struct

from services.notifier.cursor import Cursor, Position
from services.notifier.events import PushEvent
from services.notifier.interest import Interest
from services.notifier.window import Window

log = structlog.get_logger(__name__)

# Seconds that a subscriber which has been let go may still take to read its last bytes.
_FAREWELL = 2.0
# How many events of the window are looked at in one step of a replay.
_REPLAY_STEP = 256


class Form(Struct, frozen=True):
    """How a transport writes things down. One object per transport, compared by identity."""

    event: Callable[[PushEvent, Cursor, bool], bytes]
    """Of an event, its cursor, and if it is for a subscriber of one order."""
    resync: Callable[[str, Cursor], bytes]
    heartbeat: Callable[[Cursor], bytes]


class Subscriber:
    """What waits for one client. The transport takes from it; only the hub puts in."""

    __slots__ = ("_bytes", "_chunks", "_events", "_waiter", "audience", "ended", "position", "task")

    def __init__(self, audience: "Audience", position: Cursor | None) -> None:
        self.audience = audience
        self.position = position
        """Where its replay stands; None once it is live."""
        self.ended = False
        """Nothing will come any more; what waits may still be taken."""
        self.task: asyncio.Task[Any] | None = None
        """Whose writing is cut short when the client does not read its last bytes."""
        self._chunks: list[bytes] = []
        self._events = 0
        self._bytes = 0
        self._waiter: asyncio.Future[None] | None = None

    def put(self, chunk: bytes, events: int) -> None:
        self._chunks.append(chunk)
        self._events += events
        self._bytes += len(chunk)
        if self._waiter is not None:
            self._wake()

    def take(self) -> bytes:
        """All that waits, as one chunk; empty when nothing does."""
        if not self._chunks:
            return b""
        chunks, self._chunks = self._chunks, []
        self._events = self._bytes = 0
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def fits(self, most_events: int, most_bytes: int) -> bool:
        return self._events <= most_events and self._bytes <= most_bytes

    async def wait(self) -> None:
        """Until something waits or it has ended. One transport waits for one subscriber."""
        if not self._chunks and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def end(self) -> None:
        self.ended = True
        if self._waiter is not None:
            self._wake()

    def clear(self) -> None:
        self._chunks.clear()
        self._events = self._bytes = 0

    @property
    def idle(self) -> bool:
        return not self._chunks

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Audience:
    """Subscribers with one interest on one transport, those that are live."""

    __slots__ = ("form", "interest", "live")

    def __init__(self, interest: Interest, form: Form) -> None:
        self.interest = interest
        self.form = form
        self.live: set[Subscriber] = set()

    @property
    def room(self) -> str:
        """Where `Hub` looks for it: the narrowest thing that an event must have in common with the interest."""
        if self.interest.order_id is not None:
            return f"order:{self.interest.order_id}"
        return "" if self.interest.session_id is None else f"session:{self.interest.session_id}"

    def frames(self, events: Iterable[PushEvent], epoch: str) -> list[bytes]:
        of_one_order = self.interest.order_id is not None
        return [
            self.form.event(event, Cursor(epoch, event.position), of_one_order)
            for event in events
            if self.interest.wants(event)
        ]


_Rooms = dict[str, dict[tuple[Interest, int], Audience]]


class Hub:
    def __init__(self, window: Window, *, buffer_events: int, buffer_bytes: int) -> None:
        self.window = window
        self._buffer_events = buffer_events
        self._buffer_bytes = buffer_bytes
        self._tenants: dict[str, _Rooms] = {}
        self._subscribers: set[Subscriber] = set()
        self._ahead: list[tuple[Position, asyncio.Future[None]]] = []
        self._closed = False
        self.slow = 0
        """Subscribers let go because they did not read, since the start."""

    def __len__(self) -> int:
        return len(self._subscribers)

    async def reached(self, position: Position, *, within: float) -> None:
        """Waits until the log has been read as far as `position`, at most `within` seconds: the other instance that
        gave a cursor may be a few milliseconds ahead of this one."""
        if position <= self.window.present:
            return
        waiter = position, asyncio.get_running_loop().create_future()
        self._ahead.append(waiter)
        await asyncio.wait((waiter[1],), timeout=within)
        if waiter in self._ahead:
            self._ahead.remove(waiter)

    # -- coming and going ----------------------------------------------------------------------------------------

    def subscribe(self, interest: Interest, form: Form, cursor: Cursor | None) -> Subscriber:
        """From `cursor` on, or from now on. The transport then calls `replay` until it returns None."""
        subscriber = Subscriber(Audience(interest, form), cursor)
        if self._closed:
            subscriber.end()
        else:
            self._subscribers.add(subscriber)
            if cursor is None:
                self._join(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """May be called twice."""
        self._subscribers.discard(subscriber)
        subscriber.end()
        audience = subscriber.audience
        rooms = self._tenants.get(audience.interest.tenant, {})
        audience.live.discard(subscriber)
        key = (audience.interest, id(audience.form))
        room = rooms.get(audience.room, {})
        if not audience.live and room.get(key) is audience:
            del room[key]
            if not room:
                del rooms[audience.room]
            if not rooms:
                del self._tenants[audience.interest.tenant]

    def replay(self, subscriber: Subscriber) -> bytes | None:
        """The next piece of what the subscriber has missed (perhaps empty), or None: it is live from here on."""
        cursor, window, audience = subscriber.position, self.window, subscriber.audience
        if cursor is None or subscriber.ended:
            return None
        reason = "other_epoch" if cursor.epoch != window.epoch or cursor.position > window.present else ""
        if not reason and not window.holds_all_after(cursor.position):
            reason = "too_old"
        if reason:
            self._join(subscriber)
            return audience.form.resync(reason, window.cursor)
        missed = window.after(audience.interest.tenant, cursor.position, _REPLAY_STEP)
        if not missed:
            self._join(subscriber)
            return None
        subscriber.position = Cursor(cursor.epoch, missed[-1].position)
        return b"".join(audience.frames(missed, cursor.epoch))

    def _join(self, subscriber: Subscriber) -> None:
        """No await between finding that nothing was missed and this."""
        wanted = subscriber.audience
        rooms = self._tenants.setdefault(wanted.interest.tenant, {})
        room = rooms.setdefault(wanted.room, {})
        subscriber.audience = room.setdefault((wanted.interest, id(wanted.form)), wanted)
        subscriber.audience.live.add(subscriber)
        subscriber.position = None

    # -- what happens to all -------------------------------------------------------------------------------------

    def publish(self, events: Sequence[PushEvent], upto: Position, at: float) -> None:
        """What has been read from the log, in its order; `upto` is where it ends, `at` the time on a steady clock."""
        new = self.window.add(events, upto, at)
        for waiter in [waiter for waiter in self._ahead if waiter[0] <= upto]:
            self._ahead.remove(waiter)
            waiter[1].set_result(None)
        by_room: dict[tuple[str, str], list[PushEvent]] = {}
        for event in new:
            rooms = self._tenants.get(event.tenant)
            if rooms is None:
                continue
            for room in ("", f"order:{event.order_id}", f"session:{event.session_id}"):
                if room in rooms:
                    by_room.setdefault((event.tenant, room), []).append(event)
        slow: list[Subscriber] = []
        for (tenant, room), theirs in by_room.items():
            for audience in self._tenants[tenant][room].values():
                frames = audience.frames(theirs, self.window.epoch or "")
                if frames:
                    slow += self._spread(audience, b"".join(frames), len(frames))
        for subscriber in slow:
            self._let_go_slow(subscriber)

    def listeners(self, event: PushEvent) -> int:
        """How many live subscribers hear of it; for traces, of a few events."""
        rooms = self._tenants.get(event.tenant, {})
        return sum(
            len(audience.live)
            for room in ("", f"order:{event.order_id}", f"session:{event.session_id}")
            for audience in rooms.get(room, {}).values()
            if audience.interest.wants(event)
        )

    def _spread(self, audience: Audience, chunk: bytes, events: int) -> list[Subscriber]:
        most_events, most_bytes = self._buffer_events, self._buffer_bytes
        slow = []
        for subscriber in audience.live:
            # A single large batch never makes a client slow: what counts is what it has left lying.
            if subscriber.idle or subscriber.fits(most_events - events, most_bytes - len(chunk)):
                subscriber.put(chunk, events)
            else:
                slow.append(subscriber)
        return slow

    def _let_go_slow(self, subscriber: Subscriber) -> None:
        self.slow += 1
        subscriber.clear()
        subscriber.put(subscriber.audience.form.resync("slow", self.window.cursor), 1)
        log.info("slow_subscriber", restaurant_id=subscriber.audience.interest.tenant)
        self._end(subscriber)

    def begin(self, epoch: str | None, first_offset: int) -> None:
        """Another log: nothing that was sent, waits or was remembered can be continued."""
        self.window.begin(epoch, first_offset)
        for subscriber in self._subscribers:
            # Those in a replay see by themselves that their epoch is over.
            if subscriber.position is None:
                subscriber.put(subscriber.audience.form.resync("other_epoch", self.window.cursor), 1)

    def beat(self) -> None:
        """A sign of life for those that have nothing waiting. It carries the cursor, so that whoever filters a lot can
        still resume after hours of silence."""
        beats: dict[int, bytes] = {}
        for subscriber in self._subscribers:
            if subscriber.position is None and subscriber.idle:
                form = subscriber.audience.form
                beat = beats.get(id(form)) or beats.setdefault(id(form), form.heartbeat(self.window.cursor))
                subscriber.put(beat, 0)

    def close(self) -> None:
        """Ends every stream, and all that come later. May be called twice."""
        self._closed = True
        for subscriber in list(self._subscribers):
            self._end(subscriber)

    def _end(self, subscriber: Subscriber) -> None:
        self.unsubscribe(subscriber)
        if subscriber.task is not None:
            # Its client may never read again; then the writing is cut, or it would hold the process at shutdown.
            asyncio.get_running_loop().call_later(_FAREWELL, _cut, subscriber)


def _cut(subscriber: Subscriber) -> None:
    if subscriber.task is not None:
        log.info("cut", restaurant_id=subscriber.audience.interest.tenant)
        subscriber.task.cancel()
