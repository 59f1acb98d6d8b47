"""Customers: phone numbers, spending and loyalty points; each payment and each move of points counts once."""

import asyncio
from collections import Counter
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest

from services.orders.derived_figures import DerivedFigures
from services.orders.entity_reads import EntityReads
from services.orders.resources import e164
from shared.entities.customer import ENTITY as CUSTOMER
from shared.errors import InvalidInput
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.restaurants import Restaurant
from shared.settings import Settings
from tests.rigs.recorded_changes import recorded
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    """A restaurant in Germany without tax, with one point for each euro."""
    return await register_restaurant(
        system, tax_basis_points=0, settings={"country": "DE", "minor_units_per_point": 100}
    )


async def customer(client: httpx.AsyncClient, **fields: Any) -> str:
    """Creates a customer and returns its path."""
    found = made(await client.post("/api/customers", json={"name": "Ada", **fields}))
    assert (found["loyalty_points"], found["total_spent"], found["visits"]) == (0, 0, 0)
    return f"/api/customers/{found['id']}"


def id_of(path: str) -> str:
    return path.rpartition("/")[2]


async def order(restaurant: RestaurantRig, client: httpx.AsyncClient, customer: str, price: int, **fields: Any) -> str:
    dish = (await restaurant.dish(price=price))["id"]
    body = {"items": [{"menu_item_id": dish, "quantity": 1}], "customer_id": id_of(customer), **fields}
    return f"/api/orders/{made(await client.post('/api/orders', json=body))['id']}"


async def pay(client: httpx.AsyncClient, order: str, amount: int) -> None:
    made(await client.post(f"{order}/payments", json={"amount": amount, "method": "card"}))


async def totals(client: httpx.AsyncClient, customer: str) -> tuple[int, int, int]:
    found = expect(await client.get(customer))
    return found["total_spent"], found["visits"], found["loyalty_points"]


async def totals_become(client: httpx.AsyncClient, customer: str, *expected: int) -> None:
    """Waits until the customer's totals are (spent, visits, points), which needs the payments in PostgreSQL."""
    await eventually(lambda: totals(client, customer), what=f"{expected}", until=lambda found: found == expected)


async def synced(client: httpx.AsyncClient, *paths: str) -> None:
    async def states() -> set[str]:
        return {expect(await client.get(path))["sync"]["state"] for path in paths}

    await eventually(states, what="everything in PostgreSQL", until=lambda found: found == {"synced"})


# -- phones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "country", "number"),
    [
        ("030 123456", "DE", "+4930123456"),
        ("(0)30/12 34 56", "DE", "+4930123456"),
        ("+49 (0) 30 123456", None, "+4930123456"),
        ("0049 30 123456", "DE", "+4930123456"),
        ("+1 415 555 2671", "DE", "+14155552671"),
        ("(415) 555-2671", "US", "+14155552671"),
        ("06 12345678", "IT", "+390612345678"),
        ("+4930123456", "US", "+4930123456"),
    ],
)
def test_phone_number_is_stored_in_e164_whatever_its_written_form(text: str, country: str | None, number: str) -> None:
    assert e164(text, country) == number
    assert e164(number, country) == number


@pytest.mark.parametrize(
    ("text", "country"),
    [
        ("030 123456", None),  # a national number needs a country
        ("", "DE"),
        ("call me", "DE"),
        ("+49", "DE"),
        ("+999 123456789", "DE"),
        ("555-2671", "US"),  # valid only within one town, because the area code is missing
        ("12", "DE"),
        ("0" * 200, "DE"),
        ("+49 123456789012345", "DE"),  # possible in Germany, but longer than E.164 allows
        ("+1 415 555 2671 2671", "US"),
    ],
)
def test_invalid_phone_number_is_refused(text: str, country: str | None) -> None:
    with pytest.raises(InvalidInput) as refused:
        e164(text, country)
    assert (refused.value.details["field"], refused.value.error_code) == ("phone", "invalid_phone")


async def test_customers_are_found_by_their_phone_number_in_any_form(restaurant: RestaurantRig) -> None:
    other = await register_restaurant(restaurant.system)
    async with restaurant.client() as staff, other.client() as stranger:
        made_ = made(await staff.post("/api/customers", json={"name": "Ada", "phone": "030 9876543"}))
        assert made_["phone"] == "+49309876543"
        for text in ("030 9876543", "+49 30 9876543", "+49309876543"):
            found = expect(await staff.get("/api/customers", params={"phone": text}))
            assert [one["id"] for one in found] == [made_["id"]]
        made(await staff.post("/api/customers", json={"name": "Bea", "phone": "+1 415 555 2671"}))
        found = expect(await staff.get("/api/customers?phone=+14155552671"))  # with a plus sign that is not escaped
        assert [one["name"] for one in found] == ["Bea"]
        assert expect(await stranger.get("/api/customers", params={"phone": "+49309876543"})) == []
        refused(await staff.get("/api/customers", params={"phone": "no number"}), 422, "invalid_phone", "phone")
        refused(await staff.post("/api/customers", json={"name": "A", "phone": "nope"}), 422, "invalid_phone", "phone")
        path = f"/api/customers/{made_['id']}"
        refused(await staff.put(path, json={"phone": "12"}), 422, "invalid_phone", "phone")
        assert expect(await staff.put(path, json={"phone": "089 1234567"}))["phone"] == "+49891234567"
        assert expect(await staff.put(path, json={"phone": None}))["phone"] is None
        # If the restaurant has no country, the number must name its own.
        refused(await stranger.post("/api/customers", json={"name": "A", "phone": "030 98765"}), 422, "invalid_phone")
        made(await stranger.post("/api/customers", json={"name": "A", "phone": "+49 30 9876543"}))


# -- spending ----------------------------------------------------------------------------------------------------


async def test_order_counts_when_it_is_paid_and_without_its_refunds(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        ada, bea = await customer(staff), await customer(staff, name="Bea")
        first = await order(restaurant, staff, ada, 1_250)
        await order(restaurant, staff, ada, 9_999)  # this order is never paid
        await pay(staff, first, 1_000)
        await synced(staff, first)
        assert await totals(staff, ada) == (0, 0, 0)
        await pay(staff, first, 250)
        await totals_become(staff, ada, 1_250, 1, 12)
        second = await order(restaurant, staff, ada, 760)
        await pay(staff, second, 760)
        await totals_become(staff, ada, 2_010, 2, 20)
        await pay(staff, second, -60)
        await totals_become(staff, ada, 1_950, 2, 19)
        await pay(staff, second, -700)
        await totals_become(staff, ada, 1_250, 1, 12)
        assert await totals(staff, bea) == (0, 0, 0)
        found = expect(await staff.get("/api/customers?limit=200&fields=total_spent,visits"))
        assert {one["id"]: one["total_spent"] for one in found}[id_of(ada)] == 1_250
        # The order was placed for the wrong customer: it is Bea's.
        expect(await staff.put(first, json={"customer_id": id_of(bea)}))
        await totals_become(staff, ada, 0, 0, 0)
        await totals_become(staff, bea, 1_250, 1, 12)


async def test_free_order_counts_as_a_visit_and_a_deleted_order_does_not(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        ada = await customer(staff)
        free = await order(restaurant, staff, ada, 500, deposit_used=500)
        await totals_become(staff, ada, 0, 1, 0)
        expect(await staff.put(free, json={"status": "cancelled"}))
        await totals_become(staff, ada, 0, 0, 0)
        paid = await order(restaurant, staff, ada, 800)
        await pay(staff, paid, 800)
        await totals_become(staff, ada, 800, 1, 8)
        expect(await staff.delete(paid))
        await totals_become(staff, ada, 0, 0, 0)
        expect(await staff.post(f"{paid}/restore"))
        await totals_become(staff, ada, 800, 1, 8)
        expect(await staff.delete(ada))
        refused(await staff.get(ada), 404, "customer_deleted")
        refused(await staff.post(f"{ada}/loyalty", json={"points": 1}), 404, "customer_deleted")
        expect(await staff.post(f"{ada}/restore"))
        assert await totals(staff, ada) == (800, 1, 8)


async def test_order_counts_once_however_often_its_events_arrive(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        ada = await customer(staff)
        expect(await staff.post(f"{ada}/loyalty", json={"points": 5, "id": str(uuid4())}))
        paid = await order(restaurant, staff, ada, 1_000)
        for amount in (400, 600, -100):
            await pay(staff, paid, amount)
        await totals_become(staff, ada, 900, 1, 14)
        events = [*await recorded(restaurant, id_of(paid), 4), *await recorded(restaurant, id_of(ada), 2)]
        async with restaurant.system.database() as connection:
            for _ in range(3):
                await restaurant.publish(*reversed(events), *events)
            last = await order(restaurant, staff, ada, 1)
            # The order is behind the repeats in the lane: when it is synced, they are written.
            await synced(staff, last)
            assert await connection.fetchval("select count(*) from payments where order_id = $1", id_of(paid)) == 3
        assert await totals(staff, ada) == (900, 1, 14)


# -- points ------------------------------------------------------------------------------------------------------


async def test_moves_of_points_count_once_and_are_visible_at_once(restaurant: RestaurantRig) -> None:
    ids = [str(uuid4()) for _ in range(15)]
    async with restaurant.client() as staff:
        ada = await customer(staff)
        moves = [staff.post(f"{ada}/loyalty", json={"points": 3, "id": one, "reason": "quiz"}) for one in ids * 2]
        replies = await asyncio.gather(*moves)
        assert Counter(reply.status_code for reply in replies) == {200: 30}
        assert sum("idempotency-replayed" in reply.headers for reply in replies) == 15
        # The points are visible at once, even if PostgreSQL does not have them yet.
        assert await totals(staff, ada) == (0, 0, 45)
        found = expect(await staff.post(f"{ada}/loyalty", json={"points": -5, "reason": "coffee"}))
        assert found["loyalty_points"] == 40
        again = {"points": 4, "id": ids[0], "reason": "quiz"}
        refused(await staff.post(f"{ada}/loyalty", json=again), 409, "move_id_reused", "id")
        refused(await staff.post(f"{ada}/loyalty", json={"points": 0}), 422, "invalid_input", "points")
        bea = await customer(staff)
        expect(await staff.post(f"{bea}/loyalty", json={**again}))  # the id is unique only within a customer
        assert (await totals(staff, bea), await totals(staff, ada)) == ((0, 0, 4), (0, 0, 40))
        await synced(staff, ada, bea)
        assert (await totals(staff, bea), await totals(staff, ada)) == ((0, 0, 4), (0, 0, 40))
    async with restaurant.system.database() as connection:
        found = await connection.fetchrow(
            "select count(*), sum(points) from loyalty_moves where customer_id = $1", id_of(ada)
        )
    assert found is not None
    assert tuple(found) == (16, 40)


async def test_move_that_postgres_has_before_the_state_was_read_again_counts_once(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        ada = await customer(staff)
        for points in (20, -3):
            expect(await staff.post(f"{ada}/loyalty", json={"points": points}))
        await synced(staff, ada)
        _, before, after = [CUSTOMER.decode(one) for one in await recorded(restaurant, id_of(ada), 3)]
        unavailable = Mirror("redis://127.0.0.1:1/0", timeout=0.2, stale_seconds=60)
        postgres = Postgres(
            restaurant.system.database_url("ticketrail_api"), Settings(_env_file=None, database_timeout_seconds=15.0)
        )
        figures = DerivedFigures(cast(EntityReads, None), postgres, unavailable)
        of = Restaurant(id=restaurant.id, slug="a", name="A")
        expected = (17, frozenset(move.id for move in after.loyalty_moves))
        for state in (before, after):
            assert await figures.points(of, state) == expected
        await postgres.close()
        await unavailable.close()


async def test_concurrent_redemptions_never_exceed_the_points(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        ada = await customer(staff)
        paid = await order(restaurant, staff, ada, 5_000)
        await pay(staff, paid, 5_000)
        await totals_become(staff, ada, 5_000, 1, 50)
        expect(await staff.post(f"{ada}/loyalty", json={"points": 20}))
        details = refused(await staff.post(f"{ada}/loyalty", json={"points": -71}), 409, "not_enough_points", "points")
        assert details["loyalty_points"] == 70
        key = str(uuid4())
        redeems = [{"points": -10, "id": str(uuid4())} for _ in range(12)]
        replies = await asyncio.gather(*(staff.post(f"{ada}/loyalty", json=one) for one in redeems))
        assert Counter(reply.status_code for reply in replies) == {200: 7, 409: 5}
        assert {reply.json()["error"]["code"] for reply in replies if reply.is_error} == {"not_enough_points"}
        assert await totals(staff, ada) == (5_000, 1, 0)
        done = next(one for one, reply in zip(redeems, replies, strict=True) if reply.is_success)
        expect(await staff.post(f"{ada}/loyalty", json=done))  # a repeat gets the first reply instead of a refusal
        assert await totals(staff, ada) == (5_000, 1, 0)
        # The payment is refunded after its points were redeemed: the balance is negative, so nothing can be redeemed.
        await pay(staff, paid, -5_000)
        await totals_become(staff, ada, 0, 0, -50)
        refused(await staff.post(f"{ada}/loyalty", json={"points": -1, "id": key}), 409, "not_enough_points", "points")
