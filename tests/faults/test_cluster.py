"""A cluster of three RabbitMQ nodes under load: one node is killed and started again. Then another node is frozen, and
its client connections are half open. No change that the broker or a journal took is lost or doubled."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from shared.entities.contract import Lane
from shared.messaging import topology
from tests.chaos.rig import ChaosRig
from tests.rigs.outage import under_load, wait_acknowledged, wait_and_prove
from tests.rigs.proxy import Mode, Proxy
from tests.rigs.servers import Servers
from tests.rigs.servers.cluster import SIZE, Cluster
from tests.rigs.servers.processes import local_redis
from tests.rigs.system import eventually

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # three brokers start and two of them fail


class ClusterRig(ChaosRig):
    """The system with all three nodes in its broker setting, each behind a proxy."""

    def __init__(self, cluster: Cluster, shared: Servers, folder: Path) -> None:
        redis = local_redis(folder)
        own = Servers(
            cluster.nodes[0], shared.postgres, redis, another_redis=lambda: local_redis(folder), clean=lambda: None
        )
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

    def _through_proxy(self, name: str, url: str) -> str:
        if name != "rabbitmq":
            return super()._through_proxy(name, url)
        port = f":{self.cluster.nodes[0].port}/"
        return ",".join(url.replace(port, f":{link.port}/") for link in self.links)

    async def wait_running(self, count: int, *, seen_by: int) -> None:
        """Waits until the node `seen_by` sees `count` running nodes."""

        async def running() -> int:
            return await asyncio.to_thread(self.cluster.running, seen_by)

        await eventually(running, within=60, what=f"{count} nodes running", until=lambda seen: seen == count)

    async def wait_for_confirms(self) -> None:
        """Waits until the broker confirms the changes of both orders instances again."""
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
        await wait_acknowledged(load, 60)
        # All services are connected to the first node. It leads every queue, because they were declared on it.
        await asyncio.to_thread(cluster.nodes[0].kill)
        await wait_acknowledged(load, 20, kind="created")
        await clustered.wait_for_confirms()
        await wait_acknowledged(load, 20, kind="changed")
        await asyncio.to_thread(cluster.nodes[0].start)
        await clustered.wait_running(SIZE, seen_by=1)
        await wait_acknowledged(load, 20)

        await asyncio.to_thread(cluster.nodes[1].freeze)
        clustered.links[1].set(Mode.LOSE)
        await wait_acknowledged(load, 20, kind="created")
        await clustered.wait_running(SIZE - 1, seen_by=0)
        await clustered.wait_for_confirms()
        await wait_acknowledged(load, 20, kind="changed")
        # The thawed node has its old state, and clients reach it. The usual repair follows: restart the node.
        clustered.links[1].set(Mode.FORWARD)
        await asyncio.to_thread(cluster.nodes[1].thaw)
        await wait_acknowledged(load, 20)
        await asyncio.to_thread(cluster.nodes[1].kill)
        await asyncio.to_thread(cluster.nodes[1].start)
        await clustered.wait_running(SIZE, seen_by=1)
        await wait_acknowledged(load, 20)
    await wait_and_prove(clustered, load)
    for service in ("orders", "second-orders", "worker", "notifier"):
        await clustered.system.ready(service)
