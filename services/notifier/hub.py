"""The hub distributes push events to subscribers.

Guarantees: a subscriber receives the events of its interest from its cursor on, in the order of the log, each change
once and without a gap. Where that is impossible (the cursor is older than the window, the log does not have its
message, or the buffer is full), it receives one `resync` with the reason; a slow subscriber is also disconnected. No
event reaches another tenant, because fan-out begins with the tenant.

Subscribers with the same interest form an audience. A batch of events is filtered, framed and joined once per audience;
each subscriber gets a reference to the bytes and one wake-up. The cost of an event therefore hardly grows with the
number of screens.

A subscriber that resumes reads the window at its own pace. It joins its audience in the same step of the event loop in
which it reaches the window's end, so that there is neither a gap nor a repetition between resumed and live events.

If the log has lost its end, live subscribers have received changes that it no longer has. They continue with the
entries in place of the lost ones. They miss nothing, but may receive a change again that comes into the log again.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import structlog
from msgspec import Struct

from services.notifier.cursor import Cursor
from services.notifier.events import PushEvent
from services.notifier.interest import Interest
from services.notifier.resume import missed_events
from services.notifier.window import Window
from shared.backoff import jittered
from shared.messaging.position import LogPosition

log = structlog.get_logger(__name__)

# A client that the hub disconnects has this much time to read its last bytes.
_LAST_READ_TIMEOUT_SECONDS = 2.0
_MAX_RESUME_STEP_EVENTS = 256
# Clients whose stream ended connect again after this time, jittered, so that they do not come all at once.
_RESTART_SECONDS = 2.0
_SLOW_SECONDS = 2.0


class Form(Struct, frozen=True):
    """The encoders of a transport. Each transport has one object, which is compared by identity."""

    event: Callable[[PushEvent, Interest], bytes]
    """Encodes (event, the interest of the subscriber)."""
    resync: Callable[[str, Cursor], bytes]
    keep_alive: Callable[[Cursor], bytes]
    closing: Callable[[str, float], bytes]
    """Encodes (reason, seconds after which the client may connect again). It carries no cursor, because a stream may
    end before the client has everything up to the present."""


class Subscriber:
    """The buffer of one client. Only the hub puts into it; the transport takes from it."""

    __slots__ = ("_bytes", "_chunks", "_events", "_waiter", "audience", "ended", "position", "task")

    def __init__(self, audience: "Audience", position: Cursor | None) -> None:
        self.audience = audience
        self.position = position
        """The cursor up to which the subscriber has resumed, or None if it is live."""
        self.ended = False
        """True if the hub has stopped adding to the buffer. The transport may still take from the buffer."""
        self.task: asyncio.Task[Any] | None = None
        """The task that writes to the client. The hub cancels it if the client does not read its last bytes."""
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
        """Empties the buffer and returns its content as one chunk."""
        if not self._chunks:
            return b""
        chunks, self._chunks = self._chunks, []
        self._events = self._bytes = 0
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def fits(self, max_events: int, max_bytes: int) -> bool:
        return self._events <= max_events and self._bytes <= max_bytes

    async def wait(self) -> None:
        """Waits until the buffer has a chunk or the subscription has ended. Only the transport may call this."""
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
    """The live subscribers with one interest on one transport."""

    __slots__ = ("form", "interest", "live")

    def __init__(self, interest: Interest, form: Form) -> None:
        self.interest = interest
        self.form = form
        self.live: set[Subscriber] = set()

    @property
    def room(self) -> str:
        """The hub's key for the audience: the narrowest property that an event must share with the interest."""
        if self.interest.order_id is not None:
            return f"order:{self.interest.order_id}"
        return "" if self.interest.session_id is None else f"session:{self.interest.session_id}"

    def frames(self, events: Iterable[PushEvent]) -> list[bytes]:
        return [self.form.event(event, self.interest) for event in events if self.interest.wants(event)]


_Rooms = dict[str, dict[tuple[Interest, int], Audience]]


class Hub:
    def __init__(self, window: Window, *, buffer_events: int, buffer_bytes: int) -> None:
        self.window = window
        self._buffer_events = buffer_events
        self._buffer_bytes = buffer_bytes
        self._tenants: dict[str, _Rooms] = {}
        self._subscribers: set[Subscriber] = set()
        self._ahead: list[tuple[Cursor, asyncio.Future[None]]] = []
        self._closed = False
        self.slow_count = 0
        """The number of subscribers that were disconnected since the start because they did not read."""

    def __len__(self) -> int:
        return len(self._subscribers)

    async def reached(self, cursor: Cursor, *, within: float) -> None:
        """Waits until the log has been read up to `cursor`, at most `within` seconds. The instance that issued a cursor
        may be a few milliseconds ahead of this one."""
        if cursor <= self.window.present:
            return
        waiter = cursor, asyncio.get_running_loop().create_future()
        self._ahead.append(waiter)
        await asyncio.wait((waiter[1],), timeout=within)
        if waiter in self._ahead:
            self._ahead.remove(waiter)

    def live_subscribers(self) -> dict[str, dict[str, int]]:
        """Returns the number of live subscribers by tenant and room (`Audience.room`). It is expensive, because it
        visits every audience."""
        return {
            tenant: {room: sum(len(one.live) for one in audiences.values()) for room, audiences in rooms.items()}
            for tenant, rooms in self._tenants.items()
        }

    # -- subscriptions -------------------------------------------------------------------------------------------

    def subscribe(self, interest: Interest, form: Form, cursor: Cursor | None) -> Subscriber:
        """Subscribes from `cursor`, or from now without one. The transport must call `resume` until it returns None."""
        subscriber = Subscriber(Audience(interest, form), cursor)
        if self._closed:
            subscriber.put(form.closing("restart", jittered(_RESTART_SECONDS)), 1)
            subscriber.end()
        else:
            self._subscribers.add(subscriber)
            if cursor is None:
                self._join(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Ends a subscription. May be called twice."""
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

    def resume(self, subscriber: Subscriber) -> bytes | None:
        """Returns the next part of the events that the subscriber missed, which may be empty. Returns None if the
        subscriber is live."""
        cursor, audience = subscriber.position, subscriber.audience
        if cursor is None or subscriber.ended:
            return None
        missed = missed_events(self.window, audience.interest.tenant, cursor, limit=_MAX_RESUME_STEP_EVENTS)
        if isinstance(missed, str):
            self._join(subscriber)
            return audience.form.resync(missed, self.window.present)
        if not missed:
            self._join(subscriber)
            return None
        subscriber.position = missed[-1].cursor
        return b"".join(audience.frames(missed))

    def _join(self, subscriber: Subscriber) -> None:
        """Makes a subscriber live. There must be no await between the check that it missed nothing and this call."""
        own = subscriber.audience
        rooms = self._tenants.setdefault(own.interest.tenant, {})
        room = rooms.setdefault(own.room, {})
        subscriber.audience = room.setdefault((own.interest, id(own.form)), own)
        subscriber.audience.live.add(subscriber)
        subscriber.position = None

    # -- fan-out -------------------------------------------------------------------------------------------------

    def publish(self, events: Sequence[PushEvent], positions: Sequence[LogPosition], upto: Cursor, at: float) -> None:
        """Distributes events in the order of the log. `positions`: of the messages that were read, with or without
        events. The log is read up to `upto`. `at` is in monotonic seconds."""
        new = self.window.add(events, positions, upto, at)
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
        for (tenant, room), room_events in by_room.items():
            for audience in self._tenants[tenant][room].values():
                frames = audience.frames(room_events)
                if frames:
                    slow += self._fan_out(audience, b"".join(frames), len(frames))
        for subscriber in slow:
            self._disconnect_slow(subscriber)

    def listeners(self, event: PushEvent) -> int:
        """Returns the number of live subscribers that get this event. It is expensive, so only traced events
        may call it."""
        rooms = self._tenants.get(event.tenant, {})
        return sum(
            len(audience.live)
            for room in ("", f"order:{event.order_id}", f"session:{event.session_id}")
            for audience in rooms.get(room, {}).values()
            if audience.interest.wants(event)
        )

    def _fan_out(self, audience: Audience, chunk: bytes, events: int) -> list[Subscriber]:
        max_events, max_bytes = self._buffer_events, self._buffer_bytes
        slow = []
        for subscriber in audience.live:
            # A client that has read everything gets even a batch that is larger than its buffer.
            if subscriber.idle or subscriber.fits(max_events - events, max_bytes - len(chunk)):
                subscriber.put(chunk, events)
            else:
                slow.append(subscriber)
        return slow

    def _disconnect_slow(self, subscriber: Subscriber) -> None:
        self.slow_count += 1
        subscriber.clear()
        subscriber.put(subscriber.audience.form.resync("slow", self.window.present), 1)
        log.info("slow_subscriber", restaurant_id=subscriber.audience.interest.tenant)
        self.end(subscriber, "slow", retry_after=jittered(_SLOW_SECONDS))

    def begin(self, first: LogPosition) -> None:
        """Starts the window, or starts it again on a log that has none of its messages. The log is read from `first`
        on. After the first messages are published, the caller must call `resync`."""
        self.window.begin(first)

    def resync(self, reason: str) -> None:
        """Tells every live subscriber to load its data again. One that is still resuming gets its resync from
        `resume`."""
        for subscriber in self._subscribers:
            if subscriber.position is None:
                subscriber.put(subscriber.audience.form.resync(reason, self.window.present), 1)

    def keep_alive(self) -> None:
        """Sends a keep-alive to idle subscribers. It carries the cursor, so that a subscriber with a narrow filter can
        resume after hours without an event."""
        encoded: dict[int, bytes] = {}
        for subscriber in self._subscribers:
            if subscriber.position is None and subscriber.idle:
                form = subscriber.audience.form
                chunk = encoded.get(id(form)) or encoded.setdefault(id(form), form.keep_alive(self.window.present))
                subscriber.put(chunk, 0)

    def close(self) -> None:
        """Ends every stream. Later subscriptions end at once. May be called twice."""
        self._closed = True
        for subscriber in list(self._subscribers):
            self.end(subscriber, "restart", retry_after=jittered(_RESTART_SECONDS))

    def end(self, subscriber: Subscriber, reason: str, *, retry_after: float = 0.0, discard: bool = False) -> None:
        """Ends a stream; its last event is `closing`. `discard` drops the events that wait for the client."""
        if subscriber.ended:
            return
        if discard:
            subscriber.clear()
        subscriber.put(subscriber.audience.form.closing(reason, retry_after), 1)
        self.unsubscribe(subscriber)
        if subscriber.task is not None:
            # A client that never reads again would delay the shutdown, so its writing task is cancelled.
            asyncio.get_running_loop().call_later(_LAST_READ_TIMEOUT_SECONDS, _cancel_writing, subscriber)


def _cancel_writing(subscriber: Subscriber) -> None:
    if subscriber.task is not None:
        log.info("subscriber_writing_cancelled", restaurant_id=subscriber.audience.interest.tenant)
        subscriber.task.cancel()
