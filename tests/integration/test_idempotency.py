"""Repeats with the same Idempotency-Key on every route that adds a fact: a payment, a stock move, a loyalty move."""

import asyncio
import re
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from msgspec import Struct

from services.orders.resources import RESOURCES
from shared.security.tokens import Role
from tests.contract import documents
from tests.rigs.http_client import http_client
from tests.rigs.link import link_to
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually


class Additive(Struct, frozen=True):
    """A route that adds a fact to an entity."""

    name: str
    entity: str
    """The path of the entity's routes."""
    new: dict[str, Any]
    """The body of a new entity; an order has none."""
    facts: str
    body: dict[str, Any]
    other: dict[str, Any]
    """Fields of another request."""
    sum_of: Callable[[dict[str, Any]], int]


ROUTES = (
    Additive(
        "payments",
        "/api/orders",
        {},
        "payments",
        {"amount": 300, "method": "card"},
        {"amount": 301},
        lambda order: sum(one["amount"] for one in order["payments"]),
    ),
    Additive(
        "moves",
        "/api/inventory",
        {"name": "Dough", "quantity": 0},
        "moves",
        {"quantity": 24, "reason": "delivery"},
        {"reason": "another delivery"},
        lambda item: int(item["quantity"]),
    ),
    Additive(
        "loyalty",
        "/api/customers",
        {"name": "Ada"},
        "loyalty_moves",
        {"points": 5},
        {"points": 6},
        lambda customer: sum(one["points"] for one in customer["loyalty_moves"]),
    ),
)
EVERY = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system, tax_basis_points=0)


async def target(restaurant: RestaurantRig, route: Additive) -> str:
    """Creates an entity; returns its path."""
    async with restaurant.client(Role.ADMIN) as admin:
        body = route.new or {"items": [{"menu_item_id": (await restaurant.dish(price=1_000))["id"], "quantity": 1}]}
        return f"{route.entity}/{made(await admin.post(route.entity, json=body))['id']}"


def with_key(key: str | None = None) -> dict[str, str]:
    return {"Idempotency-Key": key or str(uuid4())}


async def total(client: httpx.AsyncClient, route: Additive, path: str) -> tuple[int, int]:
    """Returns the number of facts, and their sum."""
    found = expect(await client.get(path))
    return len(found[route.facts]), route.sum_of(found)


def added(route: Additive, times: int) -> tuple[int, int]:
    return times, times * next(value for value in route.body.values() if isinstance(value, int))


@EVERY
async def test_fact_that_is_repeated_with_its_key_counts_once(restaurant: RestaurantRig, route: Additive) -> None:
    path, key = await target(restaurant, route), with_key()
    async with restaurant.client(Role.ADMIN) as admin:
        replies = await asyncio.gather(
            *(admin.post(f"{path}/{route.name}", json=route.body, headers=key) for _ in range(6))
        )
        assert {reply.is_success for reply in replies} == {True}
        assert sum("idempotency-replayed" in reply.headers for reply in replies) == 5
        assert await total(admin, route, path) == added(route, 1)
        again = {name: route.body[name] for name in reversed(route.body)}  # the order of the fields says nothing
        assert (await admin.post(f"{path}/{route.name}", json=again, headers=key)).headers["idempotency-replayed"]
        other = await admin.post(f"{path}/{route.name}", json={**route.body, **route.other}, headers=key)
        refused(other, 422, "idempotency_key_reused", "Idempotency-Key")
        assert await total(admin, route, path) == added(route, 1)
        # Another key, and no key, are other requests.
        for headers in (with_key(), None):
            assert (await admin.post(f"{path}/{route.name}", json=route.body, headers=headers)).is_success
        assert await total(admin, route, path) == added(route, 3)


@EVERY
async def test_one_key_of_two_callers_or_of_two_entities_means_two_facts(
    restaurant: RestaurantRig, route: Additive
) -> None:
    """Two tills may count their requests in the same way."""
    path, elsewhere, key = await target(restaurant, route), await target(restaurant, route), with_key("1")
    async with restaurant.client(Role.ADMIN) as one, restaurant.client(Role.STAFF) as other:
        assert (await one.post(f"{path}/{route.name}", json=route.body, headers=key)).is_success
        assert (await one.post(f"{elsewhere}/{route.name}", json=route.body, headers=key)).is_success
        second = await other.post(f"{path}/{route.name}", json=route.body, headers=key)
        if second.status_code == 403:  # staff do not count stock
            assert await total(one, route, path) == added(route, 1)
        else:
            assert await total(one, route, path) == added(route, 2)
        assert await total(one, route, elsewhere) == added(route, 1)


@EVERY
async def test_key_decides_beside_an_id_in_the_body(restaurant: RestaurantRig, route: Additive) -> None:
    """A client that makes a new id for each try must not pay twice."""
    path, key = await target(restaurant, route), with_key()
    one, other = {**route.body, "id": str(uuid4())}, {**route.body, "id": str(uuid4())}
    async with restaurant.client(Role.ADMIN) as admin:

        async def send(body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
            return await admin.post(f"{path}/{route.name}", json=body, headers=headers)

        assert (await send(one, key)).is_success
        assert (await send(one, key)).headers["idempotency-replayed"] == "true"
        for body in (other, route.body):
            refused(await send(body, key), 422, "idempotency_key_reused", "Idempotency-Key")
        # The id still counts without the key, and with another one.
        for headers in (None, with_key()):
            assert (await send(one, headers)).headers["idempotency-replayed"] == "true"
        assert await total(admin, route, path) == added(route, 1)
        facts = expect(await admin.get(path))[route.facts]
        assert [fact["id"] for fact in facts] == [one["id"]]
        assert "request_key" not in facts[0]
        # A key that came first without an id is used up for a request with one.
        second = with_key()
        assert (await send(route.body, second)).is_success
        refused(await send(other, second), 422, "idempotency_key_reused", "Idempotency-Key")
        assert await total(admin, route, path) == added(route, 2)


@EVERY
async def test_repeat_is_known_after_the_entity_was_deleted(restaurant: RestaurantRig, route: Additive) -> None:
    path, key = await target(restaurant, route), with_key()
    async with restaurant.client(Role.ADMIN) as admin:
        assert (await admin.post(f"{path}/{route.name}", json=route.body, headers=key)).is_success
        expect(await admin.delete(path))
        again = await admin.post(f"{path}/{route.name}", json=route.body, headers=key)
        assert again.is_success, again.text
        assert again.headers["idempotency-replayed"] == "true"
        other = await admin.post(f"{path}/{route.name}", json={**route.body, **route.other}, headers=key)
        refused(other, 422, "idempotency_key_reused", "Idempotency-Key")
        new = await admin.post(f"{path}/{route.name}", json=route.body, headers=with_key())
        assert new.status_code == 404


@EVERY
async def test_key_must_be_visible_text(restaurant: RestaurantRig, route: Additive) -> None:
    path = await target(restaurant, route)
    async with restaurant.client(Role.ADMIN) as admin:
        for wrong in ("", "a b", "x" * 201):
            reply = await admin.post(f"{path}/{route.name}", json=route.body, headers={"Idempotency-Key": wrong})
            refused(reply, 422, "invalid_input", "Idempotency-Key")
        assert await total(admin, route, path) == added(route, 0)


@pytest.mark.parametrize("service", list(documents.OPENAPI))
async def test_route_that_does_not_honour_a_key_refuses_it(
    system: System, restaurant: RestaurantRig, service: str
) -> None:
    """Otherwise the client would believe that a repeat is safe."""
    refusing = []
    async with system.client("operator" if service == "sync" else "admin", service=service) as client:
        for path, item in documents.document(f"{service}.openapi.json")["paths"].items():
            for method, operation in item.items():
                names = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "header"}
                if method == "get" or "Idempotency-Key" in names:
                    continue
                refusing.append(path)
                at = re.sub(r"\{\w+\}", str(uuid4()), path)
                reply = await client.request(method, at, json={}, headers=with_key())
                if reply.status_code != 403:
                    refused(reply, 422, "idempotency_key_not_honoured", "Idempotency-Key")
    assert ("/api/orders/{order_id}" in refusing) == (service == "orders")
    assert ("/api/sync/order" in refusing) == (service == "sync")


def test_every_route_that_adds_honours_a_key() -> None:
    paths = documents.document("orders.openapi.json")["paths"]
    honouring = {
        path
        for path, item in paths.items()
        for one in item.get("post", {}).get("parameters", ())
        if one["name"] == "Idempotency-Key"
    }
    adding = {resource.path for resource in RESOURCES}
    adding |= {"/api/orders", "/api/users", "/api/api-keys", "/api/orders/{order_id}/payments"}
    adding |= {"/api/inventory/{inventory_item_id}/moves", "/api/customers/{customer_id}/loyalty"}
    assert adding <= honouring


async def test_user_that_is_added_again_with_its_key_exists_once(restaurant: RestaurantRig) -> None:
    email, key = f"kim-{uuid4().hex[:8]}@shop.example", with_key()
    body = {"email": email, "password": "a long passphrase", "role": "staff", "name": "Kim"}
    async with restaurant.client(Role.ADMIN) as admin:

        async def send(**fields: Any) -> httpx.Response:
            return await admin.post("/api/users", json={**body, **fields}, headers=key)

        replies = await asyncio.gather(*(send() for _ in range(4)))
        ids = {made(reply)["id"] for reply in replies}
        assert len(ids) == 1
        assert sum("idempotency-replayed" in reply.headers for reply in replies) == 3
        others = ({"password": "another passphrase"}, {"role": "admin"}, {"email": f"x-{email}"})
        for change in (None, {"name": "Kim L.", "password": "a new passphrase"}, "deleted"):
            path = f"/api/users/{ids.copy().pop()}"
            if change:
                expect(await (admin.delete(path) if change == "deleted" else admin.put(path, json=change)))
            assert made(await send())["id"] in ids
            for other in others:
                refused(await send(**other), 422, "idempotency_key_reused", "Idempotency-Key")


async def test_api_key_that_is_made_again_with_its_key_exists_once_and_is_shown_again(
    system: System, restaurant: RestaurantRig
) -> None:
    body, key = {"name": f"Till {uuid4()}", "scopes": ["menu:read"]}, with_key()
    async with restaurant.client(Role.ADMIN) as admin:

        async def send(headers: dict[str, str] = key, **fields: Any) -> httpx.Response:
            return await admin.post("/api/api-keys", json={**body, **fields}, headers=headers)

        replies = await asyncio.gather(*(send() for _ in range(4)))
        shown = {(made(reply)["id"], made(reply)["key"]) for reply in replies}
        assert len(shown) == 1
        assert sum("idempotency-replayed" in reply.headers for reply in replies) == 3
        [(id_, text)] = shown
        async with http_client(base_url=system.urls["orders"], headers={"Authorization": f"Bearer {text}"}) as till:
            expect(await till.get("/api/menu"))
        for change in ("made", "revoked"):
            if change == "revoked":
                expect(await admin.delete(f"/api/api-keys/{id_}"))
            assert (made(await send())["id"], made(await send())["key"]) == (id_, text)
            for other in ({"name": "Till"}, {"scopes": ["menu:read", "orders:write"]}):
                refused(await send(**other), 422, "idempotency_key_reused", "Idempotency-Key")
        another = made(await send(with_key()))
        assert another["id"] != id_ and another["key"] != text
        keys = expect(await admin.get("/api/api-keys", params={"limit": 200}))
        assert sum(one["name"] == body["name"] for one in keys) == 2
        # Another restaurant's admin with the same key and body gets a key of its own.
    stranger = await register_restaurant(system)
    async with stranger.client(Role.ADMIN) as admin:
        assert made(await send())["key"] != text


async def test_answer_504_repeated_with_its_key_counts_once_on_every_route(
    restaurant: RestaurantRig, system: System
) -> None:
    """The broker does not answer and the journal is full, so the instance says 504. The change appears later: the
    broker gets the message when the link flows again, and the claim is finished."""
    doubtful = {"publish_timeout_seconds": 0.5, "journal_max_bytes": 1}
    async with (
        link_to(system.rabbitmq_url) as link,
        system.another_orders("doubtful", rabbitmq_url=link.url, **doubtful) as url,
        system.client(token=restaurant.token) as admin,
    ):

        async def connected() -> bool:
            return bool((await asyncio.to_thread(system.health, "doubtful"))["broker"])

        for route in ROUTES:
            path, key = await target(restaurant, route), with_key()

            async def send(path: str = f"{path}/{route.name}", route: Additive = route, key: Any = key) -> Any:
                return await admin.post(f"{url}{path}", json=route.body, headers=key)

            async def sync_state(path: str = path) -> str:
                return str(expect(await admin.get(path))["sync"]["state"])

            await eventually(connected, what="an instance with its broker")
            link.freeze()
            refused(await send(), 504, "outcome_unknown")
            await link.restore()
            await eventually(send, what=f"a repeat on {route.name}", until=lambda reply: reply.is_success)
            assert await total(admin, route, path) == added(route, 1)
            await eventually(sync_state, what="the change in PostgreSQL", until=lambda state: state == "synced")
            assert await total(admin, route, path) == added(route, 1)
