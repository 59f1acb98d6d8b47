"""The objects that the routes of the sync API use. This module imports no feature, so that every feature can import
it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import Struct, field

from shared.errors import Unavailable
from shared.http.call import Call
from shared.mirror.mirror import Mirror
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.rail.commit import Rail
from shared.security.tokens import Identity, Role
from shared.settings import Settings


class SyncContext(Struct, frozen=True):
    settings: Settings
    ops: Postgres
    """A pool of the ops role, which sees every tenant."""
    api: Postgres
    """A pool of the api role, which sees one tenant at a time."""
    mirror: Mirror
    rail: Rail
    reporting: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a report of the ledger is taken. It keeps a connection of `ops` until its end, so several at once
    would leave none for the other routes."""

    @classmethod
    def of(cls, settings: Settings, api: Postgres, mirror: Mirror, rail: Rail) -> "SyncContext":
        ops = Postgres(settings.database_ops_url, settings, size=4)
        return cls(settings, ops, api, mirror, rail)

    @asynccontextmanager
    async def connection_for(self, identity: Identity) -> AsyncIterator[Connection]:
        """Opens a connection that sees what the caller may see: every tenant for operators, their own tenant for
        others. Raises Unavailable."""
        try:
            if identity.role is Role.OPERATOR:
                async with self.ops.connection() as connection:
                    yield connection
            else:
                async with self.api.tenant(identity.tenant) as connection:
                    yield connection
        except UNAVAILABLE as error:
            raise Unavailable("the database is unavailable; retry", retry_after=2.0) from error


def sync_context(request: Call) -> SyncContext:
    found: SyncContext = request.app.state["sync"]
    return found
