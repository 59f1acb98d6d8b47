"""PostgreSQL fails over to a standby that lacks the last commits, while services use it through a proxy."""

import asyncio
import shutil

from deploy.local import servers as local
from tests.rigs.proxy import Proxy
from tests.rigs.servers import PostgreSQL, Servers
from tests.rigs.servers.processes import LocalProcess, local_server
from tests.rigs.servers.standby import Standby, caught_up


class DatabaseFailover:
    def __init__(self, servers: Servers, proxy: Proxy) -> None:
        """`servers.postgres`: a local process, which each failover replaces. `proxy`: leads the services to it."""
        self._servers = servers
        self._proxy = proxy
        self._number = 0
        self._standby: Standby

    async def begin(self) -> None:
        """Makes a standby of the primary, which streams all commits to it. Then stops the standby: from now on it gets
        no commits."""
        primary = local_server(self._servers.postgres)
        assert isinstance(primary, local.PostgreSQL)
        self._number += 1
        self._standby = Standby(primary.directory.parent / f"standby-{self._number}-{primary.port}", primary)
        await asyncio.to_thread(self._standby.start)
        await caught_up(primary, self._standby)
        await asyncio.to_thread(self._standby.stop)

    async def fail_over(self) -> None:
        """Kills the primary, promotes the standby, and leads the services to it."""
        old = local_server(self._servers.postgres)
        await asyncio.to_thread(old.kill)
        await asyncio.to_thread(self._standby.start)
        await asyncio.to_thread(self._standby.promote)
        self._servers.postgres = PostgreSQL(LocalProcess(self._standby), self._standby.port)
        self._proxy.lead_to(self._standby.port)
        await asyncio.to_thread(shutil.rmtree, old.directory.resolve(), ignore_errors=True)
