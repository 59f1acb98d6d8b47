"""The orders API over HTTP, on a running system."""

import asyncio
import re
import time
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest

from services.orders.entity_changes import MAX_RETRIES
from shared.mirror import keys
from shared.mirror.mirror import Mirror
from shared.security.tokens import Identity, Role, Tokens
from tests.rigs.builders import RESTAURANT
from tests.rigs.http_client import http_client
from tests.rigs.system import System, eventually


async def place(client: httpx.AsyncClient, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    reply = await client.post("/api/orders", json=body, headers=headers)
    assert reply.status_code == 201, reply.text
    data: dict[str, Any] = reply.json()["data"]
    return data


async def test_order_goes_from_the_request_to_postgres(system: System) -> None:
    async with system.client() as client:
        placed = await place(client, system.order_body(customer_name="Ada", table_id=system.demo["table_ids"][0]))
        assert placed["version"] == 1
        assert placed["status"] == "pending"
        assert placed["sync"]["state"] == "pending"
        assert placed["durability"] == "broker"
        assert placed["visible"] is True
        assert "request_hash" not in placed
        reply = await client.get(f"/api/orders/{placed['id']}")
        assert reply.headers["etag"] == '"1"'
        assert reply.headers["x-served-by"] == "mirror"
        assert reply.json()["data"]["customer_name"] == "Ada"

        async def sync_state() -> str:
            return str((await client.get(f"/api/orders/{placed['id']}")).json()["data"]["sync"]["state"])

        await eventually(sync_state, what="the state `synced`", until=lambda state: state == "synced")
    async with system.database() as connection:
        row = await connection.fetchrow("select version, total, status from orders where id = $1", placed["id"])
        items = await connection.fetch("select name, quantity from order_items where order_id = $1", placed["id"])
    assert row is not None
    assert dict(row) == {"version": 1, "total": placed["total"], "status": "pending"}
    assert [tuple(item) for item in items] == [(placed["items"][0]["name"], 2)]


async def test_server_computes_the_price(system: System) -> None:
    async with system.client() as client:
        placed = await place(client, system.order_body(tip_amount=100, discount_amount=40, deposit_used=10))
    price = placed["items"][0]["unit_price"]
    subtotal = price * 2
    tax = (subtotal * 500 + 5000) // 10000
    assert (placed["subtotal"], placed["tax_amount"]) == (subtotal, tax)
    assert placed["total"] == subtotal + tax + 100 - 40 - 10


async def test_repeat_with_the_same_key_returns_the_same_order(system: System) -> None:
    key = str(uuid4())
    async with system.client() as client:
        first, *others = await asyncio.gather(
            *(client.post("/api/orders", json=system.order_body(), headers={"Idempotency-Key": key}) for _ in range(8))
        )
        replies = [first, *others]
        assert {reply.status_code for reply in replies} == {201}
        assert len({reply.json()["data"]["id"] for reply in replies}) == 1
        assert sum("idempotency-replayed" in reply.headers for reply in replies) == 7
        other = await client.post(
            "/api/orders", json=system.order_body(notes="another"), headers={"Idempotency-Key": key}
        )
    assert other.status_code == 422
    assert other.json()["error"]["details"]["field"] == "Idempotency-Key"


async def test_only_one_of_two_concurrent_updates_of_a_version_succeeds(system: System) -> None:
    async with system.client() as client:
        placed = await place(client, system.order_body())
        replies = await asyncio.gather(
            *(
                client.put(f"/api/orders/{placed['id']}", json={"notes": f"n{i}"}, headers={"If-Match": '"1"'})
                for i in range(2)
            )
        )
        assert sorted(reply.status_code for reply in replies) == [200, 409]
        winner = next(reply for reply in replies if reply.status_code == 200).json()["data"]
        now = (await client.get(f"/api/orders/{placed['id']}")).json()["data"]
    assert (now["version"], now["notes"]) == (2, winner["notes"])


async def claims_lost(client: httpx.AsyncClient) -> float:
    (line,) = re.findall(r"^ticketrail_claims_lost_total (.+)$", (await client.get("/metrics")).text, re.MULTILINE)
    return float(line)


async def test_lost_claim_of_an_update_without_a_version_is_retried(system: System) -> None:
    refused = 0
    async with system.client() as client:
        url = f"/api/orders/{(await place(client, system.order_body()))['id']}"
        lost_before = await claims_lost(client)

        async def change(tip: int) -> int:
            """Returns the new version. The service retries a few times within a tenth of a second; if the winner takes
            longer, the service refuses and the caller retries."""

            async def send() -> httpx.Response:
                nonlocal refused
                reply = await client.put(url, json={"tip_amount": tip})
                refused += reply.status_code == 409
                return reply

            reply = await eventually(send, what="the change", until=lambda reply: reply.status_code != 409)
            assert reply.status_code == 200, reply.text
            return int(reply.json()["data"]["version"])

        versions = await asyncio.gather(*(change(tip) for tip in range(3)))
        lost = await claims_lost(client) - lost_before
    assert sorted(versions) == [2, 3, 4]
    assert lost >= (MAX_RETRIES + 1) * refused, "the service refused the request before its last retry"


async def test_status_only_goes_forward(system: System) -> None:
    async with system.client() as client:
        placed = await place(client, system.order_body())
        url = f"/api/orders/{placed['id']}"
        refused = await client.put(url, json={"status": "ready"})
        assert refused.status_code == 409
        assert refused.json()["error"]["details"]["allowed"] == ["received", "cancelled"]
        for status in ("received", "preparing"):
            assert (await client.put(url, json={"status": status})).json()["data"]["status"] == status
        items = await client.put(url, json=system.order_body())
        assert items.json()["error"]["code"] == "items_are_fixed"
        for status in ("ready", "completed"):
            assert (await client.put(url, json={"status": status})).status_code == 200
        assert (await client.delete(url)).status_code == 409
        assert (await client.put(url, json={"status": "cancelled"})).status_code == 409


async def test_changed_items_are_priced_again_before_the_kitchen_starts(system: System) -> None:
    async with system.client() as client:
        placed = await place(client, system.order_body())
        items = [{"menu_item_id": system.dish(1), "quantity": 3}]
        changed = (await client.put(f"/api/orders/{placed['id']}", json={"items": items})).json()["data"]
    assert changed["subtotal"] == changed["items"][0]["unit_price"] * 3 != placed["subtotal"]
    assert changed["order_number"] == placed["order_number"]


async def test_deleted_order_is_hidden_until_it_is_restored(system: System) -> None:
    async with system.client() as client:
        placed = await place(client, system.order_body())
        url = f"/api/orders/{placed['id']}"
        await client.put(url, json={"status": "received"})
        assert (await client.delete(url)).status_code == 200
        assert (await client.get(url)).json()["error"]["code"] == "order_deleted"
        assert placed["id"] not in [one["id"] for one in (await client.get("/api/orders?limit=200")).json()["data"]]
        assert (await client.put(url, json={"notes": "x"})).status_code == 404
        restored = (await client.post(f"{url}/restore")).json()["data"]
        assert (restored["status"], restored["deleted_at"], restored["version"]) == ("received", None, 4)
        assert (await client.post(f"{url}/restore")).status_code == 409


async def test_list_pages_newest_first_without_gap_or_repetition(system: System) -> None:
    table = str(uuid4())
    async with system.client() as client:
        placed = [(await place(client, system.order_body(table_id=table)))["id"] for _ in range(7)]
        found: list[str] = []
        cursor = None
        while True:
            query = {"table_id": table, "limit": "3", **({"cursor": cursor} if cursor else {})}
            page = (await client.get("/api/orders", params=query)).json()
            found += [one["id"] for one in page["data"]]
            cursor = page["pagination"]["next_cursor"]
            if cursor is None:
                break
    assert found == placed[::-1]


async def test_list_contains_every_accepted_order_at_once(system: System) -> None:
    table = str(uuid4())
    async with system.client() as client:
        for count in range(1, 15):
            placed = await place(client, system.order_body(table_id=table))
            await client.put(f"/api/orders/{placed['id']}", json={"status": "received"})
            page = (await client.get("/api/orders", params={"table_id": table, "status": "received"})).json()
            assert len(page["data"]) == count
            assert page["data"][0]["id"] == placed["id"]


async def test_order_numbers_are_given_once(system: System) -> None:
    async with system.client() as client:
        orders = await asyncio.gather(*(place(client, system.order_body()) for _ in range(40)))
    numbers = [one["order_number"] for one in orders]
    assert len(set(numbers)) == 40
    assert all(len(number) == 4 and number.isdecimal() for number in numbers)


BAD_BODIES: list[tuple[dict[str, Any] | str, str]] = [
    ({"items": []}, "items"),
    ({"colour": "red"}, "colour"),
    ({"items": [{"quantity": 1}]}, "items[0].menu_item_id"),
    ({"items": [{"menu_item_id": "7", "quantity": 1}]}, "items[0].menu_item_id"),
    ({"items": [{"menu_item_id": "$dish", "quantity": 0}]}, "items[0].quantity"),
    ({"items": [{"menu_item_id": "$dish", "quantity": "2"}]}, "items[0].quantity"),
    ({"items": [{"menu_item_id": "$dish", "quantity": 1, "price": 1}]}, "items[0].price"),
    ({"items": [{"menu_item_id": "$dish", "quantity": 1}] * 1001}, "items"),
    ({"items": [{"menu_item_id": RESTAURANT, "quantity": 1}]}, "items[0].menu_item_id"),
    ({"tip_amount": -1}, "tip_amount"),
    ({"tip_amount": 1.5}, "tip_amount"),
    ({"tip_amount": 10**30}, "tip_amount"),
    ({"discount_amount": 10**9}, "discount_amount"),
    ({"customer_name": "a\0b"}, "customer_name"),
    ({"customer_name": 7}, "customer_name"),
    ({"notes": "x" * 2001}, "notes"),
    ('{"items": [{"menu_item_id": "$dish", "quantity": 1}], "customer_name": "\\ud800"}', "customer_name"),
    ('{"items": [{"menu_item_id": "$dish", "quantity": 1}], "notes": "\udcff"}', "notes"),
    ("[]", "body"),
    ("{", "body"),
    ("", "body"),
    ("null", "body"),
]


@pytest.mark.parametrize(("body", "field"), BAD_BODIES, ids=lambda value: str(value)[:40])
async def test_bad_input_is_refused_with_the_name_of_the_field(
    system: System, body: dict[str, Any] | str, field: str
) -> None:
    import json

    if isinstance(body, dict):
        body = json.dumps({**system.order_body(), **body})
    content = body.replace("$dish", system.dish()).encode(errors="surrogateescape")
    async with system.client() as client:
        reply = await client.post("/api/orders", content=content)
    assert 400 <= reply.status_code < 500
    error = reply.json()["error"]
    assert error["details"]["field"] == field
    assert error["trace_id"]


async def test_body_of_two_megabytes_is_refused(system: System) -> None:
    async with system.client() as client:
        reply = await client.post("/api/orders", content=b"x" * 2_000_000)
    assert reply.status_code == 413
    assert reply.json()["error"]["details"]["field"] == "body"


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/orders?cursor=%00garbage", "cursor"),
        ("/api/orders?limit=-1", "limit"),
        ("/api/orders?status=%ff", "status"),
        ("/api/orders?nonsense=1", "nonsense"),
        ("/api/orders/not-a-uuid", "order_id"),
    ],
)
async def test_garbage_parameter_is_named(system: System, path: str, field: str) -> None:
    async with system.client() as client:
        reply = await client.get(path)
    assert 400 <= reply.status_code < 500
    assert reply.json()["error"]["details"]["field"] == field


async def test_garbage_version_is_named(system: System) -> None:
    async with system.client() as client:
        placed = await place(client, system.order_body())
        reply = await client.put(f"/api/orders/{placed['id']}", json={"notes": "x"}, headers={"If-Match": "new"})
    assert reply.status_code == 422
    assert reply.json()["error"]["details"]["field"] == "If-Match"


async def test_every_route_answers_401_without_a_valid_token(system: System) -> None:
    claims = {"userId": "u", "restaurantId": system.restaurant_id, "role": "admin", "exp": int(time.time()) + 60}
    tokens = [None, "x", jwt.encode(claims, "", algorithm="none"), jwt.encode(claims, "k" * 40, algorithm="HS256")]
    routes = [
        ("POST", "/api/orders"),
        ("GET", "/api/orders"),
        ("GET", f"/api/orders/{uuid4()}"),
        ("PUT", f"/api/orders/{uuid4()}"),
        ("DELETE", f"/api/orders/{uuid4()}"),
        ("POST", f"/api/orders/{uuid4()}/restore"),
    ]
    async with http_client(base_url=system.urls["orders"]) as client:
        for method, path in routes:
            for token in tokens:
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                reply = await client.request(method, path, headers=headers)
                assert reply.status_code == 401, (method, path, token, reply.text)
                assert reply.json()["success"] is False


def token_for(system: System, role: Role, *, restaurant: str | None = None, session: str | None = None) -> str:
    tokens = Tokens(system.env["TICKETRAIL_JWT_SECRET"], ttl_seconds=60)
    return tokens.issue(Identity(str(uuid4()), role, restaurant or system.restaurant_id, "", session))


async def test_customer_creates_and_sees_only_orders_of_its_own_session(system: System) -> None:
    mine, other = (token_for(system, Role.CUSTOMER, session=name) for name in (f"s{uuid4()}", f"s{uuid4()}"))
    async with system.client(token=mine) as client, system.client(token=other) as stranger:
        placed = await place(client, system.order_body())
        assert [one["id"] for one in (await client.get("/api/orders")).json()["data"]] == [placed["id"]]
        assert (await client.get(f"/api/orders/{placed['id']}")).status_code == 200
        assert (await stranger.get(f"/api/orders/{placed['id']}")).status_code == 404
        assert (await stranger.get("/api/orders")).json()["data"] == []
        for body in ({"customer_session_id": "another"}, {"discount_amount": 1}):
            assert (await client.post("/api/orders", json=system.order_body(**body))).status_code == 403
        assert (await client.delete(f"/api/orders/{placed['id']}")).status_code == 403
        assert (await client.put(f"/api/orders/{placed['id']}", json={"notes": "x"})).status_code == 403


async def test_other_restaurants_see_nothing(system: System) -> None:
    other = str(uuid4())
    async with system.database("ticketrail_owner") as connection:
        await connection.execute(
            "insert into restaurants (id, slug, name) values ($1::uuid, $2, 'Other')", other, f"other-{other}"
        )
    async with system.client() as client, system.client(token=token_for(system, Role.ADMIN, restaurant=other)) as them:
        placed = await place(client, system.order_body())
        url = f"/api/orders/{placed['id']}"
        for reply in (
            await them.get(url),
            await them.put(url, json={"notes": "x"}),
            await them.delete(url),
            await them.post(f"{url}/restore"),
        ):
            assert reply.status_code == 404
        assert (await them.get("/api/orders")).json()["data"] == []
        foreign = await them.post("/api/orders", json=system.order_body())
        assert foreign.json()["error"]["code"] == "unknown_menu_item"


async def test_changed_price_counts_without_a_restart(system: System) -> None:
    dish = system.dish(5)
    body = {"items": [{"menu_item_id": dish, "quantity": 1}]}
    async with system.client() as client:
        before = (await place(client, body))["items"][0]["unit_price"]
        await system.cli("dish", system.restaurant_id, dish, "--price", str(before + 7), "--available")

        async def price() -> int:
            return int((await place(client, body))["items"][0]["unit_price"])

        await eventually(price, what="the new price", until=lambda seen: seen == before + 7)
        await system.cli("dish", system.restaurant_id, dish, "--unavailable")

        async def code() -> str:
            return str((await client.post("/api/orders", json=body)).json().get("error", {}).get("code"))

        await eventually(code, what="a dish that cannot be ordered", until=lambda seen: seen == "menu_item_unavailable")
        await system.cli("dish", system.restaurant_id, dish, "--available", "--price", str(before))


async def test_order_that_left_the_mirror_is_read_from_postgres_and_repaired(system: System) -> None:
    import redis.asyncio

    async with system.client() as client:
        placed = await place(client, system.order_body())
        url = f"/api/orders/{placed['id']}"

        async def synced() -> bool:
            return bool((await client.get(url)).json()["data"]["sync"]["state"] == "synced")

        await eventually(synced, what="the state `synced`")
        # The worker is frozen, because it may not have read the order yet and would write it to the mirror again.
        async with system.frozen("worker"), redis.asyncio.from_url(system.redis.url) as mirror:
            await mirror.delete(f"{{{system.restaurant_id}}}:order:{placed['id']}")
            reply = await client.get(url)
            assert reply.headers["x-served-by"] == "postgres"
            assert reply.json()["data"] | {"sync": 0} == {
                name: value for name, value in placed.items() if name not in ("visible", "durability")
            } | {"sync": 0}

            async def served_by() -> str:
                return (await client.get(url)).headers["x-served-by"]

            await eventually(served_by, what="the order from the mirror again", until=lambda by: by == "mirror")


async def test_sync_status_counts_pending_changes(system: System) -> None:
    async with system.client() as client, system.client(service="sync") as sync:
        await place(client, system.order_body())

        async def status() -> dict[str, Any]:
            found: dict[str, Any] = (await sync.get("/api/ops/sync")).json()["data"]
            return found

        found = await eventually(status, until=lambda seen: seen["totals"]["pending"] == 0, what="no pending change")
        assert found["tables"]["order"]["synced"] >= 1
        assert found["totals"]["conflict"] == 0


async def test_repeat_finds_its_order_after_the_order_left_the_mirror(system: System) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    async with system.client() as client:
        placed = await place(client, system.order_body(), **key)
        url = f"/api/orders/{placed['id']}"

        async def synced() -> bool:
            return bool((await client.get(url)).json()["data"]["sync"]["state"] == "synced")

        await eventually(synced, what="the state `synced`")
        mirror = Mirror(system.redis.url, timeout=2.0, stale_seconds=2.0)
        _, (document,) = await mirror.read(system.restaurant_id, "order", [placed["id"]])
        assert document is not None
        assert await mirror.trim(system.restaurant_id, "order", {placed["id"]: document.head.change_id}) == 1
        await mirror.close()
        again = await client.post("/api/orders", json=system.order_body(), headers=key)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["data"]["order_number"] == placed["order_number"]
    assert again.json()["data"]["version"] == 1


async def test_list_on_a_cold_mirror_is_not_older_than_postgres(system: System) -> None:
    """A mirror that was restored from a dump shows an old state as pending although PostgreSQL has a newer one."""
    import redis.asyncio

    async with system.client() as client, redis.asyncio.from_url(system.redis.url) as raw:
        table = str(uuid4())
        placed = await place(client, system.order_body(table_id=table))
        name = f"{{{system.restaurant_id}}}:order:{placed['id']}"
        old: Any = await raw.hgetall(name)
        await client.put(f"/api/orders/{placed['id']}", json={"notes": "new"})

        async def stored() -> int:
            return (await system.stored_orders()).get(placed["id"], 0)

        await eventually(stored, what="version 2", until=lambda version: version == 2)
        # The worker is frozen, because it would notice the missing stamp and make the mirror warm again.
        async with system.frozen("worker"):
            await raw.rename(keys.WARM, "aside")
            try:
                await raw.hset(name, mapping=old)
                await raw.zadd(f"{{{system.restaurant_id}}}:pending:order", {placed["id"]: 1.0})
                page = (await client.get("/api/orders", params={"table_id": table})).json()["data"]
            finally:
                await raw.rename("aside", keys.WARM)
                await raw.zrem(f"{{{system.restaurant_id}}}:pending:order", placed["id"])
                await raw.delete(name)
    assert [(one["version"], one["notes"]) for one in page] == [(2, "new")]
