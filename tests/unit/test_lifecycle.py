"""The contract of background loops: each line of the table in shared/lifecycle.py."""

import asyncio
import signal

import pytest

from shared.lifecycle import BackgroundLoop

_DEADLINE_SECONDS = 20.0


class Work:
    """A loop that makes one round for each `turn`."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.go = asyncio.Semaphore(0)
        self.loop = BackgroundLoop("work", self.run)

    async def run(self) -> None:
        self.begun += 1
        try:
            while True:
                await self.go.acquire()
                self.loop.turned()
        finally:
            self.ended += 1

    async def turn(self) -> None:
        turns = self.loop.turns
        self.go.release()
        async with asyncio.timeout(_DEADLINE_SECONDS):
            await self.loop.turn_after(turns)


async def test_a_loop_that_was_never_started_can_be_stopped_twice() -> None:
    work = Work()
    await work.loop.stop()
    await work.loop.stop()
    assert (work.begun, work.loop.running) == (0, False)


async def test_a_second_start_begins_no_second_task() -> None:
    work = Work()
    work.loop.start()
    work.loop.start()
    await work.turn()
    assert (work.begun, work.loop.running) == (1, True)
    await work.loop.stop()
    assert (work.ended, work.loop.running) == (1, False)


async def test_a_second_stop_does_nothing() -> None:
    work = Work()
    work.loop.start()
    await work.turn()
    await work.loop.stop()
    await work.loop.stop()
    assert (work.begun, work.ended) == (1, 1)


async def test_a_stopped_loop_starts_again_and_continues_to_count() -> None:
    work = Work()
    work.loop.start()
    await work.turn()
    await work.loop.stop()
    work.loop.start()
    await work.turn()
    assert (work.begun, work.loop.turns) == (2, 2)
    await work.loop.stop()


async def test_two_stops_at_once_both_wait_until_the_work_has_ended() -> None:
    closing, closed = asyncio.Event(), asyncio.Event()
    ended = False

    async def slow_to_end() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            closing.set()
            await closed.wait()
            ended = True

    loop = BackgroundLoop("slow", slow_to_end)
    loop.start()
    await asyncio.sleep(0)
    stops = [asyncio.create_task(loop.stop()) for _ in range(2)]
    async with asyncio.timeout(_DEADLINE_SECONDS):
        await closing.wait()
        assert not any(stop.done() for stop in stops)
        closed.set()
        await asyncio.gather(*stops)
    assert ended


async def test_a_stop_cancels_again_when_the_work_swallows_a_cancellation() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while swallowed < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1

    loop = BackgroundLoop("stubborn", stubborn)
    loop.start()
    await asyncio.sleep(0)
    async with asyncio.timeout(_DEADLINE_SECONDS):
        await loop.stop()
    assert swallowed == 2


async def test_work_that_ends_within_the_grace_is_not_cancelled() -> None:
    asked, cancelled = asyncio.Event(), False

    async def finishes_when_asked() -> None:
        nonlocal cancelled
        try:
            await asked.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            cancelled = True
            raise

    loop = BackgroundLoop("graceful", finishes_when_asked)
    loop.start()
    await asyncio.sleep(0)
    asked.set()
    await loop.stop(grace_seconds=_DEADLINE_SECONDS)
    assert not cancelled


async def test_work_that_outlasts_the_grace_is_cancelled() -> None:
    work = Work()
    work.loop.start()
    await work.turn()
    async with asyncio.timeout(_DEADLINE_SECONDS):
        await work.loop.stop(grace_seconds=0.01)
    assert work.ended == 1


async def test_a_crash_ends_the_process_with_sigterm() -> None:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)

    async def breaks() -> None:
        raise ValueError("an unforeseen case")

    loop = BackgroundLoop("breaks", breaks)
    try:
        loop.start()
        async with asyncio.timeout(_DEADLINE_SECONDS):
            await told.wait()
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
    assert not loop.running
    await loop.stop()


async def test_a_stop_is_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[int] = []
    monkeypatch.setattr("shared.lifecycle.os.kill", lambda _, number: signals.append(number))
    work = Work()
    work.loop.start()
    await work.turn()
    await work.loop.stop()
    await asyncio.sleep(0)
    assert not signals


async def test_work_that_returns_leaves_a_loop_that_starts_again() -> None:
    runs = 0

    async def once() -> None:
        nonlocal runs
        runs += 1
        loop.turned()

    loop = BackgroundLoop("once", once)
    for expected in (1, 2):
        loop.start()
        async with asyncio.timeout(_DEADLINE_SECONDS):
            await loop.turn_after(expected - 1)
        await asyncio.sleep(0)
        assert (runs, loop.running) == (expected, False)
    await loop.stop()


async def test_waiting_for_a_turn_ends_with_an_error_when_the_loop_ends() -> None:
    work = Work()
    work.loop.start()
    waiting = asyncio.create_task(work.loop.turn_after(0))
    await asyncio.sleep(0)
    await work.loop.stop()
    async with asyncio.timeout(_DEADLINE_SECONDS):
        with pytest.raises(RuntimeError, match="the loop work ended after 0 rounds"):
            await waiting
