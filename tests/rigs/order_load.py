"""A load that places and changes orders over HTTP and remembers the replies. Its checks then compare the replies with
the stores."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aio_pika
import httpx

from shared.entities.contract import now
from shared.messaging import topology
from tests.rigs.http_client import http_client
from tests.rigs.system import System, eventually


class Load:
    """Clients that place orders until the block ends.

    `placed`: id -> order number. `versions`: id -> highest acknowledged version. `journaled`: number of replies with
    durability `journal`. `unknown`: number of requests without a known outcome (504, or no reply).
    """

    def __init__(
        self,
        system: System,
        *,
        clients: int = 6,
        changes: bool = True,
        pause: float = 0.05,
        instances: Sequence[str] = ("orders",),
    ) -> None:
        """`instances` are names of orders instances; the clients are spread over them."""
        self._instances = instances
        self._system = system
        self._clients = clients
        self._changes = changes
        self._pause = pause
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self.placed: dict[str, str] = {}
        self.versions: dict[str, int] = {}
        self.journaled = 0
        self.invisible = 0
        self.refused: Counter[tuple[str, int]] = Counter()
        self.unknown = 0
        self.unexpected: list[str] = []
        self._since = now()
        """Changes that were accepted before this time do not belong to the load, even if they arrive later."""

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        assert not self.unexpected, self.unexpected[:3]

    async def more(self, count: int, *, within: float = 30.0) -> None:
        """Waits until `count` more orders are acknowledged."""
        goal = len(self.placed) + count

        async def enough() -> int:
            return len(self.placed)

        await eventually(enough, within=within, what=f"{goal} orders", until=lambda seen: seen >= goal)

    async def _work(self, number: int) -> None:
        async with self._system.client(service=self._instances[number % len(self._instances)]) as client:
            while not self._stop.is_set():
                placed = await self._send(client, "POST", "/api/orders", self._system.order_body())
                if placed is not None:
                    self.placed[placed["id"]] = placed["order_number"]
                    self.versions[placed["id"]] = 1
                    if self._changes:
                        await self._change(client, placed["id"])
                await asyncio.sleep(self._pause)

    async def _change(self, client: httpx.AsyncClient, id_: str) -> None:
        for status in ("received", "preparing"):
            changed = await self._send(client, "PUT", f"/api/orders/{id_}", {"status": status})
            if changed is None:
                return
            self.versions[id_] = changed["version"]

    async def _send(
        self, client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any]
    ) -> dict[str, Any] | None:
        try:
            reply = await client.request(method, path, json=body)
        except httpx.HTTPError:
            self.unknown += 1
            return None
        if reply.status_code in (200, 201):
            data: dict[str, Any] = reply.json()["data"]
            self.journaled += data["durability"] == "journal"
            self.invisible += not data["visible"]
            return data
        if reply.status_code == 504:
            self.unknown += 1
        elif reply.status_code == 503:
            assert "retry-after" in reply.headers
            self.refused[method, 503] += 1
        else:
            self.unexpected.append(f"{method} {path}: {reply.status_code} {reply.text}")
        return None

    # -- afterwards --------------------------------------------------------------------------------------------

    async def everything_arrives(self, *, within: float = 40.0) -> None:
        """Asserts that PostgreSQL has every acknowledged change once and no refused one."""

        async def missing() -> int:
            stored = await self._system.stored_orders()
            return sum(stored.get(id_, 0) < version for id_, version in self.versions.items())

        try:
            await eventually(missing, within=within, what="every acknowledged change", until=lambda count: count == 0)
        except AssertionError as error:
            async with http_client() as client:
                worker = (await client.get(f"{self._system.urls['worker']}/health/ready")).text
            depths = await asyncio.to_thread(self._system.depths)
            raise AssertionError(f"{error}\nqueues: {depths}\nworker: {worker}") from None
        async with self._system.database() as connection:
            rows = await connection.fetch("select id::text from orders where created_at >= $1", self._since)
            twice = await connection.fetch(
                "select entity_id, version from changes where entity = 'order' and accepted_at >= $1"
                " group by 1, 2 having count(*) > 1",
                self._since,
            )
            conflicts = await connection.fetchval("select count(*) from conflicts")
            numbers = await connection.fetch(
                "select order_number, count(*) from orders where created_at >= $1"
                " group by business_day, 1 having count(*) > 1",
                self._since,
            )
        extra = {row[0] for row in rows} - set(self.placed)
        assert len(extra) <= self.unknown, f"{len(extra)} stored orders were never acknowledged"
        assert not twice, f"versions given twice: {twice}"
        assert not numbers, f"numbers given twice: {numbers}"
        assert conflicts == 0
        assert len(set(self.placed.values())) == len(self.placed)

    async def nothing_is_dead(self) -> None:
        """Asserts that no dead letter exists and that no change ever went to a retry queue."""
        async with self._system.database() as connection:
            dead_letters = await connection.fetch("select reason, error from dead_letters")
        assert not dead_letters, dead_letters[:3]
        broker = await aio_pika.connect(self._system.rabbitmq_url)
        async with broker:
            channel = await broker.channel()
            for name, _ in topology.dead_queues():  # the collector may not have taken all dead letters yet
                declared = await channel.declare_queue(name, passive=True)
                assert declared.declaration_result.message_count == 0, name
        log = (self._system.directory / "worker.log").read_text()
        assert "change_failed" not in log
        assert "dead_letter" not in log

    async def list_is_complete(self) -> None:
        """Asserts that the list contains every change that was acknowledged before the request."""
        known = dict(self.versions)
        async with self._system.client() as client:
            found: dict[str, int] = {}
            cursor = None
            while True:
                query = {"limit": "200", **({"cursor": cursor} if cursor else {})}
                reply = await client.get("/api/orders", params=query)
                assert reply.status_code == 200, reply.text
                page = reply.json()
                found |= {one["id"]: one["version"] for one in page["data"]}
                cursor = page["pagination"]["next_cursor"]
                if cursor is None:
                    break
        behind = {id_: version for id_, version in known.items() if found.get(id_, 0) < version}
        assert not behind, f"the list lacks {len(behind)} of {len(known)} acknowledged changes"
