"""Redis fails over to its replica and back to the first server, which never stopped and keeps its run id."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.errors import Unavailable
from shared.mirror import keys
from shared.mirror.claim_replies import Claimed
from shared.mirror.mirror import Mirror
from shared.settings import Settings
from tests.rigs.rail.broker import MemoryBroker
from tests.rigs.rail.instance import RailRig
from tests.rigs.rail.mirror_server import MirrorServer
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually


@pytest.fixture
async def pair(servers: Servers) -> AsyncIterator[tuple[Redis, Redis]]:
    found = await asyncio.to_thread(servers.extra_redis), await asyncio.to_thread(servers.extra_redis)
    yield found
    for one in found:
        await asyncio.to_thread(one.discard)


async def replicate(replica: Redis, primary: Redis) -> None:
    await primary.command("CONFIG", "SET", "repl-diskless-sync-delay", 0)
    await replica.command("REPLICAOF", "127.0.0.1", primary.port)

    async def in_sync() -> bool:
        theirs, ours = await primary.command("INFO", "replication"), await replica.command("INFO", "replication")
        linked = ours["role"] == "slave" and ours["master_link_status"] == "up"
        return bool(linked and ours["slave_repl_offset"] == theirs["master_repl_offset"])

    await eventually(in_sync, what="a replica in sync")


async def test_change_that_was_refused_with_503_does_not_appear_after_a_failback(pair: tuple[Redis, Redis]) -> None:
    first, second = pair
    await replicate(second, first)
    broker: Any = MemoryBroker()
    mirror = Mirror(first.url, timeout=5.0, stale_seconds=0.0)
    rig = RailRig(Settings(_env_file=None, redis_url=first.url), MirrorServer(first.url), mirror=mirror, broker=broker)
    await rig.server.warm()
    created = await rig.rail.commit(rig.creation())
    left, reply = await rig.claim(rig.update(created, notes="refused"))
    assert isinstance(reply, Claimed)
    await replicate(second, first)
    run_id = (await first.command("INFO", "server"))["run_id"]

    # Failover: the replica has the claim. Its owner takes it back on the old primary, and replies 503.
    await second.command("REPLICAOF", "NO", "ONE")
    assert await mirror.take_back(left) is True
    # The old primary becomes a replica, gets the claim again, and is promoted: the failback.
    await replicate(first, second)
    await first.command("REPLICAOF", "NO", "ONE")
    await replicate(second, first)
    assert (await first.command("INFO", "server"))["run_id"] == run_id
    claim = keys.claim(rig.restaurant, "order", created.state.id)
    assert await first.command("HGET", claim, "c") == left.id.encode(), "the claim did not come back"

    assert not await mirror.is_warm()
    with pytest.raises(Unavailable):
        await rig.rail.commit(rig.update(created, notes="too early"))
    assert await rig.rail.claim_finisher.finish_all() == 0
    await rig.server.warm()
    won = await rig.rail.commit(rig.update(created, notes="won"))
    assert (won.head.version, won.state.notes) == (2, "won")
    assert broker.recorded().keys() == {created.head.change_id, won.head.change_id}
    await rig.down()
