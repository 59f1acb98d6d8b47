"""Connections to PostgreSQL, and what its errors mean to a caller that must decide between waiting and giving up."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg

from shared.backoff import backoff
from shared.settings import Settings
from shared.version import USER_AGENT

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]
else:
    Connection = object

# The server is unavailable: starting, stopping, failing over, full or frozen. The statement is not at fault.
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.OutOfMemoryError,
    asyncpg.DiskFullError,
    asyncpg.InternalClientError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidAuthorizationSpecificationError,
)


class PostgresUnavailable(ConnectionError):
    """The breaker is open: PostgreSQL did not answer a moment ago."""


class Postgres:
    """A pool that is made lazily, so that a service starts while PostgreSQL is away.

    Every wait is bounded by `timeout`: `acquire()` alone would wait for ever, and a server that vanished without a
    close is noticed by nothing but a timeout.

    After a failure that says the server is away a breaker opens for a growing, jittered while, in which every caller is
    told at once; then one goes through as a probe, and the others are still told at once until it has come back. So a
    dead or frozen server costs one request in many its timeout.
    """

    def __init__(self, url: str, settings: Settings, *, size: int | None = None) -> None:
        self._url = url
        self._size = size or settings.database_pool_size
        self._timeout = settings.database_timeout_seconds
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._opening = asyncio.Lock()
        self.waiting = 0
        """Callers that wait for a connection now."""
        self._failures = 0
        self._closed_until = 0.0
        self._answered = time.monotonic()

    @property
    def available(self) -> bool:
        """False while the breaker is open."""
        return time.monotonic() >= self._closed_until

    async def _ready(self) -> "asyncpg.Pool[asyncpg.Record]":
        async with self._opening:
            if self._pool is None:
                # min_size 0: no connection is made here, the first caller makes it and has its errors.
                self._pool = await asyncpg.create_pool(
                    self._url,
                    min_size=0,
                    max_size=self._size,
                    timeout=self._timeout,
                    command_timeout=self._timeout,
                    max_inactive_connection_lifetime=60,
                    server_settings={"application_name": USER_AGENT},
                )
        return self._pool

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection of the pool. Raises one of UNAVAILABLE when none is free or ready in time."""
        began = time.monotonic()
        if began < self._closed_until:
            raise PostgresUnavailable("PostgreSQL did not answer a moment ago")
        if self._failures:  # a probe: other callers fail at once until it returns
            self._closed_until = began + 2 * self._timeout
        try:
            pool = await self._ready()
            self.waiting += 1
            try:
                connection = await pool.acquire(timeout=self._timeout)
            finally:
                self.waiting -= 1
            try:
                yield connection
            finally:
                await pool.release(connection)
        except UNAVAILABLE as error:
            self._failed(error, began)
            raise
        except asyncpg.PostgresError:
            self._served()  # an error is an answer too
            raise
        except BaseException:
            # Of the caller's own making, or it was cancelled: it says nothing of the server.
            if self._failures:
                self._closed_until = time.monotonic()
            raise
        self._served()

    def _served(self) -> None:
        self._failures, self._closed_until, self._answered = 0, 0.0, time.monotonic()

    def _failed(self, error: BaseException, began: float) -> None:
        # A pool with all its connections in use times out too: then others were answered meanwhile.
        if isinstance(error, TimeoutError) and self._answered > began:
            return
        if isinstance(error, ValueError):  # asyncpg's for an argument that fits no type: the server was not asked
            return
        self._failures += 1
        self._closed_until = time.monotonic() + backoff(self._failures)

    @asynccontextmanager
    async def tenant(self, restaurant_id: str, *, readonly: bool = True) -> AsyncIterator[Connection]:
        """A transaction that sees one restaurant alone (row-level security of the api role)."""
        async with self.connection() as connection, connection.transaction(readonly=readonly):
            await connection.execute("select set_config('app.tenant', $1, true)", restaurant_id)
            yield connection

    @property
    def connections(self) -> tuple[int, int, int]:
        """(in use, idle, at most)"""
        if self._pool is None:
            return 0, 0, self._size
        idle = self._pool.get_idle_size()
        return self._pool.get_size() - idle, idle, self._size

    async def close(self) -> None:
        """May be called twice, and without ever having been used."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()
