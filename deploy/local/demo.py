"""Sends one order through the whole system and measures each hop: accepted, readable, pushed, stored, synced.

`send_order` raises DemoFailed if a hop misses its deadline, so that `make run` does not report that a system is
ready although it does not work.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import httpx

from shared.errors import described

HOP_TIMEOUT_SECONDS = 20.0  # on an idle machine each hop takes milliseconds


class DemoFailed(Exception):
    """One hop of the demo order failed, or its event stream. The message says what happened."""


@dataclass
class Demo:
    """The content of `.local/demo.json`: what the seed created, and the URLs of the system."""

    orders_url: str
    sync_url: str
    notifier_url: str
    restaurant_id: str
    restaurant_slug: str
    tokens: dict[str, str]
    emails: dict[str, str]
    password: str
    """The password of every user of the demo."""
    terminal: dict[str, str]
    sync_token: str
    """The API key with the scope `sync:write`, for `POST /api/sync/order`."""
    web_shop_key: str
    """The API key with the scopes `menu:read` and `orders:write`."""
    menu_item_ids: list[str]
    table_ids: list[str]
    database_url: str
    redis_url: str
    rabbitmq_url: str
    rabbitmq_management_url: str
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def order(self) -> dict[str, Any]:
        return {
            "table_id": self.table_ids[0],
            "customer_name": "Ada",
            "items": [{"menu_item_id": self.menu_item_ids[0], "quantity": 2}],
        }

    def shell_lines(self, order_id: str) -> list[tuple[str, str]]:
        """Returns (description, command line) of the token and of each call."""
        bearer = '-H "Authorization: Bearer $TOKEN"'
        body = json.dumps(self.order, separators=(",", ":"))
        return [
            ("the token of a member of staff", f"TOKEN={self.tokens['staff']}"),
            (
                "place an order",
                f"curl -s {self.orders_url}/api/orders {bearer} -H 'Content-Type: application/json' -d '{body}'",
            ),
            ("read it", f"curl -s {self.orders_url}/api/orders/{order_id} {bearer}"),
            ("follow the event stream", f"curl -sN {self.notifier_url}/api/v1/sync/events {bearer}"),
        ]


@dataclass(frozen=True)
class Hop:
    name: str
    milliseconds: float
    detail: str


async def send_order(demo: Demo, database_url: str) -> tuple[str, list[Hop]]:
    """Places one order as staff and waits until it has arrived everywhere. Returns its id, and the hops in the order in
    which they happened, each with the milliseconds since the order was sent."""
    headers = {"Authorization": f"Bearer {demo.tokens['staff']}"}
    timeout = httpx.Timeout(10.0, read=HOP_TIMEOUT_SECONDS)
    async with (
        httpx.AsyncClient(headers=headers, timeout=timeout) as client,
        _events(client, demo.notifier_url) as events,
    ):
        async with _within("the connection to the event stream"):
            first = await anext(events)
        if first.get("event") != "connected":
            raise DemoFailed(f"the event stream began with {first}, not with `connected`")
        # The first request opens the connection, so that the measured time does not include the handshake.
        await client.get(f"{demo.orders_url}/health/live")
        database = await asyncpg.connect(database_url, timeout=5)
        try:
            return await _watch(demo, client, events, database)
        except httpx.HTTPError as error:
            raise DemoFailed(f"a request failed: {described(error)}") from error
        finally:
            await database.close(timeout=5)


async def _watch(
    demo: Demo,
    client: httpx.AsyncClient,
    events: AsyncIterator[dict[str, str]],
    database: "asyncpg.Connection[asyncpg.Record]",
) -> tuple[str, list[Hop]]:
    began = time.perf_counter()

    def hop(name: str, detail: str) -> Hop:
        return Hop(name, (time.perf_counter() - began) * 1000, detail)

    # The flag 01 marks the trace as sampled, so the service keeps this trace at every sampling rate except 0.
    traced = {"traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"}
    reply = await client.post(f"{demo.orders_url}/api/orders", json=demo.order, headers=traced)
    accepted = hop("accepted", f"{reply.status_code}, order {_number(reply)}")
    if reply.status_code != 201:
        raise DemoFailed(f"POST /api/orders answered {reply.status_code}: {reply.text[:500]}")
    order_id = str(reply.json()["data"]["id"])
    url = f"{demo.orders_url}/api/orders/{order_id}"

    async def readable() -> Hop:
        answer = await client.get(url)
        if answer.status_code != 200:
            raise DemoFailed(f"GET /api/orders/{order_id} answered {answer.status_code} right after the 201")
        return hop("readable", f"from the {answer.headers.get('x-served-by', '?')}")

    async def pushed() -> Hop:
        async for event in events:
            if event.get("event") == "order_created" and order_id in event.get("data", ""):
                return hop("pushed", "order_created on the event stream")
        raise DemoFailed("the event stream ended")

    async def stored() -> Hop:
        query = "select version from orders where id = $1::uuid"
        while (version := await database.fetchval(query, order_id)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.002)  # PostgreSQL does not announce a new row
        return hop("stored", f"in PostgreSQL, version {version}")

    async def synced() -> Hop:
        while (state := _sync_state(await client.get(url))) != "synced":  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return hop("synced", f"sync state `{state}` on GET")

    hops = [accepted]
    watched = [asyncio.create_task(_bounded(work)) for work in (readable, pushed, stored, synced)]
    try:
        hops += await asyncio.gather(*watched)
    finally:
        for task in watched:
            task.cancel()
    return order_id, sorted(hops, key=lambda hop: hop.milliseconds)


async def _bounded(work: Callable[[], Awaitable[Hop]]) -> Hop:
    async with _within(f"the hop `{work.__name__}`"):
        return await work()


@asynccontextmanager
async def _within(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(HOP_TIMEOUT_SECONDS):
            yield
    except TimeoutError:
        raise DemoFailed(f"{what} took longer than {HOP_TIMEOUT_SECONDS:.0f} s") from None


@asynccontextmanager
async def _events(client: httpx.AsyncClient, notifier_url: str) -> AsyncIterator[AsyncIterator[dict[str, str]]]:
    """Yields the server-sent events, each as a dict of its fields (`id`, `event`, `data`)."""
    url = f"{notifier_url}/api/v1/sync/events"
    async with client.stream("GET", url) as reply:
        if reply.status_code != 200:
            body = (await reply.aread()).decode(errors="replace")
            raise DemoFailed(f"the event stream answered {reply.status_code}: {body[:500]}")
        yield parse_events(reply.aiter_lines())


async def parse_events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, str]]:
    """Yields the events of an event stream from its lines, each as a dict of its fields."""
    event: dict[str, str] = {}
    async for line in lines:
        if line:
            name, _, value = line.partition(":")
            if name:  # a line that begins with a colon is a keep-alive
                event[name] = event[name] + "\n" + value.lstrip(" ") if name in event else value.lstrip(" ")
        elif event:
            yield event
            event = {}


def _number(reply: httpx.Response) -> str:
    data = reply.json().get("data") or {}
    return str(data.get("order_number") or data.get("number") or data.get("id"))


def _sync_state(reply: httpx.Response) -> str | None:
    if reply.status_code != 200:
        return None
    sync = reply.json()["data"].get("sync")
    return sync.get("state") if isinstance(sync, dict) else sync
