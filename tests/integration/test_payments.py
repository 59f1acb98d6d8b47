"""Payments: facts inside orders, from which the payment status is derived."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast
from uuid import uuid4

import httpx
import msgspec
import pytest

from deploy.local.port_check import find_free
from services.orders.entity_changes import EntityChanges
from services.orders.menu import Menus
from services.orders.order_commands import OrderCommands
from services.orders.requests import RecordPayment
from shared.entities.contract import Head, encode, now
from shared.entities.order import Order, Payment, payment_status
from shared.rail import commit
from shared.rail.draft import Draft
from shared.rail.head import Heads, Standing
from shared.rail.idempotency import FactId
from shared.rail.outcomes import ClaimLost, Committed
from shared.rail.record import Durability
from shared.security.tokens import Identity, Role
from tests.rigs import builders
from tests.rigs.builders import new_id, payment
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    """A restaurant without tax: an order costs the sum of its items."""
    return await register_restaurant(system, tax_basis_points=0)


async def place(restaurant: RestaurantRig, client: httpx.AsyncClient, price: int = 1_000, **fields: Any) -> str:
    """Places an order that costs `price`; returns its path."""
    dish = (await restaurant.dish(price=price))["id"]
    body = {"items": [{"menu_item_id": dish, "quantity": 1}], **fields}
    return f"/api/orders/{made(await client.post('/api/orders', json=body))['id']}"


async def pay(client: httpx.AsyncClient, order: str, amount: int, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = made(
        await client.post(f"{order}/payments", json={"amount": amount, "method": "card", **fields})
    )
    return found


async def state(client: httpx.AsyncClient, order: str) -> tuple[str, list[int]]:
    found = expect(await client.get(order))
    return found["payment_status"], [one["amount"] for one in found["payments"]]


async def stored_payments(restaurant: RestaurantRig, order: str) -> list[int]:
    async with restaurant.system.database() as connection:
        rows = await connection.fetch(
            "select amount from payments where order_id = $1 order by created_at, id", order.rpartition("/")[2]
        )
    return [row["amount"] for row in rows]


async def test_payments_determine_the_payment_status(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        order = await place(restaurant, staff, 1_000)
        assert await state(staff, order) == ("pending", [])
        first = await pay(staff, order, 400, method="cash", reference="till 2")
        assert first["payment_status"] == "partially_paid"
        assert first["payment"] == first["payments"][0]
        assert {name: first["payment"][name] for name in ("amount", "method", "reference")} == {
            "amount": 400,
            "method": "cash",
            "reference": "till 2",
        }
        expected = [400]
        for amount, status in (
            (599, "partially_paid"),
            (1, "paid"),
            (500, "paid"),  # more than the order costs
            (-500, "paid"),
            (-1, "partially_paid"),
            (-999, "refunded"),
            (1_000, "paid"),
            (-1_000, "refunded"),
        ):
            expected.append(amount)
            assert (await pay(staff, order, amount))["payment_status"] == status
            assert await state(staff, order) == (status, expected)

        await eventually(
            lambda: stored_payments(restaurant, order),
            what="exactly the payments in PostgreSQL",
            until=lambda found: found == expected,
        )
        async with restaurant.system.database() as connection:
            stored = await connection.fetchval("select payment_status from orders where id = $1", first["id"])
        assert stored == "refunded"


async def test_payment_status_follows_changes_of_the_total(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        order = await place(restaurant, staff, 1_000)
        await pay(staff, order, 1_000)
        assert expect(await staff.put(order, json={"tip_amount": 1}))["payment_status"] == "partially_paid"
        dearer, cheaper = (await restaurant.dish(price=1_500))["id"], (await restaurant.dish(price=600))["id"]
        for dish, status in ((dearer, "partially_paid"), (cheaper, "paid")):
            changed = expect(await staff.put(order, json={"items": [{"menu_item_id": dish, "quantity": 1}]}))
            assert changed["payment_status"] == status
        assert await state(staff, order) == ("paid", [1_000])


async def test_order_with_nothing_to_pay_is_paid(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        order = await place(restaurant, staff, 1_000, deposit_used=1_000)
        assert expect(await staff.get(order))["total"] == 0
        assert await state(staff, order) == ("paid", [])
        assert expect(await staff.put(order, json={"tip_amount": 50}))["payment_status"] == "pending"
        assert (await pay(staff, order, 50))["payment_status"] == "paid"
        for_free = await place(restaurant, staff, 0)
        assert await state(staff, for_free) == ("paid", [])


@pytest.mark.parametrize(
    ("amounts", "total", "status"),
    [
        ((), 100, "pending"),
        ((), 0, "paid"),
        ((99,), 100, "partially_paid"),
        ((100,), 100, "paid"),
        ((101,), 100, "paid"),
        ((1,), 0, "paid"),
        ((100, -1), 100, "partially_paid"),
        ((100, -100), 100, "refunded"),
        ((100, -100), 0, "refunded"),
        ((100, -100, 40), 100, "partially_paid"),
        ((100, -60, -60), 100, "refunded"),  # two refunds that a fork allowed
    ],
)
def test_payment_status_is_derived_from_payments_and_total(amounts: Sequence[int], total: int, status: str) -> None:
    assert payment_status(tuple(payment(amount=amount) for amount in amounts), total) == status


async def test_repeated_payment_counts_once(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        order, other = await place(restaurant, staff, 1_000), await place(restaurant, staff, 1_000)
        body = {"id": new_id(), "amount": 300, "method": "card", "reference": "auth 7"}
        replies = await asyncio.gather(*(staff.post(f"{order}/payments", json=body) for _ in range(10)))
        assert {made(reply)["payment"]["id"] for reply in replies} == {body["id"]}
        assert sum("idempotency-replayed" in reply.headers for reply in replies) == 9
        again = made(await staff.post(f"{order}/payments", json={**body, "id": str(body["id"]).upper()}))
        assert again["version"] == 2
        assert await state(staff, order) == ("partially_paid", [300])
        for other_fields in ({"amount": 301}, {"amount": -300}, {"method": "cash"}, {"reference": None}):
            reply = await staff.post(f"{order}/payments", json={**body, **other_fields})
            refused(reply, 409, "payment_id_reused", "id")
        assert await state(staff, order) == ("partially_paid", [300])
        # The client chooses the id, so it is unique only within the order.
        await pay(staff, other, 1_000, id=body["id"])
        assert await state(staff, other) == ("paid", [1_000])


@pytest.fixture
async def second(system: System) -> AsyncIterator[str]:
    """URL of a second instance of the orders service."""
    (port,) = find_free(1)
    system.urls["second"] = f"http://127.0.0.1:{port}"
    system.start("orders", alias="second", instance=4, orders_port=port)
    try:
        await system.ready("second")
        yield system.urls["second"]
    finally:
        await system.stop("second")
        del system.urls["second"]


async def test_concurrent_payments_all_count(restaurant: RestaurantRig, second: str) -> None:
    """The payments go to two instances, at the same time as other changes."""
    async with (
        restaurant.client() as staff,
        restaurant.system.client(service="second", token=restaurant.token) as other,
    ):
        order = await place(restaurant, staff, 20_000)
        amounts = [1_000 + n for n in range(20)]
        paid = asyncio.gather(*(pay((staff, other)[n % 2], order, amount) for n, amount in enumerate(amounts)))
        noted = asyncio.gather(*(staff.put(order, json={"notes": f"n{n}"}) for n in range(2)))
        replies, changes = await paid, await noted
        assert len({one["version"] for one in replies}) == 20
        assert {reply.status_code for reply in changes} <= {200, 409}
        status, found = await state(staff, order)
        assert (status, sorted(found)) == ("paid", amounts)

        async def stored() -> list[int]:
            return sorted(await stored_payments(restaurant, order))

        await eventually(stored, what="all payments in PostgreSQL", until=lambda seen: seen == amounts)


async def test_payment_that_loses_its_claim_is_retried_on_the_current_head() -> None:
    """Ten other payments of the order come first; the payment is added after all of them."""
    others: list[Payment] = []

    class Stores:
        async def head(self, *_: Any) -> Standing:
            order = builders.order(payments=tuple(others))
            return Standing(Head(len(others) + 1, new_id()), order, encode(order))

    class Rail:
        async def commit(self, draft: Draft) -> Committed:
            if len(others) < 10:
                others.append(payment())
                raise ClaimLost
            return Committed(draft.state, Head(len(others) + 2, new_id()), Durability.BROKER, True, encode(draft.state))

    changes = EntityChanges(cast(commit.Rail, Rail()), cast(Heads, Stores()))
    commands = OrderCommands(changes, cast(Menus, None))
    identity = Identity(new_id(), Role.STAFF, builders.RESTAURANT)
    fact = FactId.of(None, "order", "caller", "route", None)
    done, made = await commands.pay(identity, new_id(), RecordPayment(amount=7, method="cash"), fact)
    assert done.state.payments == (*others, made)
    assert len(done.state.payments) == 11


async def test_refund_is_never_more_than_the_paid_amount(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        order = await place(restaurant, staff, 1_000)
        reply = await staff.post(f"{order}/payments", json={"amount": -1, "method": "card"})
        assert refused(reply, 409, "refund_above_paid", "amount")["paid"] == 0
        await pay(staff, order, 700)
        await pay(staff, order, -200)
        reply = await staff.post(f"{order}/payments", json={"amount": -501, "method": "card"})
        assert refused(reply, 409, "refund_above_paid", "amount")["paid"] == 500
        # A repeated refund is the same refund, although a new one of this amount would be too much now.
        refund = {"id": new_id(), "amount": -500, "method": "card"}
        for _ in range(2):
            made(await staff.post(f"{order}/payments", json=refund))
        assert await state(staff, order) == ("refunded", [700, -200, -500])


async def test_concurrent_refunds_never_exceed_the_paid_amount(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        order = await place(restaurant, staff, 1_000)
        await pay(staff, order, 1_000)
        replies = await asyncio.gather(
            *(staff.post(f"{order}/payments", json={"amount": -300, "method": "card"}) for _ in range(8))
        )
        assert sorted(reply.status_code for reply in replies) == [201] * 3 + [409] * 5
        assert {expect(reply, 409)["code"] for reply in replies if reply.status_code == 409} == {"refund_above_paid"}
        assert await state(staff, order) == ("partially_paid", [1_000, -300, -300, -300])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"amount": 0}, "amount"),
        ({"amount": 1.5}, "amount"),
        ({"amount": 10**13}, "amount"),
        ({"amount": "100"}, "amount"),
        ({"method": None}, "method"),
        ({"id": "7"}, "id"),
        ({"reference": "a\0b"}, "reference"),
        ({"currency": "USD"}, "currency"),
    ],
    ids=str,
)
async def test_invalid_payment_is_refused(restaurant: RestaurantRig, fields: dict[str, Any], field: str) -> None:
    async with restaurant.client() as staff:
        order = await place(restaurant, staff, 1_000)
        reply = await staff.post(f"{order}/payments", json={"amount": 100, "method": "card", **fields})
        refused(reply, 422, "invalid_input", field)
        assert await state(staff, order) == ("pending", [])


async def test_cancelled_order_can_be_refunded_but_not_paid(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        order = await place(restaurant, staff, 1_000)
        await pay(staff, order, 1_000)
        expect(await staff.put(order, json={"status": "cancelled"}))
        reply = await staff.post(f"{order}/payments", json={"amount": 1, "method": "card"})
        refused(reply, 409, "order_cancelled", "amount")
        assert (await pay(staff, order, -1_000))["payment_status"] == "refunded"


async def test_missing_or_foreign_order_cannot_be_paid(restaurant: RestaurantRig) -> None:
    body = {"amount": 100, "method": "card"}
    stranger = await register_restaurant(restaurant.system)
    async with restaurant.client() as staff, stranger.client(Role.ADMIN) as them:
        order = await place(restaurant, staff, 1_000)
        refused(await them.post(f"{order}/payments", json=body), 404, "not_found")
        assert expect(await them.get("/api/payments")) == []
        refused(await staff.post(f"/api/orders/{uuid4()}/payments", json=body), 404, "not_found")
        expect(await staff.delete(order))
        refused(await staff.post(f"{order}/payments", json=body), 404, "order_deleted")
    async with restaurant.client(Role.CUSTOMER, session="guest") as guest:
        refused(await guest.post(f"{order}/payments", json=body), 403, "forbidden")
        refused(await guest.get("/api/payments"), 403, "forbidden")


# -- the list ----------------------------------------------------------------------------------------------------


async def pages(client: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    """Reads all pages of the list."""
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        reply = await client.get("/api/payments", params={**query, **({"cursor": cursor} if cursor else {})})
        found += expect(reply)
        cursor = reply.json()["pagination"]["next_cursor"]
        if cursor is None:
            return found


async def test_list_has_every_payment_once_including_pending_ones(system: System) -> None:
    restaurant = await register_restaurant(system)
    async with restaurant.client() as staff:
        paid: list[tuple[str, str]] = []
        orders = [await place(restaurant, staff, 5_000) for _ in range(2)]
        for n in range(12):
            order = orders[n % 2]
            made_now = await pay(staff, order, 100 + n)
            paid.insert(0, (order.rpartition("/")[2], made_now["payment"]["id"]))
            listed = await pages(staff, limit=5)
            assert [(one["order_id"], one["id"]) for one in listed] == paid
        async with restaurant.system.database() as connection:
            await eventually(
                lambda: connection.fetchval(
                    "select count(*) from payments where restaurant_id = $1::uuid", restaurant.id
                ),
                what="all payments in PostgreSQL",
                until=lambda count: count == 12,
            )
        assert [(one["order_id"], one["id"]) for one in await pages(staff, limit=5)] == paid
        # A payment that arrives between two pages does not move others to the next page.
        first = await staff.get("/api/payments", params={"limit": 5})
        await pay(staff, orders[0], 1)
        second = await staff.get(
            "/api/payments", params={"limit": 7, "cursor": first.json()["pagination"]["next_cursor"]}
        )
        assert [(one["order_id"], one["id"]) for one in expect(first) + expect(second)] == paid


async def test_list_filters_by_time_method_and_order(system: System) -> None:
    restaurant = await register_restaurant(system)
    async with restaurant.client() as staff:
        one, other = await place(restaurant, staff, 5_000), await place(restaurant, staff, 5_000)
        for order, amount, method in ((one, 1, "cash"), (other, 2, "card"), (one, 3, "card"), (other, -2, "card")):
            await pay(staff, order, amount, method=method)
        listed = await pages(staff)
        assert [one["amount"] for one in listed] == [-2, 3, 2, 1]
        oldest, _, third, newest = (one["created_at"] for one in reversed(listed))

        async def amounts(**query: str) -> list[int]:
            return [one["amount"] for one in await pages(staff, limit=1, **query)]

        # The first round reads while some payments are pending, the second one when none is.
        for _ in range(2):
            assert await amounts(method="cash") == [1]
            assert await amounts(order_id=one.rpartition("/")[2]) == [3, 1]
            assert await amounts(**{"from": third}) == [-2, 3]
            assert await amounts(to=third) == [3, 2, 1]
            assert await amounts(**{"from": oldest, "to": oldest}) == [1]
            assert await amounts(**{"from": newest, "method": "cash"}) == []

            async def stored() -> int:
                return len(await stored_payments(restaurant, one)) + len(await stored_payments(restaurant, other))

            await eventually(stored, what="all payments in PostgreSQL", until=lambda count: count == 4)
        for name in ("from", "to"):
            for wrong in ("yesterday", "2026-03-14T12:30:00"):
                refused(await staff.get("/api/payments", params={name: wrong}), 422, "invalid_input", name)
        refused(await staff.get("/api/payments", params={"cursor": "x"}), 422, "invalid_cursor", "cursor")


# -- forks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["00000000", "ffffffff"], ids=["superseded", "head"])
async def test_payments_in_both_states_of_a_fork_count(restaurant: RestaurantRig, prefix: str) -> None:
    """After a lost mirror two terminals claimed one version. Each recorded a payment, and one state is the head."""
    async with restaurant.client() as staff:
        order = await place(restaurant, staff, 1_000)
        await pay(staff, order, 400)
        id_ = order.rpartition("/")[2]

        async def stored(version: int) -> Any:
            async with restaurant.system.database() as connection:
                return await connection.fetchrow(
                    "select base_change_id::text as base, data->'after' as after from changes"
                    " where entity_id = $1 and version = $2",
                    id_,
                    version,
                )

        row = await eventually(lambda: stored(2), what="the payment in PostgreSQL")
        ours = msgspec.json.decode(row["after"], type=Order)
        before = msgspec.structs.replace(ours, payments=(), payment_status="pending")
        at = now()
        theirs = Payment(id=new_id(), amount=600, method="cash", created_at=at)
        fork = msgspec.structs.replace(ours, payments=(theirs,), updated_at=at)
        base = builders.change(before, id=row["base"], entityversion=1)
        # If two changes have one version, the larger change id wins.
        id_of_change = prefix + new_id()[8:]
        await restaurant.publish(
            builders.change(fork, event="payment_recorded", base=base, before=before, id=id_of_change, time=at)
        )

        async def seen() -> tuple[str, list[int]]:
            status, amounts = await state(staff, order)
            return status, sorted(amounts)

        await eventually(seen, what="both payments", until=lambda found: found == ("paid", [400, 600]))

        async def row_of_order() -> Any:
            async with restaurant.system.database() as connection:
                return await connection.fetchrow("select version, payment_status from orders where id = $1", id_)

        await eventually(
            row_of_order, what="the paid state in PostgreSQL", until=lambda found: tuple(found) == (3, "paid")
        )
        assert sorted(await stored_payments(restaurant, order)) == [400, 600]
        listed = expect(await staff.get("/api/payments", params={"order_id": id_}))
        assert sorted(one["amount"] for one in listed) == [400, 600]
        async with restaurant.system.database() as connection:
            conflicts = await connection.fetch("select resolved_at from conflicts where entity_id = $1", id_)
        assert [one["resolved_at"] for one in conflicts] == [None]
        # The whole sum can be refunded, but no more.
        reply = await staff.post(f"{order}/payments", json={"amount": -1_001, "method": "card"})
        refused(reply, 409, "refund_above_paid", "amount")
        assert (await pay(staff, order, -1_000))["payment_status"] == "refunded"
