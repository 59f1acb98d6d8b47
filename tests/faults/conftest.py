"""Systems whose backends and services the tests in this folder stop, kill and freeze."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.rigs.outage import Outage
from tests.rigs.servers import Servers
from tests.rigs.system import System


@pytest.fixture(scope="module")
async def victim(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A system for all tests of a file, with its own Redis. Each test leaves it running and complete."""
    own_redis = await asyncio.to_thread(servers.extra_redis)
    system = System(servers, tmp_path_factory.mktemp("victim"), redis=own_redis)
    try:
        await system.up()
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)


@pytest.fixture(scope="package")
async def outage(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Outage]:
    """A system that all tests in this folder share. Each test ends the faults that it begins."""
    rig = Outage(servers, tmp_path_factory.mktemp("outage"))
    try:
        await rig.up()
        yield rig
    finally:
        await rig.down()
