"""The recorder publishes a single change at once, and changes that follow closely together. The publisher is a fake."""

import asyncio
from typing import cast

import pytest

from shared.entities.contract import Lane, split_batch
from shared.messaging.publisher import Publisher
from shared.rail.record import Durability, Recorder

LANE = Lane.CRITICAL


class NotingPublisher:
    def __init__(self) -> None:
        self.messages: list[list[bytes]] = []

    async def publish(self, routing_key: str, body: bytes) -> None:
        self.messages.append(split_batch(body))


def recorder(notes: NotingPublisher, publish_interval_ms: float) -> Recorder:
    return Recorder(cast(Publisher, notes), None, max_publishes=1, publish_interval_ms=publish_interval_ms)


async def test_a_single_change_is_published_at_once_and_close_followers_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes = NotingPublisher()
    made = recorder(notes, publish_interval_ms=50)
    loop = asyncio.get_running_loop()
    at = loop.time()
    with monkeypatch.context() as stopped:
        # The stopped clock keeps the changes close together even on a slow machine.
        stopped.setattr(loop, "time", lambda: at)
        assert await made.record(LANE, b"1") is Durability.BROKER
        following = [asyncio.create_task(made.record(LANE, body)) for body in (b"2", b"3")]
        await asyncio.sleep(0)
        assert notes.messages == [[b"1"]]
    assert await asyncio.gather(*following) == [Durability.BROKER] * 2
    assert notes.messages == [[b"1"], [b"2", b"3"]]


async def test_lanes_do_not_wait_for_one_another() -> None:
    notes = NotingPublisher()
    made = recorder(notes, publish_interval_ms=60_000)
    async with asyncio.timeout(5):
        for lane in Lane:
            await made.record(lane, b"1")
    assert len(notes.messages) == 3


async def test_a_stop_does_not_wait_for_the_next_publish() -> None:
    notes = NotingPublisher()
    made = recorder(notes, publish_interval_ms=60_000)
    await made.record(LANE, b"1")
    waiting = asyncio.create_task(made.record(LANE, b"2"))
    await asyncio.sleep(0)
    assert len(notes.messages) == 1
    async with asyncio.timeout(5):
        await made.drain()
        assert await waiting is Durability.BROKER
    assert notes.messages == [[b"1"], [b"2"]]
