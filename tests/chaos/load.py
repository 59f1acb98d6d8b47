"""The load: it places orders, changes one order concurrently, pays, repeats requests, and tries to read and change
orders of another restaurant. It remembers every reply, and `proof.py` compares the replies with the stores.

Every write contains a unique mark, by which the proof finds it in every store.
"""

import asyncio
import random
from collections import Counter
from typing import Any
from uuid import uuid4

import httpx
from msgspec import Struct

from tests.chaos.rig import ChaosRig
from tests.rigs.http_client import http_client

_TIMEOUT_SECONDS = 8.0
_MAX_ATTEMPTS = 4
_MAX_KNOWN_ORDERS = 60


class Acknowledged(Struct, frozen=True):
    restaurant: str
    order: str
    kind: str
    """created, changed or paid"""
    version: int
    """The version in the reply; 0 for a creation or a payment, because a repeat gets the head version."""
    mark: str


class _Restaurant(Struct):
    id: str
    token: str
    dish: str
    orders: list[str]


class Load:
    def __init__(self, rig: ChaosRig, seed: int, *, clients: int = 6, pause: float = 0.03) -> None:
        system, other = rig.system, rig.other_restaurant
        self._urls = [url for name, url in system.urls.items() if name.endswith("orders")]
        self._restaurants = [
            _Restaurant(system.restaurant_id, system.token("admin"), system.dish(), []),
            _Restaurant(other["id"], other["token"], other["dish"], []),
        ]
        self._clients = clients
        self._pause = pause
        self._random = random.Random(seed)
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.acknowledged: list[Acknowledged] = []
        self.refused: dict[str, str] = {}
        """Mark of a write whose last reply was 4xx or 503 -> that reply."""
        self.unknown: set[str] = set()
        self.answers: Counter[str] = Counter()
        self._durability: dict[str, str] = {}
        """Order -> the visibility and durability in the reply to its creation."""
        self.wrong: list[str] = []
        """Replies that no fault justifies."""

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(self._clients)]

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _work(self, number: int) -> None:
        async with http_client(timeout=_TIMEOUT_SECONDS) as client:
            while not self._stop.is_set():
                restaurant = self._restaurants[0] if self._random.random() < 0.8 else self._restaurants[1]
                action = self._random.choices(
                    (self._create, self._change, self._pay, self._try_foreign_order, self._list), (50, 28, 15, 5, 2)
                )[0]
                await action(client, restaurant)
                await asyncio.sleep(self._pause * self._random.uniform(0.5, 1.5))

    # -- requests ----------------------------------------------------------------------------------------------

    async def _create(self, client: httpx.AsyncClient, restaurant: _Restaurant) -> None:
        mark = uuid4().hex
        body = {"items": [{"menu_item_id": restaurant.dish, "quantity": 1}], "notes": mark}
        done = await self._until_known(client, restaurant, "POST", "/api/orders", body, mark, key=mark)
        if done is None:
            return
        self._note(restaurant, done["id"], "created", 0, mark)
        restaurant.orders.append(done["id"])
        self._durability[done["id"]] = (
            f"{'visible' if done['visible'] else 'not visible'}, {done.get('durability', 'by a repeat')}"
        )
        del restaurant.orders[:-_MAX_KNOWN_ORDERS]
        if self._random.random() < 0.1:
            outcome, again = await self._send(client, restaurant, "POST", "/api/orders", body, key=mark)
            if outcome == "yes" and again["id"] != done["id"]:
                self.wrong.append(f"a repeat made another order: {done['id']}, {again['id']}")

    async def _change(self, client: httpx.AsyncClient, restaurant: _Restaurant) -> None:
        """Sends one change of an order, or two at the same time. They name no version, so both may succeed in turn."""
        if restaurant.orders:
            order = self._random.choice(restaurant.orders)
            await asyncio.gather(
                *(self._change_one(client, restaurant, order) for _ in range(self._random.choice((1, 1, 2))))
            )

    async def _change_one(self, client: httpx.AsyncClient, restaurant: _Restaurant, order: str) -> None:
        mark = uuid4().hex
        outcome, data = await self._send(client, restaurant, "PUT", f"/api/orders/{order}", {"notes": mark})
        if outcome == "yes":
            self._note(restaurant, order, "changed", data["version"], mark)
        elif outcome == "no":
            self.refused[mark] = data["reply"]
            self._count_not_found(order, data["reply"])
        else:
            self.unknown.add(mark)

    async def _pay(self, client: httpx.AsyncClient, restaurant: _Restaurant) -> None:
        if not restaurant.orders:
            return
        order, payment = self._random.choice(restaurant.orders), str(uuid4())
        body = {"id": payment, "amount": 1, "method": "card"}
        done = await self._until_known(client, restaurant, "POST", f"/api/orders/{order}/payments", body, payment)
        if done is not None:
            self._note(restaurant, order, "paid", 0, payment)
        elif payment in self.refused:
            self._count_not_found(order, self.refused[payment])

    def _count_not_found(self, order: str, reply_text: str) -> None:
        """Counts a 404 for an acknowledged order. The proof allows it: an order that is not in the mirror yet is not
        found (docs/architecture.md, Limits)."""
        if ": 404 " in reply_text:
            self.answers[f"404 for an acknowledged order ({self._durability[order]})"] += 1

    async def _try_foreign_order(self, client: httpx.AsyncClient, restaurant: _Restaurant) -> None:
        other = next(one for one in self._restaurants if one is not restaurant)
        if not other.orders:
            return
        path = f"/api/orders/{self._random.choice(other.orders)}"
        if self._random.random() < 0.5:
            outcome, _ = await self._send(client, restaurant, "GET", path)
        else:
            mark = uuid4().hex
            outcome, data = await self._send(client, restaurant, "PUT", path, {"notes": mark})
            self.refused[mark] = data.get("reply", "an order of another restaurant")
        if outcome == "yes":
            self.wrong.append(f"an order of another restaurant was shown or changed: {path}")

    async def _list(self, client: httpx.AsyncClient, restaurant: _Restaurant) -> None:
        outcome, data = await self._send(client, restaurant, "GET", "/api/orders?limit=20")
        if outcome == "yes":
            self.wrong += [
                f"an order of another restaurant was listed: {one['id']}"
                for one in data
                if one["restaurant_id"] != restaurant.id
            ]

    # -- replies -----------------------------------------------------------------------------------------------

    async def _until_known(
        self,
        client: httpx.AsyncClient,
        restaurant: _Restaurant,
        method: str,
        path: str,
        body: dict[str, Any],
        mark: str,
        *,
        key: str | None = None,
    ) -> dict[str, Any] | None:
        """Repeats a request that got no reply, as a client should. Returns None if it was refused or if its outcome
        stays unknown."""
        in_doubt = False
        for _ in range(_MAX_ATTEMPTS):
            outcome, data = await self._send(client, restaurant, method, path, body, key=key)
            if outcome == "yes":
                answered: dict[str, Any] = data
                return answered
            in_doubt = in_doubt or outcome == "unknown"
            if outcome == "no" and not in_doubt:
                self.refused[mark] = data["reply"]
                return None
            await asyncio.sleep(0.2)
        self.unknown.add(mark)
        return None

    async def _send(
        self,
        client: httpx.AsyncClient,
        restaurant: _Restaurant,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        key: str | None = None,
    ) -> tuple[str, Any]:
        """Returns the outcome ("yes", "no" or "unknown") and the data."""
        headers = {"Authorization": f"Bearer {restaurant.token}", **({"Idempotency-Key": key} if key else {})}
        url = self._random.choice(self._urls) + path
        try:
            reply = await client.request(method, url, json=body, headers=headers)
        except httpx.ConnectError:
            self.answers["no connection"] += 1
            return "no", {"reply": "no connection"}
        except httpx.HTTPError as error:
            self.answers[type(error).__name__] += 1
            return "unknown", {}
        code = f" {reply.json()['error']['code']}" if 400 <= reply.status_code < 500 else ""
        self.answers[f"{method} {reply.status_code}{code}"] += 1
        if reply.status_code in (200, 201):
            return "yes", reply.json()["data"]
        if reply.status_code in (503, 504) or 400 <= reply.status_code < 500:
            reply_text = f"{method} {url} {reply.headers.get('date')}: {reply.status_code} {reply.text[:200]}"
            return ("unknown" if reply.status_code == 504 else "no"), {"reply": reply_text}
        self.wrong.append(f"{method} {path}: {reply.status_code} {reply.text[:300]}")
        return "unknown", {}

    def _note(self, restaurant: _Restaurant, order: str, kind: str, version: int, mark: str) -> None:
        self.acknowledged.append(Acknowledged(restaurant.id, order, kind, version, mark))
        self.unknown.discard(mark)
