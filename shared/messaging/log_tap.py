"""Lets a second loop of a process read the batches that a first loop reads from a log, so that each message is received
once. Receiving a message costs more than what either loop does with it.

    first loop:  LogReader ──batch──► its own work, and `LogTap.pass_on(batch)`
    second loop: `TappedReader.read(start)`, in place of a LogReader

Guarantee: as LogReader, the second loop receives the entries in order, without a gap, each once. It begins with a
reader of its own. After this reader has read the log to its end, and has a message that the first loop has passed on
last, the second loop takes the batches of the first one. A position has a checksum, so both read the same log.

The second loop goes back to a reader of its own when the first loop ends, goes back in the log, is silent for too long,
or passes on more than the second loop takes. So it depends on nothing that the first loop waits for.

Memory: at most 8 MiB of bodies wait for the second loop, and one more batch.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace

from shared.messaging.log import LogBatch, LogReader, Start
from shared.messaging.position import LogPosition

_MAX_WAITING_BYTES = 8 << 20
_RECENT_POSITIONS = 1_000
"""By how many messages the first loop may be behind when the second one joins it."""


class LogTap:
    """Used by the first loop."""

    def __init__(self) -> None:
        self._last: LogPosition | None = None
        self._listener: _Listener | None = None

    def pass_on(self, batch: LogBatch) -> None:
        if batch.broken is not None:
            self.end()
        self._last = batch.last
        if self._listener is not None:
            self._listener.put(batch)

    def end(self) -> None:
        """The first loop stops reading, or goes back in the log. May be called twice."""
        self._last = None
        if self._listener is not None:
            self._listener.ended = True
            self._listener.changed.set()
            self._listener = None

    def join(self, positions: Iterable[LogPosition]) -> "_Listener | None":
        """Returns a listener to the next batches, if one of `positions` was passed on last. There is one listener; an
        earlier one ends."""
        last = self._last
        if last is None or last not in positions:
            return None
        self.end()
        self._last, self._listener = last, _Listener()
        return self._listener


class _Listener:
    def __init__(self) -> None:
        self.ended = False
        self.changed = asyncio.Event()
        self._waiting: deque[LogBatch] = deque()
        self._waiting_bytes = 0

    def put(self, batch: LogBatch) -> None:
        if self.ended:
            return
        if self._waiting_bytes > _MAX_WAITING_BYTES:
            self.ended = True
        else:
            self._waiting.append(batch)
            self._waiting_bytes += _size(batch)
        self.changed.set()

    async def next(self, timeout_seconds: float) -> LogBatch | None:
        """Returns the next batch, or None if none follows in this time."""
        if not self._waiting and not self.ended:
            self.changed.clear()
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self.changed.wait()
            except TimeoutError:
                return None
        if not self._waiting:
            return None
        batch = self._waiting.popleft()
        self._waiting_bytes -= _size(batch)
        return batch


class TappedReader:
    """Used by the second loop."""

    def __init__(self, reader: LogReader, tap: LogTap, *, silence_seconds: float) -> None:
        """`silence_seconds`: after this time without a batch of the first loop, the own reader reads on. It must be
        longer than the interval of the heartbeats."""
        self._reader = reader
        self._tap = tap
        self._silence_seconds = silence_seconds
        self.joined = False
        """True while the batches come from the first loop."""

    async def read(self, start: Start) -> AsyncGenerator[LogBatch, None]:
        """Yields batches from `start` on, without end, as `LogReader.read` does."""
        while True:
            listener: _Listener | None = None
            recent: deque[LogPosition] = deque(maxlen=_RECENT_POSITIONS)
            caught_up = False
            async with aclosing(self._reader.read(start)) as batches:
                async for batch in batches:
                    yield batch
                    start = batch.last
                    recent.extend(batch.positions)
                    caught_up = caught_up or batch.caught_up
                    if caught_up and (listener := self._tap.join(recent)) is not None:
                        break
            assert listener is not None  # a reader has no end
            self.joined = True
            read = recent[-1]
            try:
                while (passed := await listener.next(self._silence_seconds)) is not None:
                    rest = _after(passed, read)
                    if rest is not None:
                        yield rest
                        start = read = rest.last
            finally:
                self.joined = False


def _after(batch: LogBatch, position: LogPosition) -> LogBatch | None:
    """Returns the part of a batch behind the position; None if it is empty."""
    offset = position.offset
    if batch.positions[0].offset > offset:
        return batch
    if batch.last.offset <= offset:
        return None
    return replace(
        batch,
        entries=[entry for entry in batch.entries if entry.offset > offset],
        heartbeats=[heartbeat for heartbeat in batch.heartbeats if heartbeat.offset > offset],
        positions=[one for one in batch.positions if one.offset > offset],
    )


def _size(batch: LogBatch) -> int:
    return sum(len(entry.body) for entry in batch.entries)
