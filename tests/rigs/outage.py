"""The system of tests/chaos with one fault at a time: its mirror has two hosts, a load runs, and a proof follows."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from deploy.local.child import Child
from tests.chaos.idle import wait_until_idle
from tests.chaos.load import Load
from tests.chaos.proof import Proof, prove
from tests.chaos.rig import ChaosRig
from tests.chaos.schedule import SERVERS
from tests.rigs.servers import Server, Servers
from tests.rigs.servers.processes import with_own_redis
from tests.rigs.system import eventually


class Outage(ChaosRig):
    """A system with a Redis of its own."""

    def __init__(self, shared: Servers, folder: Path, **settings: Any) -> None:
        self._local = Path(tempfile.mkdtemp(prefix="ticketrail-outage-"))
        super().__init__(with_own_redis(shared, self._local), folder, **{"mirror_settle_seconds": 3.0, **settings})

    async def up(self) -> None:
        await asyncio.to_thread(self.servers.redis.start)
        await super().up()

    async def down(self) -> None:
        await super().down()
        await asyncio.to_thread(self.servers.rabbitmq.delete_vhost, self.system.name)
        await asyncio.to_thread(self.servers.postgres.drop_database, self.system.name)
        await asyncio.to_thread(self.servers.redis.discard)
        shutil.rmtree(self._local, ignore_errors=True)

    async def kill_and_roll_back(self) -> None:
        await asyncio.to_thread(self._with_copies_locked, self._roll_back)

    def target(self, name: str) -> Server | Child:
        """Returns a server or a service. Call its `kill`, `freeze` and `thaw` in a thread: this event loop runs the
        proxies."""
        return self._target(name)

    async def start_again(self, name: str) -> None:
        """Starts a server or a service after a kill -9."""
        if name in SERVERS:
            await asyncio.to_thread(self._server(name).start)
        else:
            self._start(name)
            await self.system.ready(name, within=60.0)

    async def restart(self, name: str) -> None:
        """Kills a server or a service with kill -9 and starts it again."""
        await asyncio.to_thread(self.target(name).kill)
        await self.start_again(name)

    async def warm(self, *, within: float = 60.0) -> None:
        await eventually(self.system.warm, within=within, what="a warm mirror", until=lambda state: state == "warm")

    # -- what callers see --------------------------------------------------------------------------------------

    async def call(
        self, method: str, path: str, body: Any = None, *, service: str = "orders", key: str | None = None
    ) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key else {}
        async with self.system.client("admin", service=service) as client:
            return await client.request(method, path, json=body, headers=headers, timeout=20)

    async def create(self) -> dict[str, Any]:
        """Places an order of one dish over the API, which must accept it; returns the order."""
        reply = await self.call("POST", "/api/orders", {"items": [{"menu_item_id": self.system.dish(), "quantity": 1}]})
        assert reply.status_code == 201, reply.text
        data: dict[str, Any] = reply.json()["data"]
        return data

    async def change_price(self, price: int) -> None:
        """Changes the price of the dish that `create` orders; waits until both orders instances charge it."""
        dish = self.system.dish()
        await self.warm()
        reply = await self.call("PUT", f"/api/menu/{dish}", {"price": price})
        assert reply.status_code == 200, reply.text

        async def charged() -> set[int]:
            found = set()
            for service in ("orders", "second-orders"):
                body = {"items": [{"menu_item_id": dish, "quantity": 1}]}
                found.add((await self.call("POST", "/api/orders", body, service=service)).json()["data"]["subtotal"])
            return found

        await eventually(charged, what="the new price", until=lambda found: found == {price})

    async def assert_refuses_changes(self, order: str) -> None:
        reply = await self.call("PUT", f"/api/orders/{order}", {"notes": "refused"})
        assert reply.status_code == 503, f"{reply.status_code} {reply.text}"
        assert int(reply.headers["retry-after"]) > 0


@asynccontextmanager
async def under_load(rig: ChaosRig, seed: int) -> AsyncIterator[Load]:
    load = Load(rig, seed, clients=4, pause=0.1)
    load.start()
    try:
        yield load
    finally:
        await load.stop()


async def wait_acknowledged(load: Load, more: int, *, kind: str | None = None, within: float = 60.0) -> None:
    """Waits until `more` further requests are acknowledged. With `kind`, only requests of that kind count: created,
    changed or paid."""

    async def count() -> int:
        return sum(kind is None or one.kind == kind for one in load.acknowledged)

    goal = await count() + more
    await eventually(
        count,
        within=within,
        what=f"{more} more requests acknowledged ({kind or 'of any kind'})",
        until=lambda seen: seen >= goal,
    )


async def wait_and_prove(rig: ChaosRig, load: Load) -> Proof:
    """Waits until no change is under way. Then proves that nothing is lost, doubled or unexplained, and that PostgreSQL
    and the mirror agree."""
    await wait_until_idle(rig)
    proof = await prove(rig, load)
    assert proof.acknowledged > 0
    assert proof.holds, f"lost {proof.lost[:5]}, doubled {proof.doubled[:5]}, wrong {proof.wrong[:5]}, {proof}"
    return proof


async def assert_no_version_claimed_twice(rig: ChaosRig) -> None:
    """Asserts that no fork exists, with one exception: while neither store answers, two instances may both create an
    order for one idempotency key. The result is one order with a fork of its first version, and a number from the
    series of each instance."""
    async with rig.system.database() as connection:
        rows = await connection.fetch(
            "select entity_id::text, version, array_agg(data->'after'->>'order_number') as numbers,"
            " array_agg(type || ' ' || accepted_at || ' ' || change_id order by accepted_at) as sides"
            " from changes where entity = 'order' group by 1, 2 having count(*) > 1"
        )
    for row in rows:
        own_series = [number for number in row["numbers"] if "-" in number]
        described = f"{row['entity_id']} version {row['version']}: {row['numbers']} {row['sides']}"
        print(f"fork: {described}")
        assert row["version"] == 1 and len(own_series) >= len(row["numbers"]) - 1, described
