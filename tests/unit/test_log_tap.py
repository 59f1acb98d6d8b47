"""A second loop of a process takes the batches that a first loop reads from the log."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from shared.messaging.log import BrokenPosition, LogBatch, LogEntry, LogHeartbeat, Start
from shared.messaging.log_tap import LogTap, TappedReader
from shared.messaging.position import LogPosition
from tests.rigs.system import eventually


def at(offset: int) -> LogPosition:
    return LogPosition(offset, offset)


def batch(first: int, last: int, *, caught_up: bool = False, body: bytes = b"[]") -> LogBatch:
    """A batch with an entry at each even offset, and a heartbeat at each odd one."""
    offsets = range(first, last + 1)
    entries = [LogEntry(at(offset), "critical", body) for offset in offsets if offset % 2 == 0]
    heartbeats: Any = [LogHeartbeat(offset, str(offset), "critical", None) for offset in offsets if offset % 2]  # type: ignore[arg-type]
    return LogBatch(entries, heartbeats, caught_up, [at(offset) for offset in offsets])


class OwnReader:
    """A log with `length` messages, of which one batch has three. The reader attaches again and again."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.starts: list[Start] = []
        self.grown = asyncio.Event()

    async def read(self, start: Start) -> AsyncGenerator[LogBatch, None]:
        self.starts.append(start)
        following = start.offset + 1 if isinstance(start, LogPosition) else 0
        end = self.length - 1
        while True:
            while following < self.length:
                last = min(following + 2, self.length - 1)
                yield batch(following, last, caught_up=last == end)
                following = last + 1
            self.grown.clear()
            await self.grown.wait()

    def grow(self, by: int) -> None:
        self.length += by
        self.grown.set()


class SecondLoop:
    def __init__(self, length: int, *, silence_seconds: float = 30.0) -> None:
        self.tap = LogTap()
        self.own = OwnReader(length)
        own: Any = self.own
        self.reader = TappedReader(own, self.tap, silence_seconds=silence_seconds)
        self.seen: list[int] = []
        self.read_on = asyncio.Event()
        self.read_on.set()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with aclosing(self.reader.read("first")) as batches:
            async for found in batches:
                assert [one.offset for one in found.positions if one.offset % 2 == 0] == [
                    one.offset for one in found.entries
                ]
                assert [one.offset for one in found.positions if one.offset % 2] == [
                    one.offset for one in found.heartbeats
                ]
                self.seen += [one.offset for one in found.positions]
                await self.read_on.wait()

    async def has_read(self, length: int) -> None:
        """Waits until it has read this number of messages, each once and in order."""
        await eventually(lambda: _is(len(self.seen) >= length))
        assert self.seen == list(range(length))

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


async def _is(condition: bool) -> bool:
    return condition


async def joined(silence_seconds: float = 30.0) -> SecondLoop:
    """Returns a loop that has joined a first loop after eleven messages."""
    loop = SecondLoop(10, silence_seconds=silence_seconds)
    await loop.has_read(10)
    loop.tap.pass_on(batch(4, 9))
    loop.own.grow(1)
    await eventually(lambda: _is(loop.reader.joined))
    return loop


async def test_second_loop_takes_the_batches_of_the_first_one() -> None:
    second = await joined()
    second.own.grow(9)  # its own reader does not read them
    second.tap.pass_on(batch(10, 14))  # it has read the first of these
    second.tap.pass_on(batch(15, 19))
    await second.has_read(20)
    assert second.own.starts == ["first"]
    await second.stop()


async def test_second_loop_does_not_join_before_it_has_read_to_the_end() -> None:
    loop = SecondLoop(2_000)
    loop.tap.pass_on(batch(0, 5))
    await loop.has_read(2_000)
    assert loop.own.starts == ["first"], "it did not join on the way"
    assert not loop.reader.joined, "the first loop is further behind than the second one can prove"
    await loop.stop()


@pytest.mark.parametrize("why", ["ended", "went back", "too much"])
async def test_second_loop_continues_with_a_reader_of_its_own(why: str) -> None:
    second = await joined()
    second.tap.pass_on(batch(11, 11))
    await second.has_read(12)
    second.own.grow(9)
    if why == "ended":
        second.tap.end()
        second.tap.end()
    elif why == "went back":
        broken = BrokenPosition("truncated", at(11), "first")
        second.tap.pass_on(replace(batch(0, 11), broken=broken))
    else:
        second.read_on.clear()
        for offset in range(12, 18):
            second.tap.pass_on(batch(offset, offset, body=b" " * (4 << 20)))
        second.read_on.set()
    await second.has_read(20)
    assert len(second.own.starts) == 2
    await second.stop()


async def test_second_loop_does_not_wait_for_a_silent_first_one() -> None:
    second = await joined(silence_seconds=0.1)
    second.own.grow(9)
    await second.has_read(20)
    assert len(second.own.starts) == 2
    await second.stop()
