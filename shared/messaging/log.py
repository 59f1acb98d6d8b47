"""Reading the log (the stream `changes.log.v1`) in order, for as long as the caller wants.

Guarantee: entries come in order of their offset, each once within a process, through any number of lost connections; a
reader that starts from a remembered offset gets the entry of that offset once more. When the stream was deleted and
made again, the reader notices (its fences carry another epoch, or the remembered offset does not exist), begins at its
first entry and hands out batches with the new `epoch`: what the caller built from the old log is void.

At every attach the reader puts a mark of its own into the log; the batch with that mark is `caught_up`: everything that
stood in the log at the attach has been handed out.

While the broker is away the reader waits and tries again, with jittered back-off. At shutdown leave the loop.

Traps that shaped it: one task per delivery loses the order, so the callback only enqueues; a queue iterator nacks when
it is left, which a stream answers by closing the connection; offsets have holes, so `+1` is no check for a gap.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from uuid import uuid4

import aio_pika
import structlog
from aio_pika.abc import AbstractIncomingMessage

from shared.entities.contract import BrokenContract, now
from shared.entities.signal import FENCE, MARK, Signal, encode_signal, signal_in
from shared.messaging.publisher import BROKEN_LINK
from shared.messaging.topology import LOG

log = structlog.get_logger(__name__)

Start = int | datetime | str
"""An offset, a time, "first" or "next"."""


@dataclass(frozen=True)
class Entry:
    offset: int
    lane: str
    body: bytes


@dataclass(frozen=True)
class Batch:
    """Signals are taken out; what they said is in `epoch`, `fenced_at` and `caught_up`."""

    entries: list[Entry]
    epoch: str | None
    fenced_at: datetime | None
    """When the last fence that has been read was sent."""
    caught_up: bool
    last_offset: int


class _Reattach(Exception):
    def __init__(self, start: Start) -> None:
        self.start = start


class LogReader:
    def __init__(self, url: str, *, name: str, idle_seconds: float, prefetch: int = 500) -> None:
        """`idle_seconds`: without any entry for so long (fences come every few seconds) it attaches anew."""
        self._url = url
        self._name = name
        self._idle = idle_seconds
        self._prefetch = prefetch
        self._last: int | None = None
        self._past_epochs: set[str] = set()
        self.epoch: str | None = None
        self.fenced_at: datetime | None = None
        self.connected = False

    async def read(self, start: Start, *, epoch: str | None = None) -> AsyncIterator[Batch]:
        """Batches from `start` on, without end. `epoch`: of the log that `start` belongs to, when it is an offset."""
        self._last = None
        self.epoch = epoch
        attempt = 0
        while True:
            try:
                async for batch in self._attached(start):
                    attempt = 0
                    yield batch
                    start = batch.last_offset
            except _Reattach as reattach:
                start = reattach.start
                log.info("log_reattach", reader=self._name, start=str(start))
                continue
            except BROKEN_LINK as error:
                attempt += 1
                log.warning("log_away", reader=self._name, error=str(error) or type(error).__name__, attempt=attempt)
            finally:
                self.connected = False
            await asyncio.sleep(min(0.1 * 2**attempt, 2.0) * random.uniform(0.5, 1.0))  # noqa: S311  (jitter)

    async def _attached(self, start: Start) -> AsyncIterator[Batch]:
        connection = await aio_pika.connect(self._url, timeout=5.0)
        try:
            async with asyncio.timeout(10.0):
                channel = await connection.channel()
                await channel.set_qos(prefetch_count=self._prefetch)
                stream = await channel.get_queue(LOG, ensure=False)
                arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
                connection.close_callbacks.add(lambda *_: arrived.put_nowait(None))
                channel.close_callbacks.add(lambda *_: arrived.put_nowait(None))

                async def arrive(message: AbstractIncomingMessage) -> None:
                    arrived.put_nowait(message)

                await stream.consume(arrive, arguments={"x-stream-offset": start})
                mark = await self._mark(await connection.channel(publisher_confirms=True, on_return_raises=True))
            self.connected = True
            resumed = isinstance(start, int)
            while True:
                messages = await self._next(arrived, start, resumed=resumed)
                resumed = False
                batch = self._sort_out(messages, mark)
                await messages[-1].ack(multiple=True)  # moves the credit; a stream forgets nothing
                yield batch
        finally:
            try:
                async with asyncio.timeout(1.0):
                    await connection.close()
            except BROKEN_LINK as error:
                log.debug("log_close", reader=self._name, error=str(error) or type(error).__name__)

    async def _mark(self, channel: aio_pika.abc.AbstractChannel) -> str:
        mark = Signal(id=str(uuid4()), type=MARK, time=now(), source=self._name)
        message = aio_pika.Message(encode_signal(mark), message_id=mark.id, delivery_mode=2)
        await channel.default_exchange.publish(message, LOG, mandatory=True, timeout=5.0)
        return mark.id

    async def _next(
        self, arrived: "asyncio.Queue[AbstractIncomingMessage | None]", start: Start, *, resumed: bool
    ) -> list[AbstractIncomingMessage]:
        """At least one message, and whatever else is there already."""
        try:
            # The entry that we resume from exists, unless this is another stream: our own mark lies behind it.
            first = await asyncio.wait_for(arrived.get(), min(3.0, self._idle) if resumed else self._idle)
        except TimeoutError as error:
            raise _Reattach("first" if resumed else start if self._last is None else self._last) from error
        messages = []
        while first is not None:
            messages.append(first)
            if arrived.empty() or len(messages) >= self._prefetch:
                return messages
            first = arrived.get_nowait()
        if messages:
            arrived.put_nowait(None)  # the loss is told with the next call
            return messages
        raise ConnectionError("the broker closed the channel")

    def _sort_out(self, messages: list[AbstractIncomingMessage], mark: str) -> Batch:
        entries: list[Entry] = []
        caught_up = False
        last = self._last
        for message in messages:
            offset = message.headers["x-stream-offset"]
            assert isinstance(offset, int)
            signal = _signal(message.body)
            if signal is not None and signal.type == FENCE:
                self._note(signal)
            if signal is not None:
                caught_up = caught_up or signal.id == mark
            elif self._last is None or offset > self._last:
                entries.append(Entry(offset, message.routing_key or "", message.body))
            last = offset if last is None else max(last, offset)
        assert last is not None
        self._last = last
        return Batch(entries, self.epoch, self.fenced_at, caught_up, last)

    def _note(self, fence: Signal) -> None:
        """A fence of another epoch: the stream is a new one. A late fence of an old one proves nothing."""
        self.fenced_at = fence.time
        if fence.epoch == self.epoch or fence.epoch in self._past_epochs:
            return
        if self.epoch is not None:
            self._past_epochs.add(self.epoch)
            self.epoch, self._last = fence.epoch, None
            raise _Reattach("first")
        self.epoch = fence.epoch


def _signal(body: bytes) -> Signal | None:
    """The signal in a message, if it is one: signals travel alone."""
    try:
        return signal_in(body[1:-1])
    except BrokenContract as error:
        log.error("log_broken_signal", error=str(error))
        return None
