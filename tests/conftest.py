"""What every test may ask for: the servers of this run."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import settings

from tests.rigs.servers import Servers, prepare_servers
from tests.rigs.system import PATIENT, System

# The same examples at every run: what a property test finds, it finds for everybody and every time.
settings.register_profile("ticketrail", derandomize=True, database=None, deadline=None, print_blob=True)
settings.load_profile("ticketrail")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """RabbitMQ, PostgreSQL and Redis, started once for the whole run; data ends with it."""
    servers = prepare_servers()
    try:
        servers.start_all()
        yield servers
    finally:
        servers.stop_all()


@pytest.fixture(scope="session")
async def system(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """All services, for the tests that end nothing. With a Redis of its own: its mirror writer would take a mirror that
    other tests fill by hand for one that is lost."""
    own_redis = await asyncio.to_thread(servers.extra_redis)
    system = System(servers, tmp_path_factory.mktemp("system"), redis=own_redis, **PATIENT)
    try:
        await system.up()
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)
