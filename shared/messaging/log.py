"""Reads a log (the stream `changes.log.v1`, or the reference log) in order, as long as the caller wants.

Guarantee: entries come in the order of their offsets, each once within a process, through any number of lost
connections. A reader that starts from a remembered offset receives the entry at that offset once more. The reader
starts at the first entry and sets `LogBatch.restarted` once in two cases: the stream was deleted and created again (its
first heartbeat has another epoch), or the stream lost its end (the remembered offset does not exist). What the caller
built from the old log is then no longer valid.

Caught up: each time the reader attaches to the stream, it publishes a mark to the log. The batch with that mark has
`caught_up` set: the caller has received everything that was in the log when the reader attached. After a time without
messages the reader publishes another mark. If that mark does not come back, the connection is dead, and the reader
attaches again.

While the broker is unavailable, the reader waits and tries again, with jittered backoff.

Shutdown: leave the loop. With `contextlib.aclosing` the connection is closed at once.

Traps that shaped this module: one task per delivery would lose the order, so the callback only enqueues. A queue
iterator sends a nack when its loop is left, and a stream replies by closing the connection. Offsets have gaps, so `+1`
does not detect a lost entry. If a stream is deleted, its consumers end but their channels stay open. RabbitMQ accepts
an offset that does not exist, without an error.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from uuid import uuid4

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aiormq.channel import Channel

from shared.backoff import backoff
from shared.entities.contract import BrokenContract, now
from shared.entities.signal import HEARTBEAT, MARK, Signal, encode_signal, signal_in
from shared.messaging.hosts import Connect, Hosts
from shared.messaging.publisher import BROKEN_LINK, closed_channel_as_connection_error
from shared.messaging.topology import LOG

log = structlog.get_logger(__name__)

Start = int | datetime | str
"""An offset, a time, "first" or "next"."""

_MARK_TIMEOUT_SECONDS = 5.0
"""The time within which a confirmed mark must come back. It is long enough for a cold disk."""
_ATTACH_TIMEOUT_SECONDS = 10.0
_CLOSE_TIMEOUT_SECONDS = 1.0
_CHECK_CONSUMER_INTERVAL_SECONDS = 0.5
"""A deleted stream ends its consumer silently, so the reader checks that its consumer exists."""
_MAX_SIGNAL_BYTES = 1_000
"""The maximum size of a signal. The reader does not look for a signal in a longer body."""


@dataclass(frozen=True)
class LogEntry:
    offset: int
    lane: str
    body: bytes


@dataclass(frozen=True)
class LogBatch:
    """Entries of the log without its signals. `epoch`, `heartbeats` and `caught_up` come from the signals."""

    entries: list[LogEntry]
    epoch: str | None
    """The epoch of the log; None only if the log has never had a heartbeat."""
    heartbeats: dict[str, datetime]
    """Maps a lane to the time when its heartbeat in this batch was sent."""
    caught_up: bool
    last_offset: int
    first_offset: int = 0
    restarted: bool = False
    """True for the first batch after the log was replaced. This batch starts at the first entry of the new log."""
    heartbeat_offsets: dict[str, int] = field(default_factory=dict)
    """Maps a lane to the offset of its heartbeat in this batch."""


class _ForeignHeartbeat(Exception):
    def __init__(self, epoch: str) -> None:
        self.epoch = epoch


class _NoSuchOffset(Exception):
    """The offset to resume from does not exist, or the broker is very slow."""


class LogReader:
    def __init__(
        self,
        url: str,
        *,
        name: str,
        idle_seconds: float,
        stream: str = LOG,
        prefetch: int = 1_000,
        connect: Connect = aio_pika.connect,
    ) -> None:
        """`idle_seconds`: after this time without an entry, the reader checks its connection with a mark; heartbeats
        come every few seconds. `prefetch`: the maximum number of unacknowledged messages. `connect`: opens a
        connection to one node."""
        self._hosts = Hosts(url, connect=connect)
        self._name = name
        self._stream = stream
        self._idle = idle_seconds
        self._prefetch = prefetch
        self._last: int | None = None
        self._other_epochs: set[str] = set()
        self._restarted = False
        self.epoch: str | None = None
        self.heartbeat_at: datetime | None = None
        self.connected = False
        self.caught_up = False
        """True after the caller has received everything that was in the log when this connection was made."""

    async def read(self, start: Start, *, epoch: str | None = None) -> AsyncGenerator[LogBatch, None]:
        """Yields batches from `start` on, without end. `epoch`: the epoch of the log to which an offset `start`
        belongs."""
        self._last, self.epoch, self._restarted, self._other_epochs = None, epoch, False, set()
        attempt = 0
        missing = False
        while True:
            try:
                start, missing = await self._verify(start, missing=missing), False
                async with aclosing(self._attached(start)) as batches:
                    async for batch in batches:
                        attempt = 0
                        yield batch
                        start = batch.last_offset
                        self.caught_up = self.caught_up or batch.caught_up
            except _ForeignHeartbeat as heartbeat:
                self._other_epochs.add(heartbeat.epoch)
            except _NoSuchOffset:
                missing = True
            except BROKEN_LINK as error:
                attempt += 1
                log.warning(
                    "log_unavailable", reader=self._name, error=str(error) or type(error).__name__, attempt=attempt
                )
                self._hosts.turn()
                await asyncio.sleep(backoff(attempt))
            finally:
                self.connected = self.caught_up = False

    # -- the check for the known log -----------------------------------------------------------------------------

    async def _verify(self, start: Start, *, missing: bool) -> Start:
        """Returns the position to start at. Every attach calls it first, because an offset of one log means nothing in
        another. The epoch of the first heartbeat identifies the log. A later heartbeat with an old epoch, from a worker
        that does not know the new epoch, is ignored."""
        found = await self.first_epoch()
        known, self.epoch = self.epoch, found or self.epoch
        other = found is not None and known is not None and found != known
        if not other and not (missing and isinstance(start, int) and await self._end() <= start):
            return start
        if known is not None:
            self._other_epochs.add(known)
        self._other_epochs.discard(self.epoch or "")
        self._last, self._restarted = None, True
        log.warning("log_restarted", reader=self._name, epoch=self.epoch, known=known, start=str(start))
        return "first"

    async def first_epoch(self) -> str | None:
        """Returns the epoch of the first heartbeat, or None if the log has no heartbeat. `migrate` publishes one as the
        first entry. If retention has removed it, the first heartbeat is at most a few seconds younger than the first
        entry."""
        async with self._attach("first") as connection:
            while True:
                for message in await connection.next(_MARK_TIMEOUT_SECONDS):
                    signal = _signal(message.body)
                    if signal is not None and signal.type == HEARTBEAT and signal.epoch:
                        return signal.epoch
                    if signal is not None and signal.id == connection.mark:
                        return None
                await message.ack(multiple=True)

    async def _end(self) -> int:
        async with self._attach("next") as connection:
            return _offset((await connection.next(_MARK_TIMEOUT_SECONDS))[0])

    # -- one connection ------------------------------------------------------------------------------------------

    async def _attached(self, start: Start) -> AsyncGenerator[LogBatch, None]:
        async with self._attach(start) as connection:
            self.connected = True
            try:
                messages = await connection.next(_MARK_TIMEOUT_SECONDS)
            except TimeoutError as error:
                raise _NoSuchOffset from error
            if isinstance(start, int) and _offset(messages[0]) < start:
                raise _NoSuchOffset
            while True:
                yield self._batch(messages, connection.mark)
                # This acknowledgement must come after the `yield`, because its failure would lose the batch. On a
                # stream, it only lets the broker send more messages.
                await messages[-1].ack(multiple=True)
                try:
                    messages = await connection.next(self._idle)
                except TimeoutError:
                    await connection.publish_mark()
                    messages = await connection.next(_MARK_TIMEOUT_SECONDS)

    def _batch(self, messages: list[AbstractIncomingMessage], mark: str) -> LogBatch:
        entries: list[LogEntry] = []
        heartbeats: dict[str, datetime] = {}
        heartbeat_offsets: dict[str, int] = {}
        caught_up = False
        for message in messages:
            signal = _signal(message.body)
            if signal is None:
                offset = _offset(message)
                if self._last is None or offset > self._last:
                    entries.append(LogEntry(offset, message.routing_key or "", message.body))
            elif signal.type == HEARTBEAT:
                self._note(signal)
                heartbeats[signal.lane], heartbeat_offsets[signal.lane] = signal.time, _offset(message)
            else:
                caught_up = caught_up or signal.id == mark
        # This comes last. If the code above raises, the caller gets none of these messages, and the reader reads all of
        # them again.
        self._last = max(_offset(messages[-1]), -1 if self._last is None else self._last)
        restarted, self._restarted = self._restarted, False
        return LogBatch(
            entries, self.epoch, heartbeats, caught_up, self._last, _offset(messages[0]), restarted, heartbeat_offsets
        )

    def _note(self, heartbeat: Signal) -> None:
        if heartbeat.epoch != self.epoch and heartbeat.epoch not in self._other_epochs:
            if self.epoch is not None:
                raise _ForeignHeartbeat(heartbeat.epoch)
            self.epoch = heartbeat.epoch
        if heartbeat.epoch == self.epoch:
            self.heartbeat_at = heartbeat.time

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
            try:
                with closed_channel_as_connection_error():
                    async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                        await connection.close()
            except BROKEN_LINK as error:
                log.debug("log_close", reader=self._name, error=str(error) or type(error).__name__)


class _LogConnection:
    """One consumer on a connection of its own, and a channel for marks."""

    def __init__(self, connection: AbstractConnection, stream: str, name: str, prefetch: int) -> None:
        self._connection = connection
        self._stream = stream
        self._name = name
        self._prefetch = prefetch
        self._arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        self._marks: AbstractChannel
        self.mark = ""
        """The id of the first mark. The entries before this mark were in the log when the reader attached."""

    async def open(self, start: Start) -> None:
        channel = await self._connection.channel()
        await channel.set_qos(prefetch_count=self._prefetch)
        self._connection.close_callbacks.add(lambda *_: self._arrived.put_nowait(None))
        channel.close_callbacks.add(lambda *_: self._arrived.put_nowait(None))

        async def arrive(message: AbstractIncomingMessage) -> None:
            self._arrived.put_nowait(message)

        stream = await channel.get_queue(self._stream, ensure=False)
        self._tag = await stream.consume(arrive, arguments={"x-stream-offset": start})
        underlay = await channel.get_underlay_channel()
        assert isinstance(underlay, Channel)
        self._consumers = underlay.consumers
        # Marks use a separate channel, because a returned mark must not close the consumer.
        self._marks = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self.mark = await self.publish_mark()

    async def publish_mark(self) -> str:
        mark = Signal(id=str(uuid4()), type=MARK, time=now(), source=self._name)
        message = aio_pika.Message(encode_signal(mark), message_id=mark.id, delivery_mode=2)
        await self._marks.default_exchange.publish(message, self._stream, mandatory=True, timeout=_MARK_TIMEOUT_SECONDS)
        return mark.id

    async def next(self, timeout_seconds: float) -> list[AbstractIncomingMessage]:
        """Returns at least one message, and further messages that have arrived, up to half of the prefetch. Meanwhile
        the broker can send the other half. Raises TimeoutError if no message comes in time, and ConnectionError if the
        connection is lost."""
        first = await self._first(timeout_seconds)
        messages: list[AbstractIncomingMessage] = []
        while first is not None:
            messages.append(first)
            if self._arrived.empty() or len(messages) * 2 >= self._prefetch:
                return messages
            first = self._arrived.get_nowait()
        self._arrived.put_nowait(None)  # keeps the end in the queue, so that the next call raises the error
        if messages:
            return messages
        raise ConnectionError("the broker closed the channel")

    async def _first(self, timeout_seconds: float) -> AbstractIncomingMessage | None:
        if not self._arrived.empty():
            return self._arrived.get_nowait()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while True:
            left = deadline - loop.time()
            try:
                async with asyncio.timeout(min(_CHECK_CONSUMER_INTERVAL_SECONDS, left)):
                    return await self._arrived.get()
            except TimeoutError:
                if self._tag not in self._consumers:
                    raise ConnectionError("the stream was deleted") from None
                if left <= _CHECK_CONSUMER_INTERVAL_SECONDS:
                    raise


def _offset(message: AbstractIncomingMessage) -> int:
    offset = message.headers["x-stream-offset"]
    assert isinstance(offset, int)
    return offset


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
