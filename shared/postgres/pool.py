"""Connections to PostgreSQL, and the errors after which a caller should wait and try again."""

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

    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
else:
    Connection = object

# These errors mean that the server is unavailable: starting, stopping, failing over, full or frozen. The statement
# itself is correct.
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


# The beginnings of messages about a wrong number of arguments. asyncpg has no error type of its own for them.
_WRONG_ARGUMENTS = ("the server expects", "the number of query arguments")


def refused_by_client(error: BaseException) -> bool:
    """Returns whether asyncpg refused a statement before it sent it: it cannot encode a value (a ValueError), or the
    statement does not fit its arguments (a bug of ours). Like a broken connection, this is an InterfaceError, but
    waiting does not help. An asyncpg.DataError is not meant: it is a PostgresError, whoever raises it."""
    return isinstance(error, asyncpg.InterfaceError) and (
        isinstance(error, ValueError | asyncpg.UnsupportedClientFeatureError) or str(error).startswith(_WRONG_ARGUMENTS)
    )


class PostgresUnavailable(ConnectionError):
    """The breaker is open: PostgreSQL did not answer a moment ago."""


class Postgres:
    """A pool that is created on first use, so that a service can start while PostgreSQL is unavailable.

    The setting `database_timeout_seconds` bounds every wait. Without it, `acquire()` would wait forever, and a server
    that vanished without closing its connections would not be detected.

    When the server is unavailable, a breaker opens for a growing, jittered time, and every caller fails at once. Then
    one caller is let through as a probe, and the others still fail at once until the probe returns. Therefore a dead or
    frozen server delays only the few requests that probe it.
    """

    def __init__(self, url: str, settings: Settings, *, size: int | None = None) -> None:
        self._url = url
        self._size = size or settings.database_pool_size
        self._timeout = settings.database_timeout_seconds
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._opening = asyncio.Lock()
        self.waiting = 0
        """The number of callers that wait for a connection."""
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
                # With min_size 0 this opens no connection. The first caller opens one and gets the errors.
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
        """Provides a connection of the pool. Raises one of UNAVAILABLE if none is free in time or the server is
        unavailable."""
        began = time.monotonic()
        if began < self._closed_until:
            raise PostgresUnavailable("PostgreSQL did not answer a moment ago")
        if self._failures:  # this call is a probe; other callers fail at once until it returns
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
            self._served()  # the server has answered, although with an error
            raise
        except BaseException:
            # The caller raised an error of its own or was cancelled. That says nothing about the server, so the next
            # caller may probe.
            if self._failures:
                self._closed_until = time.monotonic()
            raise
        self._served()

    def _served(self) -> None:
        self._failures, self._closed_until, self._answered = 0, 0.0, time.monotonic()

    def _failed(self, error: BaseException, began: float) -> None:
        # A timeout may only mean that all connections of the pool are in use. Other callers have then received answers
        # in the meantime.
        if isinstance(error, TimeoutError) and self._answered > began:
            return
        if refused_by_client(error):
            return
        self._failures += 1
        self._closed_until = time.monotonic() + backoff(self._failures)

    @asynccontextmanager
    async def tenant(self, restaurant_id: str, *, readonly: bool = True) -> AsyncIterator[Connection]:
        """Begins a transaction that sees only this restaurant (by the row-level security of the api role)."""
        async with self.connection() as connection, connection.transaction(readonly=readonly):
            await connection.execute("select set_config('app.tenant', $1, true)", restaurant_id)
            yield connection

    @property
    def connections(self) -> tuple[int, int, int]:
        """The numbers of connections: (in use, idle, allowed at most)."""
        if self._pool is None:
            return 0, 0, self._size
        idle = self._pool.get_idle_size()
        return self._pool.get_size() - idle, idle, self._size

    async def close(self) -> None:
        """Closes all connections. May be called more than once, also on a pool that was never used."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()
