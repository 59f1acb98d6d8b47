"""A system whose backends and services the tests of this folder end."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.servers import Servers
from tests.system import System


@pytest.fixture
async def victim(servers: Servers, tmp_path: Path) -> AsyncIterator[System]:
    """A system of its own, with a Redis of its own."""
    own_redis = await asyncio.to_thread(servers.extra_redis)
    system = System(servers, tmp_path, redis=own_redis)
    try:
        await system.up()
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)
