"""A cluster of three RabbitMQ nodes under load: one node is killed and started again; then another is frozen, and its
client connections are half open. No acknowledged change is lost, by broker or journal, and none is doubled."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from shared.entities.contract import Lane
from shared.messaging import topology
from tests.chaos.rig import Rig
from tests.rigs.outage import acknowledged, proven, under_load
from tests.rigs.proxy import Mode, Proxy
from tests.rigs.servers import Servers
from tests.rigs.servers.cluster import SIZE, Cluster
from tests.rigs.servers.processes import local_redis
from tests.rigs.system import eventually

pytestmark = pytest.mark.timeout(300)


class ClusterRig(Rig):
    """The system with all three nodes in its broker setting, each behind a proxy."""

    def __init__(self, cluster: Cluster, shared: Servers, folder: Path) -> None:
        redis = local_redis(folder)
        own = Servers(cluster.nodes[0], shared.postgres, redis, another_redis=lambda: redis, clean=lambda: None)
        super().__init__(own, folder, mirror_settle_seconds=3.0)
        self.cluster = cluster
        self.links = [Proxy(node.port) for node in cluster.nodes]

    async def up(self) -> None:
        await asyncio.to_thread(self.servers.redis.start)
        for link in self.links:
            await link.start()
        await super().up()

    async def down(self) -> None:
        await super().down()
        for link in self.links:
            await link.stop()
        await asyncio.to_thread(self.servers.postgres.drop_database, self.system.name)
        await asyncio.to_thread(self.servers.redis.discard)

    def _through(self, name: str, url: str) -> str:
        if name != "rabbitmq":
            return super()._through(name, url)
        port = f":{self.cluster.nodes[0].port}/"
        return ",".join(url.replace(port, f":{link.port}/") for link in self.links)

    async def whole(self, count: int, *, seen_by: int) -> None:
        """Waits until the node `seen_by` sees `count` running nodes."""

        async def running() -> int:
            return await asyncio.to_thread(self.cluster.running, seen_by)

        await eventually(running, within=60, what=f"{count} nodes running", until=lambda seen: seen == count)

    async def by_the_broker(self) -> None:
        """Waits until both instances of the orders service record by the broker again."""
        for service in ("orders", "second-orders"):

            async def durability(service: str = service) -> str:
                async with self.system.client(service=service) as client:
                    reply = await client.post("/api/orders", json=self.system.order_body())
                    return str(reply.json()["data"]["durability"])

            await eventually(durability, within=60, what="a confirm", until=lambda seen: seen == "broker")


@pytest.fixture
async def clustered(servers: Servers, tmp_path: Path) -> AsyncIterator[ClusterRig]:
    cluster = Cluster(tmp_path / "cluster")
    try:
        await asyncio.to_thread(cluster.start)
        rig = ClusterRig(cluster, servers, tmp_path)
        try:
            await rig.up()
            yield rig
        finally:
            await rig.down()
    finally:
        await asyncio.to_thread(cluster.discard)


async def test_no_acknowledged_change_is_lost_when_one_node_is_killed_and_another_cut_off(
    clustered: ClusterRig,
) -> None:
    cluster = clustered.cluster
    for node in cluster.locals:
        plugins = psutil.Process(node.pid).environ()["ERL_LIBS"].split(":")[0]
        assert plugins == str(node.directory / "home" / "plugins"), "the node does not run from its own home"
    for queue in (topology.lane_queue(Lane.CRITICAL), topology.retry_queue(Lane.CRITICAL, 50), topology.LOG):

        async def members(queue: str = queue) -> list[str]:
            return await asyncio.to_thread(cluster.members, clustered.system.name, queue)

        await eventually(members, what=f"replicas of {queue}", until=lambda seen: len(seen) == SIZE)

    async with under_load(clustered, 5) as load:
        await acknowledged(load, 60)
        # All services are connected to the first node. It leads every queue, because they were declared on it.
        await asyncio.to_thread(cluster.nodes[0].kill)
        await acknowledged(load, 20, what="created")
        await clustered.by_the_broker()
        await acknowledged(load, 20, what="changed")
        await asyncio.to_thread(cluster.nodes[0].start)
        await clustered.whole(SIZE, seen_by=1)
        await acknowledged(load, 20)

        await asyncio.to_thread(cluster.nodes[1].freeze)
        clustered.links[1].set(Mode.LOSE)
        await acknowledged(load, 20, what="created")
        await clustered.whole(SIZE - 1, seen_by=0)
        await clustered.by_the_broker()
        await acknowledged(load, 20, what="changed")
        # The thawed node rejoins with its old state, and clients reach it. Then it is restarted, the usual remedy.
        clustered.links[1].set(Mode.FORWARD)
        await asyncio.to_thread(cluster.nodes[1].thaw)
        await acknowledged(load, 20)
        await asyncio.to_thread(cluster.nodes[1].kill)
        await asyncio.to_thread(cluster.nodes[1].start)
        await clustered.whole(SIZE, seen_by=1)
        await acknowledged(load, 20)
    await proven(clustered, load)
    for service in ("orders", "second-orders", "worker", "notifier"):
        await clustered.system.ready(service)
