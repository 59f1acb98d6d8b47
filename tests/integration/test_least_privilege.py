"""Each service works with a user of its own in each backend, and that user can do nothing else. The permissions are
those of `ticketrail migrate` and of docker-compose.yml."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aio_pika
import asyncpg
import httpx
import pytest
import redis.asyncio
import yaml
from aiormq.exceptions import ChannelAccessRefused
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.exceptions import ConnectionError as NotConnected

from deploy.local import packages
from deploy.local.child import Child
from deploy.local.port_check import find_free
from shared.entities.contract import Lane
from shared.messaging import topology
from shared.messaging.management import ask
from tests.rigs.dead_letters import OperatorRig, operator_rig
from tests.rigs.restaurant import expect
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import ROOT, System, eventually

NAMES = {"orders": "orders", "worker": "sync-worker", "sync": "sync-api", "notifier": "notifier"}
"""Service in a `System` -> its name in the settings."""
PASSWORD = "a-password-of-a-service"
VALKEY = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["valkey"]
MIRROR_COMMANDS = VALKEY["environment"]["MIRROR_COMMANDS"]


def user_of(system: System, service: str) -> str:
    return f"{service}-{system.name}"


def broker_url(system: System, service: str) -> str:
    return system.rabbitmq_url.replace("ticketrail:ticketrail@", f"{user_of(system, service)}:{PASSWORD}@")


def mirror_url(system: System, service: str) -> str:
    return system.redis.url.replace("redis://", f"redis://{user_of(system, service)}:{PASSWORD}@")


async def allow_mirror_commands(mirror: Redis, user: str) -> None:
    """Makes the user as docker-compose.yml does."""
    await mirror.command(
        "ACL", "SETUSER", user, "on", f">{PASSWORD}", "~*", "resetchannels", "-@all", *MIRROR_COMMANDS.split()
    )


@pytest.fixture(scope="module")
async def system(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A system whose services have users of their own."""
    mirror = await asyncio.to_thread(servers.extra_redis)
    system = System(servers, tmp_path_factory.mktemp("system"), redis=mirror)
    urls = {name: broker_url(system, service) for service, name in NAMES.items()}
    system.env["TICKETRAIL_RABBITMQ_SERVICE_URLS"] = json.dumps(urls)
    for service in NAMES:
        with_mirror = service != "notifier"
        system.environments[service] = {
            "TICKETRAIL_RABBITMQ_URL": broker_url(system, service),
            "TICKETRAIL_REDIS_URL": mirror_url(system, service) if with_mirror else "",
            "TICKETRAIL_RABBITMQ_SERVICE_URLS": "{}",
            "TICKETRAIL_RABBITMQ_MANAGEMENT_URL": "",
        }
        if with_mirror:
            await allow_mirror_commands(mirror, user_of(system, service))
    try:
        await system.up()
        yield system
    finally:
        await system.down()
        for service in NAMES:
            path = f"/api/users/{quote(user_of(system, service), safe='')}"
            await asyncio.to_thread(ask, servers.rabbitmq.management_url, "DELETE", path)
        await asyncio.to_thread(mirror.discard)


@pytest.fixture
async def ops_rig(system: System) -> AsyncIterator[OperatorRig]:
    async with operator_rig(system) as rig:
        yield rig


async def test_services_with_users_of_their_own_place_push_repair_and_report(ops_rig: OperatorRig) -> None:
    system = ops_rig.system
    async with (
        ops_rig.restaurant.client() as staff,
        system.client(token=ops_rig.restaurant.token, service="notifier") as screen,
        screen.stream("GET", "/api/v1/sync/events", timeout=60.0) as events,
    ):
        lines = events.aiter_lines()
        order_id = await ops_rig.place()

        async def pushed() -> bool:
            return order_id in await anext(lines)

        await eventually(pushed, within=30, what="the order on the screen")
        assert (await staff.get(f"/api/orders/{order_id}")).headers["x-served-by"] == "mirror"
    await ops_rig.sync_state(order_id, "synced")

    # The worker publishes to a dead-letter queue and reads it; the sync API commits an edit and reads the change log.
    await ops_rig.poison("least-privilege")
    [dead_letter] = await ops_rig.dead_letters(1, text="least-privilege")
    async with ops_rig.client() as nadia:
        table = {**json.loads((await nadia.get(f"/api/ops/dead-letters/{dead_letter['id']}")).text)["data"]["event"]}
        table["data"]["after"]["seats"] = 4

        async def edited() -> httpx.Response:
            revision = expect(await nadia.get(f"/api/ops/dead-letters/{dead_letter['id']}"))["dead_letter"]["revision"]
            body = {"revision": revision, "event": table, "why": "four seats"}
            return await nadia.post(f"/api/ops/dead-letters/{dead_letter['id']}/edit", json=body)

        # The mirror's copy of the dead letter may arrive in between.
        reply = await eventually(edited, what="an edit", until=lambda reply: reply.status_code == 200)
        await eventually(lambda: ops_rig.written(expect(reply)["replaced_by"]), what="the edit written")

        async def report() -> dict[str, Any]:
            found: dict[str, Any] = expect(await nadia.get("/api/ops/ledger", params={"whole": "true"}))
            return found

        found = await eventually(report, within=60, what="a report", until=lambda seen: not seen["queued"])
        assert (found["unexplained"], found["unavailable"]) == (0, [])


@pytest.mark.parametrize("service", NAMES)
async def test_no_service_can_declare_a_queue_or_read_data_that_it_does_not_need(system: System, service: str) -> None:
    connection = await aio_pika.connect(broker_url(system, service))
    async with connection:
        with pytest.raises(ChannelAccessRefused):
            await (await connection.channel()).declare_queue("another", durable=True)
        with pytest.raises(ChannelAccessRefused):
            await (await connection.channel()).queue_delete(topology.MIRROR_DEAD)
        if service == "worker":
            return
        channel = await connection.channel()
        lane = await channel.get_queue(topology.lane_queue(Lane.CRITICAL), ensure=False)
        with pytest.raises(ChannelAccessRefused):
            await lane.get(fail=False)
        if service == "notifier":
            exchange = await (await connection.channel()).get_exchange(topology.CHANGES, ensure=False)
            with pytest.raises(ChannelAccessRefused):
                await exchange.publish(aio_pika.Message(b"[]"), Lane.NORMAL.value)


async def test_no_user_of_the_mirror_can_wipe_or_configure_it(system: System) -> None:
    for service in ("orders", "worker", "sync"):
        async with redis.asyncio.from_url(mirror_url(system, service)) as client:
            assert await client.ping()
            for command in ("FLUSHALL", "CONFIG GET *", "KEYS *", "ACL LIST", "SHUTDOWN NOSAVE"):
                with pytest.raises(NoPermissionError):
                    await client.execute_command(*command.split())


async def test_mirror_of_compose_keeps_the_writes_of_scripts_over_a_restart_and_refuses_unnamed_users(
    tmp_path: Path,
) -> None:
    (port,) = find_free(1)
    text = VALKEY["command"][2].replace("$$", "$")
    for ours, here in {
        "valkey-server": str(packages.ensure().redis_server),
        "port 6379": f"port {port}",
        "bind * -::*": "bind 127.0.0.1",
        "dir /data": f"dir {tmp_path}",
    }.items():
        assert ours in text
        text = text.replace(ours, here)
    env = {"PATH": os.defpath, "MIRROR_COMMANDS": MIRROR_COMMANDS}
    env |= {f"{name}_PASSWORD": PASSWORD for name in ("ORDERS", "WORKER", "SYNC")}

    def start() -> Child:
        return Child.spawn([*VALKEY["command"][:2], text], log=tmp_path / "log", env=env, cwd=tmp_path)

    async def answers() -> bool:
        try:
            return bool(await client.ping())
        except NotConnected:  # it is not up yet, or reads its file
            return False

    server = start()
    try:
        async with redis.asyncio.from_url(f"redis://orders:{PASSWORD}@127.0.0.1:{port}/0") as client:
            await eventually(answers, what="the mirror")
            both = "redis.call('SET', KEYS[1], 'a') redis.call('SET', KEYS[2], 'b')"
            await client.execute_command("EVAL", both, 2, "first", "second")
            assert server.terminate(10)
            server = start()
            await eventually(answers, what="the mirror again")
            assert [await client.get(name) for name in ("first", "second")] == [b"a", b"b"]
        for url in (f"redis://127.0.0.1:{port}/0", f"redis://default:{PASSWORD}@127.0.0.1:{port}/0"):
            async with redis.asyncio.from_url(url) as stranger:
                with pytest.raises(AuthenticationError):
                    await stranger.get("first")
    finally:
        server.kill()


async def test_operators_see_users_without_their_hashes(system: System) -> None:
    async with system.database("ticketrail_ops") as ops:
        assert await ops.fetch("select id, email, name, role, is_active from users")
        for secret in ("password_hash from users", "* from users", "key_sha256 from api_keys"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await ops.fetch(f"select {secret}")
