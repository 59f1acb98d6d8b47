"""What every test may ask for: the servers of this run."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.servers import Servers, prepare_servers
from tests.system import System


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
    """All services, for the tests that end nothing. Its Redis is the run's own."""
    system = System(servers, tmp_path_factory.mktemp("system"))
    try:
        await system.up()
        yield system
    finally:
        await system.down()
