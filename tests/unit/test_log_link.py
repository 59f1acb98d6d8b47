"""The log reader on a connection that breaks in ways that no server produces on demand."""

import asyncio
from typing import Any, cast

import pytest
from aio_pika.abc import AbstractConnection

from shared.messaging.log import LogReader
from tests.rigs.system import eventually


class BrokenConnection:
    """A connection that is lost while a channel is being opened; aiormq then raises `error`."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def channel(self, **_: Any) -> None:
        raise self._error

    async def close(self) -> None:
        raise self._error


@pytest.mark.parametrize("error", [Exception(), ConnectionResetError(), StopAsyncIteration()])
async def test_a_connection_lost_while_its_channel_opens_is_opened_again(error: Exception) -> None:
    attempts = 0

    async def connect(*_: Any, **__: Any) -> AbstractConnection:
        nonlocal attempts
        attempts += 1
        return cast(AbstractConnection, BrokenConnection(error))

    reader = LogReader("amqp://nowhere/", name="test", idle_seconds=1.0, connect=connect)
    reading = asyncio.create_task(anext(reader.read("first")))

    async def tried() -> int:
        if reading.done():
            pytest.fail("the reader gave up")
        return attempts

    try:
        await eventually(tried, what="another attempt", until=lambda count: count > 1)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_a_bug_is_not_mistaken_for_a_broken_connection() -> None:
    async def connect(*_: Any, **__: Any) -> AbstractConnection:
        return cast(AbstractConnection, BrokenConnection(KeyError("a bug")))

    reader = LogReader("amqp://nowhere/", name="test", idle_seconds=1.0, connect=connect)
    with pytest.raises(KeyError):
        await anext(reader.read("first"))
