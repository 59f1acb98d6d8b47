"""Reads a log (the stream `changes.log.v1`, or the reference log) in order, as long as the caller wants.

Guarantee: entries come in the order of their offsets, each once within a process, through any number of lost
connections. A reader that starts from a position (position.py) continues with the next entry. Each time it attaches
there, it first compares the message at that offset with the position. If the log does not prove the position, then the
reader goes back: to the newest of the caller's older positions that the log proves, or else to the first entry. It
sets `LogBatch.broken` once. The caller then receives entries again that it had, and entries in place of lost ones.

| found at the offset of the position              | meaning                                                   |
|--------------------------------------------------|-----------------------------------------------------------|
| the same message                                 | nothing before it was lost                                |
| another message, or a new mark below this offset | truncated: the log lost its end, or was created again     |
| nothing, and the next message has a later offset | expired: the retention has removed the message            |

Caught up: each time the reader attaches to the stream, it publishes a mark to the log. The batch with that mark has
`caught_up` set: the caller has received everything that was in the log when the reader attached. After a time without
messages the reader publishes another mark. If that mark does not come back, the connection is dead, and the reader
attaches again.

Memory: a batch has at most 4 MiB of bodies, or one larger message. If messages are large, so that more than 8 MiB wait
for the caller, the reader drops what arrives then, attaches again and asks for fewer messages at once.

While the broker is unavailable, the reader waits and tries again, with jittered backoff.

Shutdown: leave the loop. With `contextlib.aclosing` the connection is closed at once.

Traps that shaped this module: one task per delivery would lose the order, so the callback only enqueues. A queue
iterator sends a nack when its loop is left, and a stream replies by closing the connection. Offsets have gaps, so `+1`
does not detect a lost entry. If a stream is deleted, its consumers end but their channels stay open. RabbitMQ accepts
an offset that does not exist, without an error, and then waits until the log has grown beyond it.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import uuid4

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aiormq.channel import Channel

from shared.backoff import backoff
from shared.entities.contract import BrokenContract, now
from shared.entities.signal import HEARTBEAT, MARK, Signal, encode_signal, signal_in
from shared.messaging.hosts import Connect, Hosts, close_connection
from shared.messaging.position import LogPosition, checksum
from shared.messaging.publisher import BROKEN_LINK, closed_channel_as_connection_error
from shared.messaging.topology import LOG

log = structlog.get_logger(__name__)

Start = LogPosition | datetime | str
"""A position, a time, "first" or "next"."""
Reason = Literal["truncated", "expired"]

PREFETCH_MESSAGES = 256
MAX_BATCH_BYTES = 4 << 20
"""The maximum size of the bodies in a batch, unless it has only one message."""
_MAX_WAITING_BYTES = 8 << 20
"""The maximum size of the bodies that wait for the caller, apart from the last one that arrived."""
_FEW_MESSAGES_SECONDS = 60.0
"""After large messages, the reader asks for few messages at once for this time."""
_MARK_TIMEOUT_SECONDS = 5.0
"""The time within which a confirmed mark must come back. It is long enough for a cold disk."""
_ATTACH_TIMEOUT_SECONDS = 10.0
_CLOSE_TIMEOUT_SECONDS = 1.0
_CHECK_CONSUMER_INTERVAL_SECONDS = 0.5
"""A deleted stream ends its consumer silently, so the reader checks that its consumer exists."""
# A smaller batch shows that the reader had received everything that the log had.
_AT_END_MESSAGES = 64
_AT_END_BYTES = 1 << 20
_MAX_SIGNAL_BYTES = 1_000
"""The maximum size of a signal. The reader does not look for a signal in a longer body."""


@dataclass(frozen=True)
class LogEntry:
    position: LogPosition
    lane: str
    body: bytes

    @property
    def offset(self) -> int:
        return self.position.offset


@dataclass(frozen=True)
class LogHeartbeat:
    offset: int
    id: str
    lane: str
    sent_at: datetime
    """On the clock of the sender. Of two heartbeats, the one with the larger offset is newer."""


@dataclass(frozen=True)
class BrokenPosition:
    """A position that the log does not prove."""

    reason: Reason
    position: LogPosition
    back_to: Start
    """The place where the reader continues: one of the caller's older positions, or "first"."""


@dataclass(frozen=True)
class LogBatch:
    """Entries of the log without its signals, and the heartbeats between them in the order of the log."""

    entries: list[LogEntry]
    heartbeats: list[LogHeartbeat]
    caught_up: bool
    positions: list[LogPosition]
    """The positions of all messages, signals too; at least one."""
    at_end: float | None = None
    """The monotonic time at which the reader had received the whole log; None if more may follow at once."""
    broken: BrokenPosition | None = None
    """Set in the first batch after the reader went back. This batch begins after `broken.back_to`."""

    @property
    def last(self) -> LogPosition:
        """The position of a reader that has this batch."""
        return self.positions[-1]


Fallbacks = Callable[[], Awaitable[Sequence[Start]]]
"""Returns where a reader may continue instead of a broken position, the best one first. A position in it counts only if
the log proves it."""


async def _no_fallbacks() -> Sequence[Start]:
    return ()


class _Broken(Exception):
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class LogReader:
    def __init__(
        self,
        url: str,
        *,
        name: str,
        idle_seconds: float,
        stream: str = LOG,
        prefetch: int = PREFETCH_MESSAGES,
        connect: Connect = aio_pika.connect,
    ) -> None:
        """`idle_seconds`: after this time without an entry, the reader checks its connection with a mark; heartbeats
        come every few seconds. `prefetch`: the maximum number of unacknowledged messages. `connect`: opens a
        connection to one node."""
        self._hosts = Hosts(url, connect=connect)
        self._name = name
        self._stream = stream
        self._idle = idle_seconds
        self._max_prefetch = self._prefetch = prefetch
        self._few_until = 0.0
        """The end of the time with a smaller prefetch, on the clock of the event loop."""
        self._broken: BrokenPosition | None = None
        self.heartbeat_at: datetime | None = None
        self.connected = False
        self.caught_up = False
        """True after the caller has received everything that was in the log when this connection was made."""

    async def read(self, start: Start, *, fallbacks: Fallbacks = _no_fallbacks) -> AsyncGenerator[LogBatch, None]:
        """Yields batches from `start` on, without end. `fallbacks` is called when the log does not prove the position
        of the reader; its errors pass through."""
        self._broken = None
        starts: list[Start] = [start]
        attempt = 0
        try:
            while True:
                try:
                    async with aclosing(self._attached(starts[0])) as batches:
                        async for batch in batches:
                            attempt = 0
                            yield batch
                            starts = [batch.last]
                            self.caught_up = self.caught_up or batch.caught_up
                except _Broken as broken:
                    self.caught_up = False
                    starts = await self._go_back(broken.reason, starts, fallbacks)
                except BROKEN_LINK as error:
                    self.connected = self.caught_up = False
                    attempt += 1
                    log.warning(
                        "log_unavailable", reader=self._name, error=str(error) or type(error).__name__, attempt=attempt
                    )
                    self._hosts.turn()
                    await asyncio.sleep(backoff(attempt))
        finally:
            self.connected = self.caught_up = False

    async def _go_back(self, reason: Reason, starts: list[Start], fallbacks: Fallbacks) -> list[Start]:
        """Returns the remaining starts to try, after the log did not prove the first of `starts`."""
        position, *others = starts
        assert isinstance(position, LogPosition)
        if self._broken is None:
            others = [*await fallbacks(), "first"]
        else:  # a fallback is not proved either
            reason, position = self._broken.reason, self._broken.position
        self._broken = BrokenPosition(reason, position, others[0])
        log.warning("log_position_broken", reader=self._name, reason=reason, position=position, back_to=str(others[0]))
        return others

    # -- one connection ------------------------------------------------------------------------------------------

    async def _attached(self, start: Start) -> AsyncGenerator[LogBatch, None]:
        """Yields batches until the prefetch changes. Raises `_Broken` or one of BROKEN_LINK."""
        async with self._attach(start) as connection:
            self.connected = True
            if isinstance(start, LogPosition):
                await connection.skip(start)
            timeout_seconds = _MARK_TIMEOUT_SECONDS
            while True:
                try:
                    messages = await connection.next(timeout_seconds)
                except TimeoutError:
                    await connection.publish_mark()
                    messages = await connection.next(_MARK_TIMEOUT_SECONDS)
                timeout_seconds = self._idle
                if not messages:
                    self._read_fewer(connection.overfull_messages)
                    return
                yield self._batch(messages, connection.mark)
                if not connection.overfull_messages:
                    # This acknowledgement must come after the `yield`, because its failure would lose the batch. On a
                    # stream, it only lets the broker send more messages.
                    await messages[-1].ack(multiple=True)
                if self._prefetch < self._max_prefetch and asyncio.get_running_loop().time() > self._few_until:
                    self._prefetch = self._max_prefetch
                    return

    def _read_fewer(self, waiting: int) -> None:
        """Reduces the prefetch of the next connections. `waiting`: the number of messages that were too large
        together."""
        self._prefetch = max(1, min(self._prefetch, waiting) // 2)
        self._few_until = asyncio.get_running_loop().time() + _FEW_MESSAGES_SECONDS
        log.info("log_messages_large", reader=self._name, prefetch=self._prefetch)

    def _batch(self, messages: list[AbstractIncomingMessage], mark: str) -> LogBatch:
        entries: list[LogEntry] = []
        heartbeats: list[LogHeartbeat] = []
        positions: list[LogPosition] = []
        caught_up = False
        for message in messages:
            positions.append(_position(message))
            signal = _signal(message.body)
            if signal is None:
                entries.append(LogEntry(positions[-1], message.routing_key or "", message.body))
            elif signal.type == HEARTBEAT:
                heartbeats.append(LogHeartbeat(positions[-1].offset, signal.id, signal.lane, signal.time))
                self.heartbeat_at = signal.time
            else:
                caught_up = caught_up or signal.id == mark
        broken, self._broken = self._broken, None
        few = len(messages) < _AT_END_MESSAGES and sum(len(entry.body) for entry in entries) < _AT_END_BYTES
        return LogBatch(entries, heartbeats, caught_up, positions, time.monotonic() if few else None, broken)

    @asynccontextmanager
    async def _attach(self, start: Start) -> "AsyncIterator[_LogConnection]":
        connection = await self._hosts.connect()
        try:
            with closed_channel_as_connection_error():
                log_connection = _LogConnection(connection, self._stream, self._name, self._prefetch)
                async with asyncio.timeout(_ATTACH_TIMEOUT_SECONDS):
                    await log_connection.open(start)
                yield log_connection
        finally:
            await close_connection(connection, timeout=_CLOSE_TIMEOUT_SECONDS)


class _LogConnection:
    """One consumer on a connection of its own, and a channel for marks."""

    def __init__(self, connection: AbstractConnection, stream: str, name: str, prefetch: int) -> None:
        self._connection = connection
        self._stream = stream
        self._name = name
        self.prefetch = prefetch
        self.overfull_messages = 0
        """The number of messages that waited when they became too large. Later ones are dropped; 0 until then."""
        self._waiting: deque[AbstractIncomingMessage] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._changed = asyncio.Event()
        self._marks: AbstractChannel
        self.mark = ""
        """The id of the first mark. The entries before this mark were in the log when the reader attached."""

    async def open(self, start: Start) -> None:
        """Attaches at `start`, and publishes the mark. Raises `_Broken` if the log ends before that position."""
        channel = await self._connection.channel()
        await channel.set_qos(prefetch_count=self.prefetch)
        self._connection.close_callbacks.add(self._close)
        channel.close_callbacks.add(self._close)
        stream = await channel.get_queue(self._stream, ensure=False)
        offset = start.offset if isinstance(start, LogPosition) else start
        self._tag = await stream.consume(self._arrive, arguments={"x-stream-offset": offset})
        underlay = await channel.get_underlay_channel()
        assert isinstance(underlay, Channel)
        self._consumers = underlay.consumers
        # Marks use a separate channel, because a returned mark must not close the consumer.
        self._marks = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        if isinstance(start, LogPosition):
            if await self._end() <= start.offset:
                raise _Broken("truncated")
        else:
            self.mark = await self.publish_mark()

    def _close(self, *_: object) -> None:
        self._closed = True
        self._changed.set()

    async def _arrive(self, message: AbstractIncomingMessage) -> None:
        if self.overfull_messages:
            return  # the next connection reads it again
        self._waiting.append(message)
        self._waiting_bytes += len(message.body)
        # Two messages may always wait, so that a connection which skips its first message still makes progress.
        if self._waiting_bytes > _MAX_WAITING_BYTES and len(self._waiting) > 2:
            self.overfull_messages = len(self._waiting)
        self._changed.set()

    async def _end(self) -> int:
        """Publishes the first mark and returns its offset, which a second consumer finds. The first consumer may wait
        behind the end of the log."""
        async with self._connection.channel() as channel:
            await channel.set_qos(prefetch_count=PREFETCH_MESSAGES)
            arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
            stream = await channel.get_queue(self._stream, ensure=False)
            await stream.consume(arrived.put, arguments={"x-stream-offset": "next"})
            self.mark = await self.publish_mark()
            async with asyncio.timeout(_MARK_TIMEOUT_SECONDS):
                while True:
                    message = await arrived.get()
                    signal = _signal(message.body)
                    if signal is not None and signal.id == self.mark:
                        return _position(message).offset
                    await message.ack()

    async def skip(self, start: LogPosition) -> None:
        """Takes the message at `start`. Raises `_Broken` if another message comes first."""
        await self._wait(_MARK_TIMEOUT_SECONDS)
        found = self._take()
        position = _position(found)
        if position != start:
            raise _Broken("expired" if position.offset > start.offset else "truncated")
        await found.ack()

    async def publish_mark(self) -> str:
        mark = Signal(id=str(uuid4()), type=MARK, time=now(), source=self._name)
        message = aio_pika.Message(encode_signal(mark), message_id=mark.id, delivery_mode=2)
        await self._marks.default_exchange.publish(message, self._stream, mandatory=True, timeout=_MARK_TIMEOUT_SECONDS)
        return mark.id

    async def next(self, timeout_seconds: float) -> list[AbstractIncomingMessage]:
        """Returns at least one message, and further messages that have arrived, up to MAX_BATCH_BYTES and to half of
        the prefetch. Meanwhile the broker can send the other half. Returns nothing if messages were dropped and none is
        left. Raises TimeoutError if no message comes in time, and ConnectionError if the connection is lost."""
        await self._wait(timeout_seconds)
        messages: list[AbstractIncomingMessage] = []
        size = 0
        while self._waiting and (not messages or (len(messages) + 1) * 2 <= self.prefetch):
            size += len(self._waiting[0].body)
            if messages and size > MAX_BATCH_BYTES:
                break
            messages.append(self._take())
        return messages

    def _take(self) -> AbstractIncomingMessage:
        message = self._waiting.popleft()
        self._waiting_bytes -= len(message.body)
        return message

    async def _wait(self, timeout_seconds: float) -> None:
        """Returns when a message waits, or when messages were dropped."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while not self._waiting and not self.overfull_messages:
            if self._closed:
                raise ConnectionError("the broker closed the channel")
            left = deadline - loop.time()
            self._changed.clear()
            try:
                async with asyncio.timeout(min(_CHECK_CONSUMER_INTERVAL_SECONDS, left)):
                    await self._changed.wait()
            except TimeoutError:
                if self._tag not in self._consumers:
                    raise ConnectionError("the stream was deleted") from None
                if left <= _CHECK_CONSUMER_INTERVAL_SECONDS:
                    raise


def _position(message: AbstractIncomingMessage) -> LogPosition:
    offset = message.headers["x-stream-offset"]
    assert isinstance(offset, int)
    return LogPosition(offset, checksum(message.body, message.message_id))


def _signal(body: bytes) -> Signal | None:
    """Returns the signal in a message, or None if it contains none. A signal is always the only
    event of its message."""
    if len(body) > _MAX_SIGNAL_BYTES:
        return None
    try:
        return signal_in(body[1:-1])
    except BrokenContract as error:
        log.error("log_broken_signal", error=str(error))
        return None
