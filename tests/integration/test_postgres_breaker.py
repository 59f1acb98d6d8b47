"""The breaker of the PostgreSQL pool: what is away costs one caller in many its timeout, until it is back."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from shared.postgres.pool import AWAY, Postgres, PostgresAway
from shared.settings import Settings
from tests.proxy import Mode, Proxy
from tests.servers import Servers
from tests.system import eventually


@pytest.fixture
async def proxy(servers: Servers) -> AsyncIterator[Proxy]:
    proxy = Proxy(servers.postgres.port)
    await proxy.start()
    yield proxy
    await proxy.stop()


@pytest.fixture
async def postgres(servers: Servers, proxy: Proxy) -> AsyncIterator[Postgres]:
    url = servers.postgres.superuser_url.replace(f":{servers.postgres.port}/", f":{proxy.port}/")
    postgres = Postgres(url, Settings(_env_file=None, database_timeout_seconds=0.5))  # type: ignore[call-arg]
    yield postgres
    await postgres.close()


async def ask(postgres: Postgres) -> object:
    async with postgres.connection() as connection:
        return await connection.fetchval("select 1")


async def refused_at_once(postgres: Postgres, calls: int) -> int:
    """Of so many calls, one after the other."""
    at_once = 0
    for _ in range(calls):
        try:
            await ask(postgres)
        except PostgresAway:
            at_once += 1
        except AWAY:
            pass
    return at_once


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.LOSE, Mode.STALL])
async def test_one_call_in_many_waits_for_a_server_that_is_away(postgres: Postgres, proxy: Proxy, mode: Mode) -> None:
    assert await ask(postgres) == 1
    proxy.set(mode)
    assert await refused_at_once(postgres, 200) >= 190
    accepted = proxy.accepted

    async def probed() -> int:
        await refused_at_once(postgres, 1)
        return proxy.accepted

    await eventually(probed, what="another probe", until=lambda seen: seen > accepted)
    proxy.set(Mode.FORWARD)

    async def back() -> object:
        try:
            return await ask(postgres)
        except AWAY:
            return None

    await eventually(back, what="an answer")
    assert postgres.available


async def test_of_many_at_once_one_probes(postgres: Postgres, proxy: Proxy) -> None:
    proxy.set(Mode.LOSE)
    with pytest.raises(AWAY):
        await ask(postgres)

    async def half_open() -> bool:
        return postgres.available

    await eventually(half_open, what="the breaker to let one through")
    before = proxy.accepted
    outcomes = await asyncio.gather(*(ask(postgres) for _ in range(50)), return_exceptions=True)
    assert sum(isinstance(one, PostgresAway) for one in outcomes) == 49
    assert proxy.accepted == before + 1


async def test_a_busy_pool_and_refused_statements_do_not_open_it(postgres: Postgres) -> None:
    async def hold() -> None:
        async with postgres.connection() as connection:
            await connection.fetchval("select pg_sleep(0.3)")

    outcomes = await asyncio.gather(*(hold() for _ in range(40)), return_exceptions=True)
    assert any(isinstance(one, TimeoutError) for one in outcomes), "more callers than the pool serves in its timeout"
    assert postgres.available
    with pytest.raises(asyncpg.PostgresError):
        async with postgres.connection() as connection:
            await connection.execute("select no_such_column")
    with pytest.raises(asyncpg.DataError):
        async with postgres.connection() as connection:
            await connection.fetchval("select $1::int", "text")
    assert postgres.available
    assert await ask(postgres) == 1
