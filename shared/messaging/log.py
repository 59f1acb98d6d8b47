"""Reading a log (the stream `changes.log.v1`, or the one without orders) in order, for as long as the caller wants.

Guarantee: entries come in order of their offset, each once within a process, through any number of lost connections; a
reader that starts from a remembered offset gets the entry of that offset once more. When the stream was deleted and
made again (its first heartbeat carries another epoch), or lost its end (the remembered offset does not exist), the
reader begins at its first entry and says so once, by `Batch.restarted`: what the caller built from the old log is void.

At every attach the reader puts a mark of its own into the log; the batch with that mark is `caught_up`: everything that
stood in the log at the attach has been handed out. After a silence it puts in another: one that does not come back
means that the link is dead, and it attaches anew.

While the broker or the stream is away the reader waits and tries again, with jittered back-off. At shutdown leave the
loop; with `contextlib.aclosing` the connection is closed at once.

Traps that shaped it: one task per delivery loses the order, so the callback only enqueues; a queue iterator nacks when
it is left, which a stream answers by closing the connection; offsets have holes, so `+1` is no check for a gap; a
stream that is deleted ends its consumers without closing their channel; a consumer may ask for an offset that does not
exist and gets no error.
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
from shared.messaging.hosts import Hosts
from shared.messaging.publisher import BROKEN_LINK, closed_under_us
from shared.messaging.topology import LOG

log = structlog.get_logger(__name__)

Start = int | datetime | str
"""An offset, a time, "first" or "next"."""

# Seconds until a mark, which the broker has confirmed, must have come back; generous to a cold disk.
_MARK_RETURNS = 5.0
# A deleted stream ends its consumer without a word: looked at this often, in seconds.
_LOOK = 0.5
# Signals are small: longer bodies are not searched for one.
_LONGEST_SIGNAL = 1_000


@dataclass(frozen=True)
class LogEntry:
    offset: int
    lane: str
    body: bytes


@dataclass(frozen=True)
class LogBatch:
    """Signals are taken out; what they said is in `epoch`, `heartbeats` and `caught_up`."""

    entries: list[LogEntry]
    epoch: str | None
    """None only when no heartbeat has ever been in this log."""
    heartbeats: dict[str, datetime]
    """Lane -> when the heartbeat was sent, of those in this batch."""
    caught_up: bool
    last_offset: int
    first_offset: int = 0
    restarted: bool = False
    """The first batch of a log that is not the one we read before: it begins at its first entry."""
    heartbeat_offsets: dict[str, int] = field(default_factory=dict)
    """Where those heartbeats stand."""


class _ForeignHeartbeat(Exception):
    def __init__(self, epoch: str) -> None:
        self.epoch = epoch


class _NoSuchOffset(Exception):
    """What we resume from is not there, or the broker is very slow."""


class LogReader:
    def __init__(self, url: str, *, name: str, idle_seconds: float, stream: str = LOG, prefetch: int = 1_000) -> None:
        """`idle_seconds`: without any entry for so long (heartbeats come every few seconds) it asks if the link
        lives."""
        self._hosts = Hosts(url)
        self._name = name
        self._stream = stream
        self._idle = idle_seconds
        self._prefetch = prefetch
        self._last: int | None = None
        self._strays: set[str] = set()
        self._restarted = False
        self.epoch: str | None = None
        self.heartbeat_at: datetime | None = None
        self.connected = False
        self.caught_up = False
        """The caller has taken everything that stood in the log when this connection was made."""

    async def read(self, start: Start, *, epoch: str | None = None) -> AsyncGenerator[LogBatch, None]:
        """Batches from `start` on, without end. `epoch`: of the log that `start` belongs to, when it is an offset."""
        self._last, self.epoch, self._restarted, self._strays = None, epoch, False, set()
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
                self._strays.add(heartbeat.epoch)
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

    # -- is it the log that we know? -----------------------------------------------------------------------------

    async def _verify(self, start: Start, *, missing: bool) -> Start:
        """Before every attach, because offsets of one log mean nothing in another: where to begin. The first heartbeat
        decides; a late one of an old epoch, from a worker that has not noticed yet, proves nothing."""
        found = await self.first_epoch()
        known, self.epoch = self.epoch, found or self.epoch
        other = found is not None and known is not None and found != known
        if not other and not (missing and isinstance(start, int) and await self._end() <= start):
            return start
        if known is not None:
            self._strays.add(known)
        self._strays.discard(self.epoch or "")
        self._last, self._restarted = None, True
        log.warning("log_restarted", reader=self._name, epoch=self.epoch, known=known, start=str(start))
        return "first"

    async def first_epoch(self) -> str | None:
        """`migrate` puts a heartbeat at the very beginning; retention may have cut it off, the next is a little
        further."""
        async with self._attach("first") as link:
            while True:
                for message in await link.next(_MARK_RETURNS):
                    signal = _signal(message.body)
                    if signal is not None and signal.type == HEARTBEAT and signal.epoch:
                        return signal.epoch
                    if signal is not None and signal.id == link.mark:
                        return None
                await message.ack(multiple=True)

    async def _end(self) -> int:
        async with self._attach("next") as link:
            return _offset((await link.next(_MARK_RETURNS))[0])

    # -- one connection ------------------------------------------------------------------------------------------

    async def _attached(self, start: Start) -> AsyncGenerator[LogBatch, None]:
        async with self._attach(start) as link:
            self.connected = True
            try:
                messages = await link.next(_MARK_RETURNS)
            except TimeoutError as error:
                raise _NoSuchOffset from error
            if isinstance(start, int) and _offset(messages[0]) < start:
                raise _NoSuchOffset
            while True:
                yield self._sort_out(messages, link.mark)
                # Not before the caller has taken them: a failing ack would lose the batch. It only moves the credit.
                await messages[-1].ack(multiple=True)
                try:
                    messages = await link.next(self._idle)
                except TimeoutError:
                    await link.put_mark()
                    messages = await link.next(_MARK_RETURNS)

    def _sort_out(self, messages: list[AbstractIncomingMessage], mark: str) -> LogBatch:
        entries: list[LogEntry] = []
        heartbeats: dict[str, datetime] = {}
        places: dict[str, int] = {}
        caught_up = False
        for message in messages:
            signal = _signal(message.body)
            if signal is None:
                offset = _offset(message)
                if self._last is None or offset > self._last:
                    entries.append(LogEntry(offset, message.routing_key or "", message.body))
            elif signal.type == HEARTBEAT:
                self._note(signal)
                heartbeats[signal.lane], places[signal.lane] = signal.time, _offset(message)
            else:
                caught_up = caught_up or signal.id == mark
        # Only now: an exception above means that none of these was handed out, and all are read again.
        self._last = max(_offset(messages[-1]), -1 if self._last is None else self._last)
        restarted, self._restarted = self._restarted, False
        return LogBatch(entries, self.epoch, heartbeats, caught_up, self._last, _offset(messages[0]), restarted, places)

    def _note(self, heartbeat: Signal) -> None:
        if heartbeat.epoch != self.epoch and heartbeat.epoch not in self._strays:
            if self.epoch is not None:
                raise _ForeignHeartbeat(heartbeat.epoch)
            self.epoch = heartbeat.epoch
        if heartbeat.epoch == self.epoch:
            self.heartbeat_at = heartbeat.time

    @asynccontextmanager
    async def _attach(self, start: Start) -> "AsyncIterator[_LogConnection]":
        connection = await self._hosts.connect()
        try:
            with closed_under_us():
                link = _LogConnection(connection, self._stream, self._name, self._prefetch)
                async with asyncio.timeout(10.0):
                    await link.open(start)
                yield link
        finally:
            try:
                with closed_under_us():
                    async with asyncio.timeout(1.0):
                        await connection.close()
            except BROKEN_LINK as error:
                log.debug("log_close", reader=self._name, error=str(error) or type(error).__name__)


class _LogConnection:
    """One consumer on a connection of its own, and the way to put a mark."""

    def __init__(self, connection: AbstractConnection, stream: str, name: str, prefetch: int) -> None:
        self._connection = connection
        self._stream = stream
        self._name = name
        self._prefetch = prefetch
        self._arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        self._marks: AbstractChannel
        self.mark = ""
        """The id of the first mark: what was before it stood in the log at the attach."""

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
        # On a channel of its own: a returned mark must not take the consumer down.
        self._marks = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self.mark = await self.put_mark()

    async def put_mark(self) -> str:
        mark = Signal(id=str(uuid4()), type=MARK, time=now(), source=self._name)
        message = aio_pika.Message(encode_signal(mark), message_id=mark.id, delivery_mode=2)
        await self._marks.default_exchange.publish(message, self._stream, mandatory=True, timeout=_MARK_RETURNS)
        return mark.id

    async def next(self, patience: float) -> list[AbstractIncomingMessage]:
        """At least one message, and whatever else is there already, up to half the credit, so that the other half is
        under way meanwhile. TimeoutError after `patience` seconds of silence, ConnectionError when it is over."""
        first = await self._first(patience)
        messages: list[AbstractIncomingMessage] = []
        while first is not None:
            messages.append(first)
            if self._arrived.empty() or len(messages) * 2 >= self._prefetch:
                return messages
            first = self._arrived.get_nowait()
        self._arrived.put_nowait(None)  # the loss is told with the next call
        if messages:
            return messages
        raise ConnectionError("the broker closed the channel")

    async def _first(self, patience: float) -> AbstractIncomingMessage | None:
        if not self._arrived.empty():
            return self._arrived.get_nowait()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        while True:
            left = deadline - loop.time()
            try:
                async with asyncio.timeout(min(_LOOK, left)):
                    return await self._arrived.get()
            except TimeoutError:
                if self._tag not in self._consumers:
                    raise ConnectionError("the stream was deleted") from None
                if left <= _LOOK:
                    raise


def _offset(message: AbstractIncomingMessage) -> int:
    offset = message.headers["x-stream-offset"]
    assert isinstance(offset, int)
    return offset


def _signal(body: bytes) -> Signal | None:
    """The signal in a message, if it is one: signals travel alone."""
    if len(body) > _LONGEST_SIGNAL:
        return None
    try:
        return signal_in(body[1:-1])
    except BrokenContract as error:
        log.error("log_broken_signal", error=str(error))
        return None
