"""The dual write, a peer of the accept benchmark, does the work that the benchmark describes."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import pytest
from msgspec import Struct
from redis.asyncio import Redis

from benchmarks.accept_peers import declare_stream
from benchmarks.peers.dual_write import document_key, live_key
from benchmarks.rig import ROOT
from deploy.local.child import Child
from deploy.local.port_check import find_free
from shared.entities import registry
from shared.entities.contract import decode_change, split_batch
from shared.messaging.log import LogReader
from shared.security.tokens import Identity, Role, Tokens
from tests.rigs.http_client import http_client
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

SECRET = "a-secret-for-tests-that-is-long-enough"
RESTAURANT, DISH, USER = (str(uuid4()) for _ in range(3))


class DualWriteUnderTest(Struct):
    url: str
    database_url: str
    redis_url: str
    rabbitmq_url: str

    async def place(self, quantity: int = 2, **headers: str) -> tuple[int, dict[str, object]]:
        token = Tokens(SECRET, ttl_seconds=60).issue(Identity(USER, Role.STAFF, RESTAURANT, "a@example.org"))
        async with http_client() as client:
            reply = await client.post(
                f"{self.url}/api/orders",
                json={"items": [{"menu_item_id": DISH, "quantity": quantity}]},
                headers={"Authorization": f"Bearer {token}", **headers},
            )
        return reply.status_code, reply.json().get("data", {})

    async def orders(self) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self.database_url)
        try:
            found: list[asyncpg.Record] = await connection.fetch("select id::text, order_number, total from orders")
            return found
        finally:
            await connection.close()


@pytest.fixture
async def dual(servers: Servers, tmp_path: Path) -> AsyncIterator[DualWriteUnderTest]:
    name = f"b{uuid4().hex[:10]}"
    await asyncio.to_thread(servers.postgres.make_database, name)
    rabbitmq_url = await asyncio.to_thread(servers.rabbitmq.make_vhost, name)
    await declare_stream(rabbitmq_url)
    (port,) = find_free(1)
    restaurants = tmp_path / "restaurants.json"
    restaurants.write_text(json.dumps({"restaurants": [{"id": RESTAURANT, "dishes": [[DISH, "Soup", 500]]}],
                                       "secret": SECRET}))  # fmt: skip
    found = DualWriteUnderTest(
        f"http://127.0.0.1:{port}", servers.postgres.url("ticketrail_owner", name), servers.redis.url, rabbitmq_url
    )
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("TICKETRAIL_")},
        "BENCH_PORT": str(port),
        "BENCH_DATABASE_URL": found.database_url,
        "BENCH_REDIS_URL": found.redis_url,
        "BENCH_RABBITMQ_URL": rabbitmq_url,
        "BENCH_RESTAURANTS": str(restaurants),
    }
    command = [sys.executable, "-m", "benchmarks.peers.dual_write"]
    child = await asyncio.to_thread(Child.spawn, command, log=tmp_path / "log", env=env, cwd=ROOT)

    async def ready() -> int:
        assert child.returncode is None, child.tail(30)
        async with http_client() as client:
            return (await client.get(f"{found.url}/health/ready")).status_code

    try:
        await eventually(ready, what="a dual write that is ready", until=lambda status: status == 200)
        yield found
    finally:
        await asyncio.to_thread(child.terminate, 10)
        await asyncio.to_thread(servers.rabbitmq.delete_vhost, name)


async def test_dual_write_stores_mirrors_and_pushes_accepted_orders(dual: DualWriteUnderTest) -> None:
    status, placed = await dual.place()
    assert status == 201
    (row,) = await dual.orders()
    assert (row["id"], row["order_number"], row["total"]) == (placed["id"], "0001", placed["total"])

    async with Redis.from_url(dual.redis_url) as redis:
        document = await redis.hget(document_key(RESTAURANT, row["id"]), "d")
        assert document is not None
        assert msgspec.json.decode(document)["order_number"] == "0001"
        assert await redis.zscore(live_key(RESTAURANT), row["id"]) is not None

    reader = LogReader(dual.rabbitmq_url, name="test", idle_seconds=5.0)
    async with aclosing(reader.read("first")) as batches, asyncio.timeout(20):
        async for batch in batches:
            if batch.entries:
                break
    (event,) = split_batch(batch.entries[0].body)
    _, state = registry.read(decode_change(event))
    assert (state.id, state.order_number, state.total) == (row["id"], "0001", row["total"])


async def test_dual_write_gives_one_order_for_a_repeated_key(dual: DualWriteUnderTest) -> None:
    headers: dict[str, Any] = {"Idempotency-Key": "the same"}
    first = await dual.place(**headers)
    assert await dual.place(**headers) == first
    assert len(await dual.orders()) == 1


async def test_dual_write_refuses_the_same_orders_as_the_orders_service(dual: DualWriteUnderTest) -> None:
    status, _ = await dual.place(quantity=-1)
    assert status == 422
    assert (await dual.place(Authorization="Bearer nonsense"))[0] == 401
    assert await dual.orders() == []
