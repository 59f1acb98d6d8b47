"""The connection to the mirror on a real Redis: frozen servers, breakers, lost scripts, and calls in doubt."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import from_url

from shared.entities.contract import Head
from shared.mirror import keys
from shared.mirror.connection import MirrorConnection, MirrorInDoubt, MirrorMisconfigured, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.rail.assemble import assemble_rail
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.mirror import answers, head_of, state
from tests.rigs.proxy import Mode, Proxy
from tests.rigs.servers import Redis, Servers
from tests.rigs.servers.processes import local_redis
from tests.rigs.system import eventually

BREAKER_OPEN = "the mirror did not answer a moment ago"
TIMEOUT_SECONDS = 5.0
SHORT_TIMEOUT_SECONDS = 0.3  # for tests that freeze the server


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because its tests freeze it, stop it and clear it."""
    return servers.extra_redis()


@pytest.fixture
async def link(redis: Redis) -> AsyncIterator[MirrorConnection]:
    link = MirrorConnection(redis.url, timeout=TIMEOUT_SECONDS)
    yield link
    await link.close()


@pytest.fixture
async def mirror(redis: Redis) -> AsyncIterator[Mirror]:
    mirror = Mirror(redis.url, timeout=5.0, stale_seconds=0.0)
    yield mirror
    await mirror.close()


@asynccontextmanager
async def configured(redis: Redis, setting: str, value: str | int) -> AsyncIterator[None]:
    """Changes a setting of the server for the block and restores it. Uses a client without a timeout, because a restore
    that fails would leave the setting changed for every later test."""
    async with from_url(redis.url) as client:
        before = (await client.config_get(setting))[setting]
        assert before is not None
        await client.config_set(setting, value)
        try:
            yield
        finally:
            await client.config_set(setting, before)


async def test_calls_that_wait_at_the_same_moment_get_their_own_replies(link: MirrorConnection) -> None:
    replies = await asyncio.gather(*(link.call("ECHO", f"{n}") for n in range(2_000)))
    assert replies == [f"{n}".encode() for n in range(2_000)]


async def test_server_error_reaches_only_its_own_caller(link: MirrorConnection) -> None:
    commands = (("ECHO", "a"), ("NO SUCH COMMAND",), ("ECHO", "b"))
    good, bad, also = await asyncio.gather(*(link.call(*one) for one in commands), return_exceptions=True)
    assert (good, also) == (b"a", b"b")
    assert isinstance(bad, MirrorInDoubt)
    assert link.available, "a call that fails beside others opened the breaker"


async def test_script_that_fails_in_the_middle_is_in_doubt_and_opens_the_breaker(
    link: MirrorConnection, mirror: Mirror, redis: Redis
) -> None:
    """Redis keeps what a script has written before its error."""
    restaurant, id_ = builders.new_id(), builders.new_id()
    await redis.command("SET", keys.live(restaurant, "order"), "not a sorted set")
    with pytest.raises(MirrorInDoubt, match="WRONGTYPE"):
        await mirror.apply([state(1, id_=id_, restaurant=restaurant)])
    assert await redis.command("HGET", keys.doc(restaurant, "order", id_), "v") == b"1"
    assert not mirror.available
    await eventually(lambda: answers(mirror), what="a successful probe")
    assert mirror.available


@pytest.fixture
async def impatient(redis: Redis) -> AsyncIterator[MirrorConnection]:
    """A connection with a short timeout, for tests that freeze the server."""
    impatient = MirrorConnection(redis.url, timeout=SHORT_TIMEOUT_SECONDS)
    yield impatient
    await impatient.close()


async def test_frozen_server_is_in_doubt_once_then_unavailable_at_once_until_a_probe_succeeds(
    link: MirrorConnection, impatient: MirrorConnection, redis: Redis
) -> None:
    await link.call("SET", "k", "before")
    await eventually(lambda: answers(impatient), what="a connection")
    await asyncio.to_thread(redis.freeze)
    try:
        sent = await asyncio.gather(impatient.call("INCR", "n"), impatient.call("GET", "k"), return_exceptions=True)
        assert [type(one) for one in sent] == [MirrorInDoubt, MirrorInDoubt]
        refusals = set()

        async def down() -> bool:
            with pytest.raises(MirrorUnavailable) as refused:  # probes fail as well
                await impatient.call("PING")
            refusals.add(str(refused.value))
            return impatient.down and BREAKER_OPEN in refusals

        await eventually(down, what="several failed attempts and calls that were refused without one")
    finally:
        await asyncio.to_thread(redis.thaw)
    await eventually(lambda: answers(impatient), what="a successful probe")
    assert impatient.available
    assert not impatient.down

    async def own_replies() -> list[Any] | None:
        try:
            return list(await asyncio.gather(impatient.call("GET", "k"), impatient.call("ECHO", "mine")))
        except (MirrorUnavailable, MirrorInDoubt):
            return None

    # The replies to calls in doubt are dropped: the next caller gets its own reply.
    replies = await eventually(own_replies, what="two replies", until=lambda seen: seen is not None)
    assert replies == [b"before", b"mine"]


async def test_missing_server_is_unavailable_and_nothing_was_sent() -> None:
    link = MirrorConnection("redis://127.0.0.1:1/0", timeout=TIMEOUT_SECONDS)
    for _ in range(3):
        with pytest.raises(MirrorUnavailable):
            await link.call("PING")
    await link.close()
    await link.close()


async def test_scripts_that_the_server_lost_are_loaded_again_for_all_callers(redis: Redis, mirror: Mirror) -> None:
    await mirror.check()
    for _ in range(5):
        await redis.command("SCRIPT FLUSH")
        found = await asyncio.wait_for(
            asyncio.gather(*(mirror.read("r", "order", [f"{n}" * 200]) for n in range(700))), 30
        )
        assert [documents for _, documents in found] == [[None]] * 700


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_server_that_evicts_keys_is_refused(redis: Redis, link: MirrorConnection, policy: str) -> None:
    async with configured(redis, "maxmemory-policy", policy):
        with pytest.raises(MirrorMisconfigured, match=f"{policy}.*set `maxmemory-policy noeviction`"):
            await link.check()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cluster-enabled", "yes"), "cluster mode.*set `cluster-enabled no`"),
        (("--rename-command", "INFO", ""), "refuses INFO in scripts.*remove `rename-command INFO`"),
        (("--rename-command", "EVAL", ""), "refuses EVAL.*allow it to the user"),
    ],
    ids=["cluster", "no info", "no scripts"],
)
async def test_server_that_cannot_be_a_mirror_is_refused_and_the_error_names_the_setting(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    server = local_redis(tmp_path, *arguments)
    await asyncio.to_thread(server.start)
    link = MirrorConnection(server.url, timeout=TIMEOUT_SECONDS)
    try:
        with pytest.raises(MirrorMisconfigured, match=told) as refused:
            await link.check()
        assert "TICKETRAIL_REDIS_URL" in str(refused.value) or f"127.0.0.1:{server.port}" in str(refused.value)
    finally:
        await link.close()
        await asyncio.to_thread(server.discard)


@pytest.mark.parametrize("command", ["info", "eval", "script"])
async def test_user_that_lacks_a_command_is_refused_with_its_name(redis: Redis, command: str) -> None:
    await redis.command("ACL", "SETUSER", "limited", "on", ">secret", "~*", "+@all", f"-{command}")
    link = MirrorConnection(redis.url.replace("://", "://limited:secret@"), timeout=TIMEOUT_SECONDS)
    try:
        with pytest.raises(MirrorMisconfigured, match=f"(?i)refuses {command}.*TICKETRAIL_REDIS_URL"):
            await link.check()
    finally:
        await link.close()
        await redis.command("ACL", "DELUSER", "limited")


async def test_skew_between_the_clocks_is_measured_and_warned_of_above_five_seconds(
    redis: Redis, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = assemble_rail(Settings(_env_file=None, redis_url=redis.url), mirror=mirror)
    details = await parts.clock_details()
    assert abs(details["clock_skew_seconds"]) < 5 and "warnings" not in details
    present = time.time
    monkeypatch.setattr(time, "time", lambda: present() - 3600)
    details = await parts.clock_details()
    assert details["clock_skew_seconds"] == pytest.approx(3600, abs=5)
    assert "3600 s behind the clock of Redis" in details["warnings"][0]
    monkeypatch.setattr(time, "time", lambda: present() + 60)
    assert "60 s ahead of the clock of Redis" in (await parts.clock_details())["warnings"][0]


async def test_full_server_refuses_writes_without_effect_and_still_serves_reads(mirror: Mirror, redis: Redis) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    await mirror.apply([state(1, id_=id_, restaurant=restaurant)])
    async with configured(redis, "maxmemory", 1):
        with pytest.raises(MirrorUnavailable):
            await mirror.apply([state(2, id_=id_, restaurant=restaurant)])
        assert await head_of(mirror, restaurant, id_) == Head(1, str(UUID(int=1)))
    await mirror.apply([state(2, id_=id_, restaurant=restaurant)])
    assert await head_of(mirror, restaurant, id_) == Head(2, str(UUID(int=1)))


async def test_close_answers_all_waiting_calls(redis: Redis) -> None:
    link = MirrorConnection(redis.url, timeout=TIMEOUT_SECONDS, max_pipeline_commands=1)
    calls = [asyncio.create_task(link.call("PING")) for _ in range(50)]
    await asyncio.sleep(0)
    await link.close()
    for one in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30):
        assert one == b"PONG" or isinstance(one, (MirrorUnavailable, MirrorInDoubt))


def test_reset_connection_answers_every_caller_under_uvloop() -> None:
    """uvloop raises its own kind of error for a write to a transport that a reset has closed."""
    import socket
    import struct

    import uvloop

    async def reset_at_once() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sent = writer.get_extra_info("socket")
            writer.write(b"+OK\r\n" * 8)  # replies to the first commands of the client
            await reader.read(1)
            sent.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        link = MirrorConnection(f"redis://127.0.0.1:{port}/0", timeout=0.5)
        for _ in range(5):
            with pytest.raises((MirrorUnavailable, MirrorInDoubt)):
                await asyncio.wait_for(link.call("PING"), 30.0)
        await link.close()
        server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(reset_at_once())


async def test_only_one_of_many_calls_probes_a_silent_server_and_none_waits_for_it(redis: Redis) -> None:
    proxy = Proxy(redis.port)
    await proxy.start()
    link = MirrorConnection(f"redis://127.0.0.1:{proxy.port}/0", timeout=20.0)
    try:
        assert await answers(link)
        proxy.set(Mode.REFUSE)
        assert not await answers(link)
        proxy.set(Mode.STALL)

        async def half_open() -> bool:
            return link.available

        await eventually(half_open, what="a breaker that allows a probe")
        tried = proxy.accepted
        calls = [asyncio.create_task(link.call("PING")) for _ in range(50)]
        done, waiting = await asyncio.wait(calls, timeout=10.0)
        assert not waiting, "calls waited for the probe, which takes twenty seconds"
        assert {type(call.exception()) for call in done} == {MirrorUnavailable}

        async def arrived() -> bool:
            return proxy.accepted > tried

        await eventually(arrived, what="the probe at the server")
        _, second = await asyncio.open_connection("127.0.0.1", proxy.port)

        async def second_accepted() -> bool:
            return proxy.accepted >= tried + 2

        await eventually(second_accepted, what="the second connection")
        assert proxy.accepted == tried + 2, "a call opened a connection besides the probe and the test's own"
        second.transport.abort()
        proxy.set(Mode.FORWARD)

        async def back() -> bool:
            return await answers(link)

        await eventually(back, what="a reply")
        assert await asyncio.gather(*(link.call("PING") for _ in range(50))) == [b"PONG"] * 50
    finally:
        await link.close()
        await proxy.stop()


async def test_call_that_a_closed_connection_never_sent_is_not_in_doubt(redis: Redis) -> None:
    proxy = Proxy(redis.port)
    await proxy.start()
    link = MirrorConnection(f"redis://127.0.0.1:{proxy.port}/0", timeout=5.0)

    async def hung_up() -> bool:
        return not link.connected

    try:
        for _ in range(3):
            assert await answers(link)
            assert link.connected
            proxy.set(Mode.REFUSE)
            await eventually(hung_up, what="the end of the connection")
            proxy.set(Mode.FORWARD)
            assert await link.call("PING") == b"PONG"
        proxy.set(Mode.REFUSE)
        await eventually(hung_up, what="the end of the connection")
        with pytest.raises(MirrorUnavailable):
            await link.call("PING")
    finally:
        await link.close()
        await proxy.stop()
