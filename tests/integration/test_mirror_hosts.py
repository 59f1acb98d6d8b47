"""A mirror of several hosts: the connection finds the primary, and finds it again after a failover."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis.asyncio

from deploy.local.port_check import find_free
from shared.mirror import keys
from shared.mirror.connection import MirrorConnection, MirrorInDoubt, MirrorUnavailable
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually

TIMEOUT_SECONDS = 5.0
SHORT_TIMEOUT_SECONDS = 0.5  # for tests that freeze the server


@pytest.fixture(scope="module")
async def pair(servers: Servers) -> AsyncIterator[tuple[Redis, Redis]]:
    found = await asyncio.to_thread(servers.extra_redis), await asyncio.to_thread(servers.extra_redis)
    yield found
    for one in found:
        await asyncio.to_thread(one.discard)


async def ask(server: Redis, *command: object) -> object:
    async with redis.asyncio.from_url(server.url, socket_timeout=5, decode_responses=True) as client:
        return await client.execute_command(*command)


async def replicate(replica: Redis, primary: Redis) -> None:
    await ask(primary, "CONFIG", "SET", "repl-diskless-sync-delay", 0)
    await ask(replica, "REPLICAOF", "127.0.0.1", primary.port)

    async def linked() -> bool:
        info = await ask(replica, "INFO", "replication")
        assert isinstance(info, dict)
        return bool(info["role"] == "slave" and info["master_link_status"] == "up")

    await eventually(linked, what="a replica in sync")


async def stamp(server: Redis, offset: int, *, warm: bool = True) -> None:
    info = await ask(server, "INFO")
    assert isinstance(info, dict)
    name = f"{info['run_id']}:{info['master_replid']}" if warm else "of-another"
    await ask(server, "HSET", keys.WARM, "server", name, "identity", 1)
    await ask(server, "HSET", keys.LOG, "offset", offset)


def both(pair: tuple[Redis, Redis], *more: str, timeout: float = TIMEOUT_SECONDS) -> MirrorConnection:
    return MirrorConnection(",".join([*more, pair[0].url, pair[1].url]), timeout=timeout)


async def connected_index(mirror: MirrorConnection, pair: tuple[Redis, Redis]) -> int:
    """Returns the index of the server in the pair that the mirror is connected to."""
    info = await mirror.call("CONFIG", "GET", "port")
    return [one.port for one in pair].index(int(info[1]))


async def test_primary_is_found_at_any_place_in_the_setting(pair: tuple[Redis, Redis]) -> None:
    (unused_port,) = find_free(1)
    await ask(pair[1], "REPLICAOF", "NO", "ONE")
    await replicate(pair[0], pair[1])
    mirror = both(pair, f"redis://127.0.0.1:{unused_port}/0")
    assert await connected_index(mirror, pair) == 1
    await mirror.close()


async def test_replica_alone_is_not_used_as_a_mirror(pair: tuple[Redis, Redis]) -> None:
    await ask(pair[1], "REPLICAOF", "NO", "ONE")
    await replicate(pair[0], pair[1])
    mirror = MirrorConnection(pair[0].url, timeout=TIMEOUT_SECONDS)
    with pytest.raises(MirrorUnavailable, match="replica"):
        await mirror.call("PING")
    await mirror.close()


async def test_primary_that_became_a_replica_is_left_for_the_new_primary(pair: tuple[Redis, Redis]) -> None:
    await ask(pair[0], "REPLICAOF", "NO", "ONE")
    await replicate(pair[1], pair[0])
    mirror = both(pair)
    assert await connected_index(mirror, pair) == 0
    await ask(pair[1], "REPLICAOF", "NO", "ONE")
    await replicate(pair[0], pair[1])

    async def written() -> bool:
        try:
            await mirror.call("SET", "after", 1)
        except (MirrorUnavailable, MirrorInDoubt):
            return False
        return True

    await eventually(written, what="a write on the new primary")
    assert await ask(pair[1], "GET", "after") == "1"
    await mirror.close()


async def test_frozen_primary_is_left_for_the_promoted_replica(pair: tuple[Redis, Redis]) -> None:
    await ask(pair[0], "REPLICAOF", "NO", "ONE")
    await replicate(pair[1], pair[0])
    mirror = both(pair, timeout=SHORT_TIMEOUT_SECONDS)

    async def found() -> int:
        try:
            return await connected_index(mirror, pair)
        except (MirrorUnavailable, MirrorInDoubt):
            return -1

    await eventually(found, what="the first server", until=lambda place: place == 0)
    await asyncio.to_thread(pair[0].freeze)
    try:
        await ask(pair[1], "REPLICAOF", "NO", "ONE")
        await eventually(found, what="the promoted server", until=lambda place: place == 1)
    finally:
        await asyncio.to_thread(pair[0].thaw)
        await mirror.close()


async def test_warm_primary_wins_over_a_cold_one_and_the_later_log_offset_decides_between_two(
    pair: tuple[Redis, Redis],
) -> None:
    for one in pair:
        await ask(one, "REPLICAOF", "NO", "ONE")
    for offsets, warm, expected in (((9, 5), (False, True), 1), ((5, 9), (True, True), 1), ((9, 5), (True, True), 0)):
        for one, offset, is_warm in zip(pair, offsets, warm, strict=True):
            await stamp(one, offset, warm=is_warm)
        mirror = both(pair)
        assert await connected_index(mirror, pair) == expected
        await mirror.close()
