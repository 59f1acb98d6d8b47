"""API keys of restaurants over HTTP: made, used, rotated, throttled and revoked."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest

from shared.entities.contract import now
from shared.security.tokens import Role
from tests.rigs.http_client import http_client
from tests.rigs.limited_orders import addresses
from tests.rigs.link import Link, link_to
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually

FAILURES_PER_PREFIX, FAILURES_PER_ADDRESS = 10, 60  # the defaults
LIMITS: dict[str, Any] = {
    "failure_window_seconds": 86_400,
    "api_key_failures_per_prefix_and_address": FAILURES_PER_PREFIX,
    "api_key_failures_per_address": FAILURES_PER_ADDRESS,
}


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


@pytest.fixture(scope="module")
async def throttled(system: System) -> AsyncIterator[str]:
    """An orders instance with the limits of production, whose tries do not come back during a test."""
    async with system.another_orders("throttled", **LIMITS) as url:
        yield url


def with_key(url: str, key: str, *, address: str | None = None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": address or next(addresses)}
    return http_client(base_url=url, headers=headers, timeout=10.0)


async def make(restaurant: RestaurantRig, *scopes: str, **fields: Any) -> dict[str, Any]:
    async with restaurant.client(Role.ADMIN) as admin:
        body = {"name": "Test", "scopes": list(scopes), **fields}
        found: dict[str, Any] = made(await admin.post("/api/api-keys", json=body))
    return found


async def test_web_shop_reads_the_menu_and_places_orders_with_a_key_that_can_do_nothing_else(
    restaurant: RestaurantRig, system: System
) -> None:
    dish = await restaurant.dish()
    key = await make(restaurant, "menu:read", "orders:write", name="Web shop")
    async with with_key(system.urls["orders"], key["key"]) as shop:
        menu = expect(await shop.get("/api/menu"))
        assert [(one["id"], "consumes" in one) for one in menu] == [(dish["id"], False)]
        body = {"items": [{"menu_item_id": dish["id"], "quantity": 1}], "customer_name": "Ada"}
        order = made(await shop.post("/api/orders", json=body))
        assert (order["placed_by"], order["table_id"], "holds" in order) == (key["id"], None, False)
        for method, path, sent in (
            ("GET", "/api/orders", None),
            ("GET", f"/api/orders/{order['id']}", None),
            ("PUT", f"/api/orders/{order['id']}", {"status": "received"}),
            ("POST", f"/api/orders/{order['id']}/payments", {"amount": 100, "method": "card"}),
            ("GET", "/api/auth/me", None),
            ("GET", "/api/users", None),
            ("POST", "/api/api-keys", {"name": "More", "scopes": ["orders:read"]}),
        ):
            refused(await shop.request(method, path, json=sent), 403, "forbidden")
        for field, value in (
            ("discount_amount", 100),
            ("deposit_used", 100),
            ("customer_id", dish["id"]),
            ("table_id", dish["id"]),
        ):
            details = refused(await shop.post("/api/orders", json={**body, field: value}), 403, "forbidden")
            assert details["field"] == field


async def test_key_is_shown_once_and_stored_as_a_hash(restaurant: RestaurantRig, system: System) -> None:
    key = await make(restaurant, "menu:read", "menu:read", name="Menu board")
    assert key["key"].startswith(f"trk_{key['prefix']}_")
    async with restaurant.client(Role.ADMIN) as admin:
        for reply in (await admin.get("/api/api-keys"), await admin.get(f"/api/api-keys/{key['id']}")):
            assert reply.status_code == 200
            assert key["key"][-43:] not in reply.text
        shown = expect(await admin.get(f"/api/api-keys/{key['id']}"))
    assert (shown["name"], shown["scopes"], shown["last_used_at"]) == ("Menu board", ["menu:read"], None)
    async with system.database() as connection:
        row = await connection.fetchval("select k::text from api_keys k where id = $1", key["id"])
    assert key["prefix"] in row
    assert key["key"][-43:] not in row


async def test_two_keys_are_valid_at_once_and_a_revoked_one_is_refused_by_every_service(
    restaurant: RestaurantRig, system: System
) -> None:
    old, new = [await make(restaurant, "terminal", name="Till 1") for _ in range(2)]
    paths = {"orders": "/api/menu", "sync": "/api/sync/status"}

    async def statuses(key: dict[str, Any]) -> set[int]:
        found = set()
        for service, path in paths.items():
            async with with_key(system.urls[service], key["key"]) as till:
                found.add((await till.get(path)).status_code)
        async with (
            with_key(system.urls["notifier"], key["key"]) as till,
            till.stream("GET", "/api/v1/sync/events") as stream,
        ):
            found.add(stream.status_code)
        return found

    assert await statuses(old) == await statuses(new) == {200}
    async with restaurant.client(Role.ADMIN) as admin:
        first = expect(await admin.delete(f"/api/api-keys/{old['id']}"))
        assert first["revoked_at"]
        assert expect(await admin.delete(f"/api/api-keys/{old['id']}")) == first
    await eventually(lambda: statuses(old), what="a key that is refused", until=lambda found: found == {401})
    assert await statuses(new) == {200}


async def test_a_revoked_key_is_refused_also_after_the_cleanup_removed_its_revocation(
    restaurant: RestaurantRig, system: System
) -> None:
    key = await make(restaurant, "menu:read")
    async with restaurant.client(Role.ADMIN) as admin:
        expect(await admin.delete(f"/api/api-keys/{key['id']}"))
    async with system.database() as connection:
        await connection.execute("delete from revocations where subject = $1", f"user:{key['id']}")
    async with system.another_orders("after-cleanup") as url, with_key(url, key["key"]) as client:
        refused(await client.get("/api/menu"), 401, "unauthenticated")


async def test_key_expires(restaurant: RestaurantRig, system: System) -> None:
    key = await make(restaurant, "menu:read", expires_at=(now() + timedelta(hours=1)).isoformat())
    async with with_key(system.urls["orders"], key["key"]) as client:
        expect(await client.get("/api/menu"))
        async with system.database() as connection:
            await connection.execute("update api_keys set expires_at = now() where id = $1", key["id"])

        async def status() -> int:
            return (await client.get("/api/menu")).status_code

        await eventually(status, what="an expired key", until=lambda found: found == 401)


async def test_use_of_a_key_is_noted(restaurant: RestaurantRig, system: System) -> None:
    key = await make(restaurant, "menu:read")
    async with with_key(system.urls["orders"], key["key"]) as client, restaurant.client(Role.ADMIN) as admin:
        expect(await client.get("/api/menu"))
        shown = expect(await admin.get(f"/api/api-keys/{key['id']}"))
    assert shown["first_used_at"] == shown["last_used_at"] is not None


async def test_wrong_keys_get_one_answer_and_are_throttled_by_prefix_and_address(
    restaurant: RestaurantRig, throttled: str
) -> None:
    key = await make(restaurant, "menu:read")
    attacker = next(addresses)
    wrong = key["key"][:-43] + "A" * 43
    errors = []
    for text in (wrong, f"trk_{'0' * 12}_{'A' * 43}", "trk_garbage"):
        async with with_key(throttled, text) as client:
            errors.append(refused(await client.get("/api/menu"), 401, "unauthenticated"))
    assert errors[0] == errors[1] == errors[2]
    async with with_key(throttled, wrong, address=attacker) as client:
        statuses = [(await client.get("/api/menu")).status_code for _ in range(FAILURES_PER_PREFIX + 2)]
    assert statuses == [401] * FAILURES_PER_PREFIX + [429] * 2
    # The owner of the key is not stopped, and somebody at the attacker's address with another key is not either.
    async with with_key(throttled, key["key"]) as client:
        expect(await client.get("/api/menu"))
    async with with_key(throttled, (await make(restaurant, "menu:read"))["key"], address=attacker) as client:
        expect(await client.get("/api/menu"))


async def test_keys_with_invented_prefixes_are_throttled_by_address(
    system: System, restaurant: RestaurantRig, throttled: str
) -> None:
    attacker, statuses = next(addresses), []
    known = await make(restaurant, "menu:read")
    async with with_key(throttled, known["key"], address=attacker) as client:
        expect(await client.get("/api/menu"))
    for number in range(FAILURES_PER_ADDRESS + 2):
        async with with_key(throttled, f"trk_{number:012x}_{'A' * 43}", address=attacker) as client:
            statuses.append((await client.get("/api/menu")).status_code)
    assert statuses == [401] * FAILURES_PER_ADDRESS + [429] * 2
    # A key that was used at this address is not refused for the failures of others there, also by an instance that has
    # just started. Another one is.
    async with system.another_orders("throttled-too", **LIMITS) as restarted:
        for url in (throttled, restarted):
            async with with_key(url, known["key"], address=attacker) as client:
                expect(await client.get("/api/menu"))
        async with with_key(restarted, (await make(restaurant, "menu:read"))["key"], address=attacker) as client:
            refused(await client.get("/api/menu"), 429, "rate_limited")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["users:manage"]}, "scopes[0]"),
        ({"name": ""}, "name"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"id": "3c098bcc-6892-4a83-aae2-8e86ffee663b"}, "id"),
    ],
    ids=str,
)
async def test_invalid_key_is_refused_with_the_name_of_the_field(
    restaurant: RestaurantRig, fields: dict[str, Any], field: str
) -> None:
    async with restaurant.client(Role.ADMIN) as admin:
        body = {"name": "Test", "scopes": ["menu:read"], **fields}
        refused(await admin.post("/api/api-keys", json=body), 422, "invalid_input", field)


async def test_keys_of_another_restaurant_are_unknown(restaurant: RestaurantRig, system: System) -> None:
    theirs = await register_restaurant(system)
    key = await make(theirs, "menu:read")
    async with restaurant.client(Role.ADMIN) as admin:
        for method in ("GET", "DELETE"):
            refused(await admin.request(method, f"/api/api-keys/{key['id']}"), 404, "not_found")
        assert key["id"] not in (await admin.get("/api/api-keys")).text
    async with with_key(system.urls["orders"], key["key"]) as client:
        expect(await client.get("/api/menu"))


@pytest.fixture
async def database(system: System) -> AsyncIterator[Link]:
    async with link_to(system.database_url("ticketrail_api")) as link:
        yield link


async def test_known_key_places_orders_while_the_database_is_unavailable(
    restaurant: RestaurantRig, system: System, database: Link
) -> None:
    known, unknown = [await make(restaurant, "menu:read", "orders:write") for _ in range(2)]
    body = {"items": [{"menu_item_id": (await restaurant.dish())["id"], "quantity": 1}]}
    async with (
        system.another_orders("cut-off", database_api_url=database.url) as url,
        with_key(url, known["key"]) as shop,
        with_key(url, unknown["key"]) as other,
    ):
        expect(await shop.get("/api/menu"))
        await database.cut()
        for _ in range(3):
            made(await shop.post("/api/orders", json=body))
        reply = await other.post("/api/orders", json=body)
        refused(reply, 503, "unavailable")
        assert reply.headers["retry-after"]
