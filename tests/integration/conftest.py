"""Fixtures of the integration tests. Before each test they wait until the shared system is ready."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.error import URLError
from uuid import uuid4

import httpx
import pytest

from services.sync.cli.main import migrate_servers
from shared.settings import Settings
from tests.rigs.dead_letters import OperatorRig, operator_rig
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.replays import REFUSE_FORBIDDEN_NOTES
from tests.rigs.servers import Servers
from tests.rigs.sign_in import RegisteredRestaurant, guarded, register
from tests.rigs.system import System


@pytest.fixture
async def make_rig(servers: Servers) -> AsyncIterator[MakeRig]:
    made: list[tuple[Rig, str]] = []

    async def make(**overrides: Any) -> Rig:
        name = f"w{uuid4().hex[:10]}"
        await asyncio.to_thread(servers.postgres.make_database, name)
        chosen: dict[str, Any] = {
            "rabbitmq_url": await asyncio.to_thread(servers.rabbitmq.make_vhost, name),
            # The defaults are those of `make run`. A rig uses no management API, and must not wait for that one.
            "rabbitmq_management_url": "",
            "rabbitmq_watcher_url": "",
            "redis_url": servers.redis.url,
            "database_url": servers.postgres.url("ticketrail_owner", name),
            "database_writer_url": servers.postgres.url("ticketrail_writer", name),
            "database_api_url": servers.postgres.url("ticketrail_api", name),
            "database_ops_url": servers.postgres.url("ticketrail_ops", name),
            "database_timeout_seconds": 2.0,
            "redis_timeout_seconds": 5.0,
            "publish_timeout_seconds": 5.0,
            "retry_steps_ms": (50, 100),
            "heartbeat_interval_seconds": 0.2,
            "change_log_segment_bytes": 1_000_000,
        }
        rig = Rig(Settings(_env_file=None, **{**chosen, **overrides}))
        made.append((rig, name))
        # The migration gets enough time to connect, because some tests set a very short timeout for the worker.
        await migrate_servers(rig.settings.model_copy(update={"database_timeout_seconds": 10.0}))
        await rig.up()
        return rig

    yield make
    for rig, name in made:
        await rig.down()
        await asyncio.to_thread(servers.rabbitmq.delete_vhost, name)
        await asyncio.to_thread(servers.postgres.drop_database, name)


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    rig: Rig = await make_rig()
    await rig.writer.start()
    return rig


@pytest.fixture
async def refusing_rig(rig: Rig) -> Rig:
    """A writer, a dead-letter collector, and a database that refuses orders with the notes 'forbidden'."""
    rig.collector.start()
    await rig.as_owner(REFUSE_FORBIDDEN_NOTES)
    return rig


@pytest.fixture(scope="module")
async def ops_rig(system: System) -> AsyncIterator[OperatorRig]:
    """A restaurant with dead letters, and its operators."""
    async with operator_rig(system) as ops_rig:
        yield ops_rig


@pytest.fixture(scope="module")
async def nadia(ops_rig: OperatorRig) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the token of the operator nadia."""
    async with ops_rig.client() as client:
        yield client


@pytest.fixture(scope="module")
async def url(system: System) -> AsyncIterator[str]:
    """Yields the URL of an orders instance with small limits on sign-ins."""
    async with guarded(system) as url:
        yield url


@pytest.fixture(scope="module")
async def registered(system: System, url: str) -> RegisteredRestaurant:
    return await register(system, url)


@pytest.fixture
def marker() -> str:
    """A unique text, by which a test finds its own dead letters."""
    return f"m{uuid4().hex}"


def _wait_for(system: System) -> None:
    deadline = time.monotonic() + 60  # the same time as `eventually`
    while not (seen := _ready(system))[0]:
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


def _ready(system: System) -> tuple[bool, Any]:
    try:
        orders, sync, worker = (system.health(name) for name in ("orders", "sync", "worker"))
    except URLError as error:
        return False, error
    lanes = worker["postgres_writer"]["consumers"].values()
    return orders["broker"] and sync["broker"] and all(lanes), (orders, sync, worker)


@pytest.fixture(autouse=True, scope="module")
def the_system_is_ready(request: pytest.FixtureRequest) -> None:
    """Waits before the module's own fixtures start; see `the_system_is_ready_again`."""
    tests = [one for one in request.session.items if isinstance(one, pytest.Function)]
    if any("system" in one.fixturenames for one in tests if one.path == request.path):
        _wait_for(request.getfixturevalue("system"))


@pytest.fixture(autouse=True)
def the_system_is_ready_again(request: pytest.FixtureRequest) -> None:
    """Waits until the system has recovered. An earlier test may have stopped the shared servers. Until the system has
    recovered, orders go to the journal and other commits are refused, which the next test does not expect."""
    if "system" in request.fixturenames:
        _wait_for(request.getfixturevalue("system"))
