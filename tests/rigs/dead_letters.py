"""Makes real dead letters on the running system, and acts on them as operators do: by the API and the command line."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
import structlog
from click.testing import CliRunner

from deploy.local.port_check import find_free
from services.sync.cli.main import main
from services.sync.failures.retry_ladder import ERROR, FAILED_AT, PLACE, REASON
from shared.entities.contract import Change, Lane, encode, now
from shared.entities.table import DiningTable
from shared.messaging import topology
from shared.messaging.publisher import Publisher
from shared.security.tokens import Identity, Role, Tokens
from tests.rigs.builders import change, message
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, expect, made, register_restaurant
from tests.rigs.system import ROOT, System, eventually, publisher_to

DEAD_LETTERS = "/api/ops/dead-letters"
JOBS = "/api/ops/jobs"

Result = tuple[int, str, str]
"""The result of a command: exit code, stdout and stderr."""


class OperatorRig:
    """A restaurant with dead letters, and clients and commands of its operators."""

    def __init__(self, restaurant: RestaurantRig, publisher: Publisher) -> None:
        self.restaurant = restaurant
        self.system = restaurant.system
        self.publisher = publisher
        self.since = now()
        self._dish_id: str | None = None

    @property
    def restaurant_id(self) -> str:
        return self.restaurant.id

    def client(
        self, role: Role = Role.OPERATOR, *, name: str = "nadia", restaurant: str | None = None, url: str | None = None
    ) -> httpx.AsyncClient:
        """A client of the operators' API with a token of this role."""
        tenant = "" if role is Role.OPERATOR else restaurant or self.restaurant_id
        tokens = Tokens(self.system.env["TICKETRAIL_JWT_SECRET"], ttl_seconds=600)
        token = tokens.issue(Identity(str(uuid4()), role, tenant, f"{name}@ops.example", "a session"))
        headers = {"Authorization": f"Bearer {token}"}
        return http_client(base_url=url or self.system.urls["sync"], headers=headers, timeout=60.0)

    # -- making dead letters -------------------------------------------------------------------------------------

    def table(self, **fields: Any) -> DiningTable:
        at = now()
        defaults = {"id": str(uuid4()), "restaurant_id": self.restaurant_id, "label": "Window", "seats": 4}
        return DiningTable(**{**defaults, "created_at": at, "updated_at": at, **fields})

    async def poison(self, marker: str, *, lane: Lane = Lane.NORMAL, **fields: Any) -> Change:
        """Publishes a table without a seat, which breaks the contract; returns the change."""
        made = change(self.table(label=marker, **fields))
        await self.publisher.publish(lane.value, message(encode(made).replace(b'"seats":4', b'"seats":0')))
        return made

    async def send_to_dead_queue(
        self,
        *changes: Change | bytes,
        lane: Lane = Lane.NORMAL,
        reason: str = "transient",
        error: str = "SerializationError: try again",
        place: str = "services.sync.writer.upsert:write_batch",
        at: str | None = None,
    ) -> None:
        """Sends changes to the dead-letter queue, as the PostgreSQL writer does. A valid change can be replayed."""
        headers: dict[str, int | str] = {REASON: reason, ERROR: error, PLACE: place}
        for one in changes:
            body = one if isinstance(one, bytes) else message(one)
            headers[FAILED_AT] = at or now().isoformat()
            await self.publisher.publish_to_queue(topology.dead_queue(lane), body, headers=headers, timeout=30)

    async def dead_letters(self, count: int, *, sinks: int = 1, **filters: Any) -> list[dict[str, Any]]:
        """Waits until the API lists `count` dead letters, each of this number of sinks at least; returns them, the
        oldest failure first."""
        async with self.client() as client:

            async def look() -> list[dict[str, Any]]:
                found: list[dict[str, Any]] = expect(await client.get(DEAD_LETTERS, params={"limit": 200, **filters}))
                return found[::-1]

            return await eventually(
                look,
                within=30,
                what=f"{count} dead letters",
                until=lambda seen: len(seen) == count and all(len(one["sinks"]) >= sinks for one in seen),
            )

    async def make_dead_letters(self, marker: str, count: int = 1) -> list[dict[str, Any]]:
        """Makes `count` dead letters of valid tables with this label; returns them in the order in which it made
        them."""
        await self.send_to_dead_queue(*(change(self.table(label=marker)) for _ in range(count)))
        return await self.dead_letters(count, text=marker)

    async def place(self, **fields: Any) -> str:
        """Places an order of one dish, as staff do; returns its id."""
        async with self.restaurant.client() as staff:
            body = {"items": [{"menu_item_id": await self._dish(), "quantity": 1}], **fields}
            return str(made(await staff.post("/api/orders", json=body))["id"])

    async def _dish(self) -> str:
        if self._dish_id is None:
            self._dish_id = str((await self.restaurant.dish())["id"])
        return self._dish_id

    @asynccontextmanager
    async def refused_orders(self, notes: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Makes PostgreSQL refuse orders with these notes until the yielded function is called or the block ends."""
        # With `not valid`, PostgreSQL does not check the rows that are already in the table.
        refuse = f"add constraint {notes} check (notes is distinct from '{notes}') not valid"

        async def alter(how: str) -> None:
            async with self.system.database("ticketrail_owner") as database:
                await database.execute(f"alter table orders {how}")

        async def allow() -> None:
            await alter(f"drop constraint if exists {notes}")

        await alter(refuse)
        try:
            yield allow
        finally:
            await allow()

    # -- outcomes ------------------------------------------------------------------------------------------------

    async def ended(self, job: dict[str, Any]) -> dict[str, Any]:
        """Waits until the job has ended; returns it."""
        async with self.client() as client:

            async def look() -> dict[str, Any]:
                found: dict[str, Any] = expect(await client.get(f"{JOBS}/{job['id']}"))
                return found

            states = ("done", "cancelled", "stopped")
            return await eventually(
                look, within=30, what="the end of the job", until=lambda one: one["state"] in states
            )

    async def sync_state(self, order_id: str, state: str) -> None:
        """Waits until the orders service shows this sync state of the order."""
        async with self.restaurant.client() as staff:

            async def look() -> str:
                return str(expect(await staff.get(f"/api/orders/{order_id}"))["sync"]["state"])

            await eventually(look, within=30, what=f"sync state {state}", until=lambda seen: seen == state)

    @asynccontextmanager
    async def another_api(self, **settings: object) -> AsyncIterator[str]:
        """Starts a second instance of the sync API with these settings; yields its URL."""
        name, [port] = f"sync-{uuid4().hex[:6]}", find_free(1)
        self.system.urls[name] = f"http://127.0.0.1:{port}"
        self.system.start("sync", alias=name, sync_port=port, **settings)
        try:
            await self.system.ready(name, within=60)
            yield self.system.urls[name]
        finally:
            await self.system.stop(name)
            del self.system.urls[name]

    async def written(self, *change_ids: str) -> int:
        """Returns how many of these changes PostgreSQL has."""
        async with self.system.database() as database:
            found: int = await database.fetchval(
                "select count(*) from changes where change_id = any($1::uuid[])", change_ids
            )
        return found

    # -- the command line ----------------------------------------------------------------------------------------

    async def dlq(self, *arguments: str, answer: str = "") -> Result:
        return await self.cli("dlq", *arguments, answer=answer)

    async def cli(self, *arguments: str, answer: str = "") -> Result:
        """Runs `ticketrail` as the user nadia, in this process: starting processes would take most of the time of a
        test."""
        env = {name: value for name, value in self.system.env.items() if name.startswith("TICKETRAIL_")}
        logging = structlog.get_config()
        try:
            ran = await asyncio.to_thread(
                CliRunner().invoke, main, arguments, input=answer, env={**env, "LOGNAME": "nadia"}
            )
        finally:
            structlog.configure(**logging)
        if ran.exception is not None and not isinstance(ran.exception, SystemExit):
            raise ran.exception
        return ran.exit_code, ran.stdout, ran.stderr

    async def dlq_process(self, *arguments: str, answer: str = "", **settings: str) -> Result:
        """Runs `ticketrail dlq` in a process of its own, to test exit codes and output as a shell sees them."""
        env = {f"TICKETRAIL_{name.upper()}": value for name, value in settings.items()}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.sync.cli", "dlq", *arguments),
            cwd=ROOT,
            env={**self.system.env, **env, "LOGNAME": "nadia"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(answer.encode()), 60)
        return process.returncode or 0, out.decode(), err.decode()


@asynccontextmanager
async def operator_rig(system: System) -> AsyncIterator[OperatorRig]:
    async with publisher_to(system, timeout_seconds=30.0) as publisher:
        yield OperatorRig(await register_restaurant(system), publisher)


async def details_of(client: httpx.AsyncClient, dead_letter: dict[str, Any]) -> dict[str, Any]:
    """Returns a dead letter with its attempts, headers, event, edits, replays and actions."""
    found: dict[str, Any] = expect(await client.get(f"{DEAD_LETTERS}/{dead_letter['id']}"))
    return found
