"""Fixtures for every test: the servers of this run, and a system of all services on them."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import settings

from shared.lifecycle import freeze_memory
from tests.rigs import zygote
from tests.rigs.servers import Servers, prepare_servers
from tests.rigs.system import PATIENT, System

# Property tests use the same examples in every run, so that every failure can be repeated.
settings.register_profile("ticketrail", derandomize=True, database=None, deadline=None, print_blob=True)
settings.load_profile("ticketrail")


def pytest_collection_finish() -> None:
    """Keeps the cycle collector from the modules and tests that live as long as the run. Its searches took a third
    of the processor time of the unit tests."""
    freeze_memory()


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """RabbitMQ, PostgreSQL and Redis, started once for the whole run. Their data is removed at its end."""
    zygote.warm_up()  # the zygote imports while the servers start
    servers = prepare_servers()
    try:
        servers.start_all()
        yield servers
    finally:
        servers.stop_all()


@pytest.fixture(scope="session")
async def system(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """All services, for tests that stop none of them. It has its own Redis, because its mirror writer would mistake a
    mirror that other tests fill by hand for a lost one."""
    own_redis = await asyncio.to_thread(servers.extra_redis)
    system = System(servers, tmp_path_factory.mktemp("system"), redis=own_redis, **PATIENT)
    try:
        await system.up()
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)
