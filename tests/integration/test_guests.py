"""Guests at a table: the limits of their token, and the fields that they do not see."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from shared.security.tokens import Identity, Role, Tokens
from tests.rigs.sign_in import RegisteredRestaurant, client, expect, register
from tests.rigs.system import System

ORDERS_PER_MINUTE = 8


@pytest.fixture(scope="module")
async def url(system: System) -> AsyncIterator[str]:
    async with system.another_orders("guests", guest_orders_per_minute=ORDERS_PER_MINUTE) as url:
        yield url


@pytest.fixture(scope="module")
async def restaurant(system: System, url: str) -> RegisteredRestaurant:
    return await register(system, url)


@pytest.fixture(scope="module")
async def tables(restaurant: RegisteredRestaurant) -> list[str]:
    async with restaurant.client() as admin:
        return [
            str(expect(await admin.post("/api/tables", json={"label": label, "seats": 2}), 201)["id"])
            for label in ("Window", "Terrace")
        ]


@pytest.fixture(scope="module")
async def dish(restaurant: RegisteredRestaurant) -> dict[str, Any]:
    """A dish with a recipe."""
    async with restaurant.client() as admin:
        stock = expect(await admin.post("/api/inventory", json={"name": "Rice", "quantity": 9_000, "unit": "g"}), 201)
        recipe = [{"inventory_item_id": stock["id"], "quantity": 1}]
        body = {"name": "Dosa", "price": 900, "category": "Mains", "consumes": recipe}
        return dict(expect(await admin.post("/api/menu", json=body), 201))


async def guest_at(restaurant: RegisteredRestaurant, table: str) -> httpx.AsyncClient:
    async with client(restaurant.url) as anybody:
        body = {"slug": restaurant.slug, "table_id": table}
        opened = expect(await anybody.post("/api/auth/table-session", json=body), 201)
    return restaurant.client(opened["access_token"])


def order(dish: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"items": [{"menu_item_id": dish["id"], "quantity": 1}], **fields}


async def test_the_table_of_the_token_is_filled_in_and_another_one_is_refused(
    restaurant: RegisteredRestaurant, tables: list[str], dish: dict[str, Any]
) -> None:
    own, other = tables
    async with await guest_at(restaurant, own) as guest:
        for fields in ({}, {"table_id": own}, {"table_id": own.upper()}):
            assert expect(await guest.post("/api/orders", json=order(dish, **fields)), 201)["table_id"] == own
        for wrong in (other, str(uuid4())):
            error = expect(await guest.post("/api/orders", json=order(dish, table_id=wrong)), 403)
            assert (error["code"], error["details"]["field"]) == ("wrong_table", "table_id")


async def test_a_guest_sees_only_its_own_table(restaurant: RegisteredRestaurant, tables: list[str]) -> None:
    own, other = tables
    async with await guest_at(restaurant, own) as guest, restaurant.client() as admin:
        assert [one["id"] for one in expect(await guest.get("/api/tables"))] == [own]
        assert expect(await guest.get(f"/api/tables/{own}"))["id"] == own
        hidden = expect(await guest.get(f"/api/tables/{other}"), 404)
        unknown = expect(await guest.get(f"/api/tables/{uuid4()}"), 404)
        assert hidden["code"] == unknown["code"]
        assert {one["id"] for one in expect(await admin.get("/api/tables"))} == set(tables)


async def test_a_guest_sees_no_recipe(
    restaurant: RegisteredRestaurant, tables: list[str], dish: dict[str, Any]
) -> None:
    async with await guest_at(restaurant, tables[0]) as guest, restaurant.client() as admin:
        for shown in (expect(await guest.get(f"/api/menu/{dish['id']}")), expect(await guest.get("/api/menu"))[0]):
            assert shown["name"] == "Dosa" and "consumes" not in shown
        assert expect(await guest.get("/api/menu?fields=consumes"), 422)["details"]["field"] == "fields"
        assert expect(await admin.get(f"/api/menu/{dish['id']}"))["consumes"] == dish["consumes"]
        assert expect(await admin.get("/api/menu?fields=consumes"))[0]["consumes"] == dish["consumes"]
        # The stock that an order holds is the recipe too.
        placed = expect(await guest.post("/api/orders", json=order(dish)), 201)
        path = f"/api/orders/{placed['id']}"
        for shown in (placed, expect(await guest.get(path)), expect(await guest.get("/api/orders"))[0]):
            assert shown["id"] == placed["id"] and "holds" not in shown
        assert len(expect(await admin.get(path))["holds"]) == 1
        large = {"items": [{"menu_item_id": dish["id"], "quantity": 1_000}] * 10}
        short = expect(await guest.post("/api/orders", json=large), 409)
        assert (short["code"], short["details"]) == ("out_of_stock", {"field": "items[0].quantity"})


async def test_a_guest_session_may_place_only_some_orders_in_a_minute(
    system: System, restaurant: RegisteredRestaurant, tables: list[str], dish: dict[str, Any]
) -> None:
    async with await guest_at(restaurant, tables[0]) as guest, await guest_at(restaurant, tables[0]) as neighbour:
        replies = [await guest.post("/api/orders", json=order(dish)) for _ in range(ORDERS_PER_MINUTE + 1)]
        assert [reply.status_code for reply in replies] == [201] * ORDERS_PER_MINUTE + [429]
        assert int(replies[-1].headers["retry-after"]) >= 1
        expect(await neighbour.post("/api/orders", json=order(dish)), 201)
    async with restaurant.client() as admin:
        for _ in range(ORDERS_PER_MINUTE + 1):
            expect(await admin.post("/api/orders", json=order(dish)), 201)


async def test_the_table_in_a_token_must_be_an_id(system: System, restaurant: RegisteredRestaurant) -> None:
    tokens = Tokens(system.env["TICKETRAIL_JWT_SECRET"], ttl_seconds=60)
    forged = tokens.issue(Identity("u1", Role.CUSTOMER, restaurant.id, "", "s1", "table 7"))
    async with restaurant.client(forged) as guest:
        expect(await guest.get("/api/auth/me"), 401)
