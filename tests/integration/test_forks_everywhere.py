"""Two changes claim one version of one entity and arrive in any order: the same one wins in every store and for every
reader of the log, both changes are kept, every payment is kept, and one conflict is open."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest
import redis.asyncio
from msgspec import Struct, structs

from shared.entities import menu_item
from shared.entities import order as orders
from shared.entities.contract import Change, Lane
from shared.entities.entity import Entity
from shared.mirror import keys
from tests.rigs.builders import change, message, payment
from tests.rigs.forks import fork, wait_stored
from tests.rigs.http_client import http_client
from tests.rigs.system import ROOT, System, eventually, publisher_to

ARRIVALS = ["the winner first", "the loser first", "both in one message"]


class RestaurantWithDish(Struct):
    """A restaurant for one test, with one dish."""

    id: str
    token: str
    dish_id: str


@pytest.fixture
async def restaurant(system: System) -> RestaurantWithDish:
    name = uuid4().hex[:10]
    async with http_client(base_url=system.urls["orders"], timeout=10) as client:
        made = await client.post(
            "/api/auth/register-restaurant",
            json={
                "name": "Forks",
                "slug": f"forks-{name}",
                "email": f"{name}@forks.example",
                "password": "a long one that is hard to guess",
            },
        )
        data = made.json()["data"]
        token = data["session"]["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        dish = await client.post("/api/menu", json={"name": "Soup", "price": 500, "category": "Mains"}, headers=headers)
    return RestaurantWithDish(data["restaurant"]["id"], token, dish.json()["data"]["id"])


async def publish(system: System, lane: Lane, *bodies: bytes) -> None:
    async with publisher_to(system) as publisher:
        for body in bodies:
            await publisher.publish(lane.value, body)


async def send(system: System, lane: Lane, arrival: str, winner: Change, loser: Change) -> None:
    if arrival == "both in one message":
        await publish(system, lane, message(loser, winner))
    else:
        first, second = (winner, loser) if arrival == "the winner first" else (loser, winner)
        await publish(system, lane, message(first), message(second))


async def both_are_kept(system: System, winner: Change, loser: Change) -> None:
    """Asserts that PostgreSQL has both changes and one open conflict."""
    both = {winner.id, loser.id}
    async with system.database() as connection:

        async def kept() -> set[str]:
            rows = await connection.fetch(
                "select change_id::text from changes where entity_id = $1 and version = 2", winner.entity_id
            )
            return {row[0] for row in rows}

        await eventually(kept, what="both changes", until=lambda found: found == both)
        conflicts = await connection.fetch("select * from conflicts where entity_id = $1", winner.entity_id)
    assert len(conflicts) == 1
    (conflict,) = conflicts
    assert {str(conflict["change_id"]), str(conflict["other_change_id"])} == both
    assert (conflict["version"], conflict["resolved_at"]) == (2, None)


async def winner_is_the_head(system: System, entity: Entity, winner: Change) -> None:
    """Waits until both stores have the winner as head, or the next change, which brings back the loser's payment."""
    async with (
        system.database() as connection,
        redis.asyncio.from_url(system.redis.url, decode_responses=True) as mirror,
    ):

        async def outcome() -> tuple[set[str], set[str]]:
            stored = await connection.fetchval(
                f"select change_id::text from {entity.table.name} where id = $1", winner.entity_id
            )
            shown = await mirror.hget(keys.doc(winner.restaurantid, entity.name, winner.entity_id), "c")
            rows = await connection.fetch(
                "select change_id::text from changes where entity_id = $1 and version = 3 and base_change_id = $2",
                *(winner.entity_id, winner.id),
            )
            return {stored, shown}, {winner.id, *(row[0] for row in rows)}

        await eventually(outcome, what="the winner in both stores", until=lambda found: found[0] <= found[1])


@asynccontextmanager
async def pushed(system: System, token: str, change_ids: set[str]) -> AsyncIterator[list[dict[str, Any]]]:
    """Yields a list that fills with the push events of these changes; on leaving, waits until it has one of each.

    A notifier with a lag sends events of earlier changes first, which are left out.
    """
    found: list[dict[str, Any]] = []
    url = f"{system.urls['notifier']}/api/v1/sync/events"
    async with (
        http_client(timeout=httpx.Timeout(5.0, read=30.0)) as client,
        client.stream("GET", url, headers={"Authorization": f"Bearer {token}"}) as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()
        async for line in lines:
            if line.startswith("event: connected"):
                break
        yield found
        async with asyncio.timeout(60):
            while {one["changeId"] for one in found} != change_ids:
                line = await anext(lines)
                if line.startswith("data: ") and "changeId" in line:
                    event = json.loads(line.removeprefix("data: "))
                    found += [event] if event["changeId"] in change_ids else []


@pytest.mark.parametrize("arrival", ARRIVALS)
async def test_one_of_two_forked_order_changes_wins_in_every_store_and_both_payments_count(
    system: System, restaurant: RestaurantWithDish, arrival: str
) -> None:
    """They count although one Idempotency-Key was sent with both ids. docs/losses.md says how to find the pair."""
    key = str(uuid4())
    async with system.client(token=restaurant.token) as client:
        placed = await client.post("/api/orders", json={"items": [{"menu_item_id": restaurant.dish_id, "quantity": 4}]})
        id_ = placed.json()["data"]["id"]
        state, base = await wait_stored(system, orders.ENTITY, id_)
        made = []
        for notes in ("one side", "the other"):
            after = structs.replace(state, notes=notes, payments=(payment(amount=700, request_key=key),))
            made.append(change(after, event="payment_recorded", before=state, entityversion=2, basechangeid=base))
        winner, loser = fork(*made)

        async with pushed(system, restaurant.token, {winner.id, loser.id}) as events:
            await send(system, Lane.CRITICAL, arrival, winner, loser)
        await both_are_kept(system, winner, loser)
        await winner_is_the_head(system, orders.ENTITY, winner)

        expected = orders.ENTITY.decode(winner)
        reply = await client.get(f"/api/orders/{id_}")
        assert reply.json()["data"]["notes"] == expected.notes

        async def sync_state() -> str:
            return str((await client.get(f"/api/orders/{id_}")).json()["data"]["sync"]["state"])

        await eventually(
            sync_state, what="an order without pending or open states", until=lambda state: state != "pending"
        )
        listed = (await client.get("/api/orders")).json()["data"]
        assert [(one["id"], one["notes"]) for one in listed] == [(id_, expected.notes)]
        # A screen applies the guard, so the order of arrival does not matter.
        last = max(events, key=lambda one: (one["version"], one["changeId"]))
        assert last["data"]["notes"] == expected.notes

        payments = (await client.get("/api/payments")).json()["data"]
    paid = {one.id for side in made for one in orders.ENTITY.decode(side).payments}
    assert {one["id"] for one in payments} == paid
    assert len(paid) == len(payments) == 2
    (query,) = re.findall(r"^```sql\n(.*?)^```$", (ROOT / "docs/losses.md").read_text(), re.DOTALL | re.MULTILINE)
    async with system.database() as connection:
        pairs = {str(row["request_key"]): set(map(str, row["array_agg"])) for row in await connection.fetch(query)}
    assert pairs[key] == paid


@pytest.mark.parametrize("arrival", ARRIVALS)
async def test_orders_are_charged_the_winning_one_of_two_forked_prices(
    system: System, restaurant: RestaurantWithDish, arrival: str
) -> None:
    state, base = await wait_stored(system, menu_item.ENTITY, restaurant.dish_id)
    made = [
        change(structs.replace(state, price=price), before=state, event="updated", entityversion=2, basechangeid=base)
        for price in (600, 700)
    ]
    winner, loser = fork(*made)
    marker = structs.replace(state, id=str(uuid4()), name="Marker")
    await send(system, Lane.NORMAL, arrival, winner, loser)
    await publish(system, Lane.NORMAL, message(change(marker)))
    await both_are_kept(system, winner, loser)
    await winner_is_the_head(system, menu_item.ENTITY, winner)

    async with system.client(token=restaurant.token) as client:

        async def price(dish: str) -> int:
            reply = await client.post("/api/orders", json={"items": [{"menu_item_id": dish, "quantity": 1}]})
            return int(reply.json()["data"]["subtotal"]) if reply.status_code == 201 else 0

        # The marker dish was published last: when it can be ordered, both sides of the fork have been read.
        await eventually(lambda: price(marker.id), what="the marker dish on the menu")
        assert await price(restaurant.dish_id) == menu_item.ENTITY.decode(winner).price
