"""The breaker of the PostgreSQL pool: while PostgreSQL is unavailable, only one caller in many waits for a timeout."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from shared.postgres.pool import UNAVAILABLE, Postgres, PostgresUnavailable
from shared.settings import Settings
from tests.rigs.proxy import Mode, Proxy
from tests.rigs.servers import Servers
from tests.rigs.system import eventually


@pytest.fixture
async def proxy(servers: Servers) -> AsyncIterator[Proxy]:
    proxy = Proxy(servers.postgres.port)
    await proxy.start()
    yield proxy
    await proxy.stop()


@asynccontextmanager
async def pool(servers: Servers, proxy: Proxy, timeout: float) -> AsyncIterator[Postgres]:
    url = servers.postgres.superuser_url.replace(f":{servers.postgres.port}/", f":{proxy.port}/")
    postgres = Postgres(url, Settings(_env_file=None, database_timeout_seconds=timeout))
    try:
        yield postgres
    finally:
        await postgres.close()


@pytest.fixture
async def impatient(servers: Servers, proxy: Proxy) -> AsyncIterator[Postgres]:
    async with pool(servers, proxy, 0.5) as postgres:
        yield postgres


async def ask(postgres: Postgres) -> object:
    async with postgres.connection() as connection:
        return await connection.fetchval("select 1")


async def answers(postgres: Postgres) -> bool:
    try:
        return await ask(postgres) == 1
    except UNAVAILABLE:
        return False


async def refused_at_once(postgres: Postgres, calls: int) -> int:
    """Makes the calls one after the other; returns how many the breaker refused at once."""
    at_once = 0
    for _ in range(calls):
        try:
            await ask(postgres)
        except PostgresUnavailable:
            at_once += 1
        except UNAVAILABLE:
            pass
    return at_once


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.LOSE, Mode.STALL])
async def test_one_call_in_many_waits_for_an_unavailable_server(impatient: Postgres, proxy: Proxy, mode: Mode) -> None:
    await eventually(lambda: answers(impatient), what="a connection")
    proxy.set(mode)
    assert await refused_at_once(impatient, 200) >= 190
    accepted = proxy.accepted

    async def probed() -> int:
        await refused_at_once(impatient, 1)
        return proxy.accepted

    await eventually(probed, what="another probe", until=lambda seen: seen > accepted)
    proxy.set(Mode.FORWARD)
    await eventually(lambda: answers(impatient), what="a reply")
    assert impatient.available


async def test_one_of_many_concurrent_calls_probes(servers: Servers, proxy: Proxy) -> None:
    async with pool(servers, proxy, 20.0) as postgres:
        proxy.set(Mode.REFUSE)
        with pytest.raises(UNAVAILABLE):
            await ask(postgres)
        proxy.set(Mode.LOSE)

        async def half_open() -> bool:
            return postgres.available

        await eventually(half_open, what="a breaker that allows a probe")
        before = proxy.accepted
        calls = [asyncio.create_task(ask(postgres)) for _ in range(50)]

        async def finished() -> int:
            return sum(call.done() for call in calls)

        await eventually(
            finished, within=10.0, what="49 refused calls while the probe takes 20 s", until=lambda count: count >= 49
        )
        assert {type(call.exception()) for call in calls if call.done()} == {PostgresUnavailable}

        async def arrived() -> int:
            return proxy.accepted

        await eventually(arrived, what="the probe at the server", until=lambda count: count > before)
        _, second = await asyncio.open_connection("127.0.0.1", proxy.port)
        # The server accepts connections in the order in which they are made, so earlier ones are counted by now.
        await eventually(arrived, what="the second connection", until=lambda count: count >= before + 2)
        assert proxy.accepted == before + 2, "a call opened a connection besides the probe and the test's own"
        second.transport.abort()
        proxy.set(Mode.REFUSE)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(one, PostgresUnavailable) for one in outcomes) == 49


async def test_busy_pool_and_refused_statements_do_not_open_the_breaker(servers: Servers, proxy: Proxy) -> None:
    async with pool(servers, proxy, 2.0) as postgres:

        async def hold() -> None:
            async with postgres.connection() as connection:
                await connection.fetchval("select pg_sleep(0.3)")

        outcomes = await asyncio.gather(*(hold() for _ in range(100)), return_exceptions=True)
        assert any(isinstance(one, TimeoutError) for one in outcomes), (
            "no call waited for its timeout, so the pool was not busy"
        )
        assert postgres.available
        with pytest.raises(asyncpg.PostgresError):
            async with postgres.connection() as connection:
                await connection.execute("select no_such_column")
        with pytest.raises(asyncpg.DataError):
            async with postgres.connection() as connection:
                await connection.fetchval("select $1::int", "text")
        assert postgres.available
        assert await ask(postgres) == 1
