"""A mirror that is a primary and its replica. Services know both through proxies, and the replica replicates through a
third one, so a test decides what the replica lacks when it is promoted."""

import asyncio

from tests.rigs.proxy import Mode, Proxy
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually


class MirrorPair:
    def __init__(self, servers: Servers, proxies: dict[str, Proxy]) -> None:
        """The primary is `servers.redis`, which a failover replaces. `proxies` gets the proxies `redis`, always the one
        of the current primary, and `replica`."""
        self._servers = servers
        self._proxies = proxies
        self._replication = Proxy(servers.redis.port)
        self._first = servers.redis
        self.replica: Redis

    async def start(self) -> None:
        """Starts the replica. The primary runs already."""
        self.replica = await asyncio.to_thread(self._servers.extra_redis)
        for name, server in (("redis", self._servers.redis), ("replica", self.replica)):
            self._proxies[name] = Proxy(server.port)
            await self._proxies[name].start()
        await self.replicate()

    async def stop(self) -> None:
        """Ends the replica. The first primary is `servers.redis` again."""
        await self._replication.stop()
        if self._servers.redis is not self._first:
            self._swap()
        await asyncio.to_thread(self.replica.discard)

    def through_proxies(self, database: int = 0) -> str:
        """Returns the setting `redis_url`."""
        return ",".join(f"redis://127.0.0.1:{self._proxies[name].port}/{database}" for name in ("redis", "replica"))

    async def replicate(self) -> None:
        """Makes the replica a copy of the current primary, and waits until it is in sync."""
        await self._replication.stop()
        self._replication = Proxy(self._servers.redis.port)
        await self._replication.start()
        await self._servers.redis.command("CONFIG", "SET", "repl-diskless-sync-delay", 0)
        await self.replica.command("REPLICAOF", "127.0.0.1", self._replication.port)

        async def linked() -> bool:
            info = await self.replica.command("INFO", "replication")
            return bool(info["role"] == "slave" and info["master_link_status"] == "up")

        await eventually(linked, what="a replica in sync")

    def stall(self) -> None:
        """Stops the replication: the replica gets no more writes."""
        self._replication.set(Mode.LOSE)

    async def fail_over(self, *, lost_seconds: float = 0.0) -> None:
        """Stalls the replication for `lost_seconds`, so that the replica lacks the last writes. Then kills the primary
        and promotes the replica."""
        self.stall()
        await asyncio.sleep(lost_seconds)
        await asyncio.to_thread(self._servers.redis.kill)
        await self.replica.command("REPLICAOF", "NO", "ONE")
        self._swap()

    async def switch_over(self, *, lost_seconds: float = 0.0) -> None:
        """Stalls the replication for `lost_seconds`, and promotes the replica. The old primary, which never stops,
        becomes its replica."""
        self.stall()
        await asyncio.sleep(lost_seconds)
        await self.replica.command("REPLICAOF", "NO", "ONE")
        self._swap()
        await self.replicate()

    def _swap(self) -> None:
        self._servers.redis, self.replica = self.replica, self._servers.redis
        proxies = self._proxies
        proxies["redis"], proxies["replica"] = proxies["replica"], proxies["redis"]
