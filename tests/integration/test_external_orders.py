"""POST /api/sync/order on a running system: orders of another system that arrive repeatedly and in any order."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from deploy.local.port_check import find_free
from services.sync.command_session import CommandSession
from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.external_orders import ExternalOrder, order_id
from shared.entities.contract import now
from shared.errors import OutcomeUnknown, Unavailable
from shared.http.bodies import read_body
from shared.mirror import keys
from shared.security.tokens import Role
from tests.rigs.http_client import http_client
from tests.rigs.link import Link, link_to
from tests.rigs.restaurant import RestaurantRig, expect, refused, register_restaurant
from tests.rigs.system import System, eventually, settings_of

NAMES = ["Margherita", "House red"]


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system, tax_basis_points=700)


@pytest.fixture(scope="module")
async def key(restaurant: RestaurantRig) -> str:
    """The API key of the other system."""
    return await restaurant.api_key("sync:write")


@pytest.fixture
async def other(system: System, key: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the sync API with the API key of the other system."""
    async with http_client(base_url=system.urls["sync"], headers={"x-sync-token": key}, timeout=10.0) as client:
        yield client


def body(restaurant: RestaurantRig, **fields: Any) -> dict[str, Any]:
    found = {
        "restaurant_id": restaurant.id,
        "external_id": f"pos-{uuid4().hex}",
        "items": [{"name": name, "quantity": 2, "unit_price": 980} for name in NAMES],
        **fields,
    }
    return json.loads(json.dumps(found, default=lambda at: at.isoformat()))


async def send(client: httpx.AsyncClient, sent: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = expect(await client.post("/api/sync/order", json=sent))
    return found


async def send_until_taken(client: httpx.AsyncClient, sent: dict[str, Any]) -> dict[str, Any]:
    """Repeats the request until the reply is no version conflict, as another system does.

    On a slow machine, some of many concurrent changes of one order are refused with a version conflict.
    """

    async def taken() -> httpx.Response:
        return await client.post("/api/sync/order", json=sent)

    def is_taken(reply: httpx.Response) -> bool:
        return reply.status_code != 409 or reply.json()["error"]["code"] != "version_conflict"

    found: dict[str, Any] = expect(await eventually(taken, what="an accepted request", until=is_taken))
    return found


async def read(restaurant: RestaurantRig, id_: str) -> dict[str, Any]:
    async with restaurant.client() as staff:
        found: dict[str, Any] = expect(await staff.get(f"/api/orders/{id_}"))
        return found


async def stored(restaurant: RestaurantRig, id_: str, version: int) -> list[tuple[str, str, str]]:
    """Waits until PostgreSQL has the order at this version; returns (type, lane, source) of each change."""

    async def look() -> int | None:
        return (await restaurant.system.stored_orders()).get(id_)

    await eventually(look, what=f"version {version} in PostgreSQL", until=lambda found: found == version)
    async with restaurant.system.database() as connection:
        rows = await connection.fetch(
            "select type, lane, source from changes where entity_id = $1 order by version", id_
        )
        assert await connection.fetchval("select count(*) from conflicts where entity_id = $1", id_) == 0
    return [(row["type"].split(".")[2], row["lane"], row["source"]) for row in rows]


async def test_order_is_created_then_updated_then_left_unchanged(
    restaurant: RestaurantRig, other: httpx.AsyncClient
) -> None:
    sent = body(restaurant, status="received", table_id=str(uuid4()))
    first = await send(other, sent)
    assert (first["outcome"], first["version"]) == ("created", 1)
    assert first["id"] == order_id(restaurant.id, sent["external_id"])
    again = await send(other, sent)
    assert again == {**first, "outcome": "unchanged"}
    paid = {"id": "card-1", "amount": 4194, "method": "card"}
    assert await send(other, {**sent, "status": "ready", "payments": [paid]}) == {
        **first,
        "outcome": "updated",
        "version": 2,
    }
    seen = await read(restaurant, first["id"])
    assert (seen["status"], seen["payment_status"], seen["order_number"]) == ("ready", "paid", first["order_number"])
    assert (seen["subtotal"], seen["tax_amount"], seen["total"]) == (3920, 274, 4194)
    assert await stored(restaurant, first["id"], 2) == [
        ("created", "critical", "sync"),
        ("status_changed", "critical", "sync"),
    ]
    async with restaurant.system.database() as connection:
        items = await connection.fetch("select name, quantity from order_items where order_id = $1", first["id"])
        amounts = await connection.fetch("select amount from payments where order_id = $1", first["id"])
        external = await connection.fetchval("select external_id from orders where id = $1", first["id"])
    assert sorted(tuple(item) for item in items) == sorted((name, 2) for name in NAMES)
    assert [row["amount"] for row in amounts] == [4194]
    assert external == sent["external_id"]


async def test_convex_id_and_external_id_name_the_same_order(
    restaurant: RestaurantRig, other: httpx.AsyncClient
) -> None:
    name = f"k{uuid4().hex}"
    found = [
        await send(other, body(restaurant, external_id=external, convex_id=convex, notes=notes))
        for external, convex, notes in ((name, None, "1"), (None, name, "2"), (name, name, "2"))
    ]
    assert [one["outcome"] for one in found] == ["created", "updated", "unchanged"]
    assert len({one["id"] for one in found}) == 1


async def test_eight_concurrent_requests_make_one_order(restaurant: RestaurantRig, other: httpx.AsyncClient) -> None:
    sent = body(restaurant)
    found = await asyncio.gather(*(send_until_taken(other, sent) for _ in range(8)))
    assert sorted(one["outcome"] for one in found) == ["created", *["unchanged"] * 7]
    assert len({(one["id"], one["order_number"], one["version"]) for one in found}) == 1
    assert await stored(restaurant, found[0]["id"], 1) == [("created", "critical", "sync")]


async def test_each_payment_of_concurrent_updates_counts(restaurant: RestaurantRig, other: httpx.AsyncClient) -> None:
    sent = body(restaurant)
    payments = [{"id": f"p{i}", "amount": 100 + i, "method": "cash"} for i in range(8)]
    found = await asyncio.gather(*(send_until_taken(other, {**sent, "payments": [one]}) for one in payments))
    id_ = found[0]["id"]
    assert max(one["version"] for one in found) == 8
    assert sorted(one["amount"] for one in (await read(restaurant, id_))["payments"]) == list(range(100, 108))
    changes = await stored(restaurant, id_, 8)
    assert {kind for kind, _, _ in changes[1:]} == {"payment_recorded"}


async def test_older_update_that_arrives_late_adds_only_its_payments(
    restaurant: RestaurantRig, other: httpx.AsyncClient
) -> None:
    placed = now() - timedelta(minutes=20)

    def at(minutes: int, **fields: Any) -> dict[str, Any]:
        return {**sent, "updated_at": (placed + timedelta(minutes=minutes)).isoformat(), **fields}

    sent = body(restaurant, created_at=placed)
    await send(other, at(0))
    ready = await send(other, at(10, status="ready"))
    assert await send(other, at(5, status="preparing")) == {**ready, "outcome": "unchanged"}
    late = at(5, status="preparing", payments=[{"id": "deposit", "amount": 1000, "method": "cash"}])
    assert (await send(other, late))["outcome"] == "updated"
    seen = await read(restaurant, ready["id"])
    assert (seen["status"], seen["payment_status"]) == ("ready", "partially_paid")


async def test_old_orders_go_through_the_background_lane(restaurant: RestaurantRig, other: httpx.AsyncClient) -> None:
    old = await send(other, body(restaurant, status="completed", created_at=now() - timedelta(days=3)))
    assert await stored(restaurant, old["id"], 1) == [("created", "background", "sync")]


async def test_new_tax_rate_does_not_change_existing_orders(
    restaurant: RestaurantRig, other: httpx.AsyncClient
) -> None:
    """The update goes through a command session, because the running service still caches the old tax rate."""
    sent = body(restaurant)
    id_ = (await send(other, sent))["id"]
    async with (
        restaurant.system.database("ticketrail_writer") as connection,
        CommandSession(settings_of(restaurant.system)) as session,
    ):
        await connection.execute("update restaurants set tax_basis_points = 1900 where id = $1", restaurant.id)
        try:
            again = await upserts_of(session).upsert(read_body(json.dumps(sent).encode(), ExternalOrder))
            later = await upserts_of(session).upsert(
                read_body(json.dumps({**sent, "notes": "x"}).encode(), ExternalOrder)
            )
        finally:
            await connection.execute("update restaurants set tax_basis_points = 700 where id = $1", restaurant.id)
    assert (again.outcome, later.outcome) == ("unchanged", "updated")
    assert (await read(restaurant, id_))["tax_amount"] == 274


# -- token and body ------------------------------------------------------------------------------------------------


async def test_request_without_a_key_for_imports_is_refused(
    restaurant: RestaurantRig, system: System, key: str
) -> None:
    sent = body(restaurant)
    wrong = ["", "x", key[:-1], key + "x", key.upper(), "é", system.token("admin")]
    async with http_client(base_url=system.urls["sync"]) as client:
        for token in wrong:
            headers = [(b"x-sync-token", token.encode("latin-1"))]
            reply = await client.post("/api/sync/order", json=sent, headers=headers)
            refused(reply, 401, "unauthenticated", "x-sync-token")
        refused(await client.post("/api/sync/order", json=sent), 401, "unauthenticated")
        # A bad body gets the same reply, so the reply reveals nothing about it.
        assert (await client.post("/api/sync/order", content=b"{")).status_code == 401
        for text in (system.token("admin"), restaurant.token, await restaurant.api_key("orders:write", "menu:read")):
            reply = await client.post("/api/sync/order", json=sent, headers={"Authorization": f"Bearer {text}"})
            refused(reply, 403, "forbidden")
    async with restaurant.client() as staff:
        assert (await staff.get(f"/api/orders/{order_id(restaurant.id, sent['external_id'])}")).status_code == 404


async def test_key_of_another_restaurant_imports_nothing(restaurant: RestaurantRig, system: System) -> None:
    sent, theirs = body(restaurant), await register_restaurant(system)
    async with http_client(base_url=system.urls["sync"]) as client:
        for restaurant_id in (restaurant.id, str(uuid4())):  # whether it exists is not revealed
            headers = {"x-sync-token": await theirs.api_key("sync:write")}
            reply = await client.post("/api/sync/order", json={**sent, "restaurant_id": restaurant_id}, headers=headers)
            refused(reply, 403, "wrong_restaurant", "restaurant_id")
    async with restaurant.client() as staff:
        assert (await staff.get(f"/api/orders/{order_id(restaurant.id, sent['external_id'])}")).status_code == 404


async def test_key_works_in_either_header_and_is_the_actor_of_the_audit(
    restaurant: RestaurantRig, system: System, key: str
) -> None:
    async with http_client(base_url=system.urls["sync"], headers={"Authorization": f"Bearer {key}"}) as client:
        made = await send(client, body(restaurant))
    async with restaurant.client(Role.ADMIN) as admin:
        [listed] = [one for one in expect(await admin.get("/api/api-keys")) if key.startswith(f"trk_{one['prefix']}_")]

        async def actors() -> list[str]:
            found = expect(await admin.get("/api/audit", params={"entity_id": made["id"]}))
            return [one["actor"] for one in found]

        assert await eventually(actors, what="the import in the audit") == [listed["id"]]


BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"external_id": None}, "external_id"),
    ({"external_id": ""}, "external_id"),
    ({"convex_id": "another"}, "convex_id"),
    ({"items": []}, "items"),
    ({"items": [{"name": "x", "quantity": 0, "unit_price": 1}]}, "items[0].quantity"),
    ({"items": [{"name": "x", "quantity": 1, "unit_price": -1}]}, "items[0].unit_price"),
    ({"items": [{"name": "x", "quantity": 1, "unit_price": 1, "colour": "red"}]}, "items[0].colour"),
    ({"items": [{"name": "a\0b", "quantity": 1, "unit_price": 1}]}, "items[0].name"),
    ({"status": "eaten"}, "status"),
    ({"total": 1.5}, "total"),
    ({"created_at": "2026-03-01T12:00:00"}, "created_at"),
    ({"created_at": "1900-03-01T12:00:00Z"}, "created_at"),
    ({"payments": [{"id": "a", "amount": 1, "method": "card"}] * 2}, "payments[1].id"),
    ({"restaurant_id": "x"}, "restaurant_id"),
    ({"colour": "red"}, "colour"),
]


@pytest.mark.parametrize(("fields", "field"), BAD_BODIES, ids=lambda value: str(value)[:40])
async def test_bad_field_is_named(
    restaurant: RestaurantRig, other: httpx.AsyncClient, fields: dict[str, Any], field: str
) -> None:
    refused(await other.post("/api/sync/order", json=body(restaurant, **fields)), 422, "invalid_input", field)


async def test_unknown_restaurant_and_bodies_that_are_not_orders_are_refused(
    restaurant: RestaurantRig, other: httpx.AsyncClient
) -> None:
    unknown = await other.post("/api/sync/order", json=body(restaurant, restaurant_id=str(uuid4())))
    refused(unknown, 403, "wrong_restaurant", "restaurant_id")
    for content in (b"", b"{", b"[]", b"null", b"\xff"):
        reply = await other.post("/api/sync/order", content=content)
        assert reply.status_code == 422
        assert reply.json()["error"]["details"]["field"] == "body"
    refused(await other.post("/api/sync/order", content=b"x" * 2_000_000), 413, "body_too_large", "body")


async def test_payment_that_contradicts_a_known_payment_is_refused_with_409(
    restaurant: RestaurantRig, other: httpx.AsyncClient
) -> None:
    sent = body(restaurant, payments=[{"id": "p", "amount": 100, "method": "card"}])
    id_ = (await send(other, sent))["id"]
    sent["payments"][0]["amount"] = 200
    refused(await other.post("/api/sync/order", json=sent), 409, "payment_id_reused", "payments[0].id")
    assert [one["amount"] for one in (await read(restaurant, id_))["payments"]] == [100]


# -- backends unavailable: a second instance, whose links the test cuts ----------------------------------------------


def upserts_of(session: CommandSession) -> ExternalOrderUpserts:
    return ExternalOrderUpserts(session.postgres, session.mirror, session.rail, source="sync", window_days=3)


@pytest.fixture(scope="module")
async def links(system: System) -> AsyncIterator[dict[str, Link]]:
    async with link_to(system.rabbitmq_url) as broker, link_to(system.database_url("ticketrail_api")) as database:
        yield {"broker": broker, "database": database}


@pytest.fixture(scope="module")
async def second(system: System, key: str, links: dict[str, Link]) -> AsyncIterator[httpx.AsyncClient]:
    """A second instance of the sync API."""
    (port,) = find_free(1)
    system.start(
        "sync",
        alias="lone-sync",
        sync_port=port,
        rabbitmq_url=links["broker"].url,
        database_api_url=links["database"].url,
    )
    async with http_client(base_url=f"http://127.0.0.1:{port}", headers={"x-sync-token": key}, timeout=10.0) as client:

        async def ready() -> int:
            return (await client.get("/health/ready")).status_code

        await eventually(ready, what="a second instance that is ready", until=lambda status: status == 200)
        try:
            yield client
        finally:
            await system.stop("lone-sync")


@pytest.fixture
async def lone(restaurant: RestaurantRig, second: httpx.AsyncClient) -> httpx.AsyncClient:
    """The second instance, after it has recovered from the links that the previous test cut."""

    async def taken() -> int:
        return (await second.post("/api/sync/order", json=body(restaurant))).status_code

    await eventually(taken, what="a second instance that takes orders", until=lambda status: status == 200)
    return second


async def test_order_is_refused_and_absent_while_rabbitmq_is_unavailable(
    restaurant: RestaurantRig, links: dict[str, Link], lone: httpx.AsyncClient
) -> None:
    known = body(restaurant)
    first = await send(lone, known)
    new = body(restaurant)
    await links["broker"].cut()
    try:

        async def connected() -> int:
            return (await lone.post("/api/sync/order", json=body(restaurant))).status_code

        await eventually(connected, what="the status 503 after the cut", until=lambda status: status == 503)
        for sent in (new, {**known, "notes": "x"}):
            reply = await lone.post("/api/sync/order", json=sent)
            refused(reply, 503, "unavailable")
            assert int(reply.headers["retry-after"]) >= 1
    finally:
        await links["broker"].restore()
    id_ = order_id(restaurant.id, new["external_id"])
    async with restaurant.client() as staff:
        assert (await staff.get(f"/api/orders/{id_}")).status_code == 404
    assert (await read(restaurant, first["id"]))["version"] == 1

    async def taken() -> dict[str, Any]:
        return dict((await lone.post("/api/sync/order", json=new)).json())

    found = await eventually(taken, what="an accepted order", until=lambda reply: bool(reply["success"]))
    # The first request after the link is restored may have been recorded without a reply; a repeat is then unchanged.
    assert found["data"]["outcome"] in ("created", "unchanged")
    assert await stored(restaurant, id_, 1) == [("created", "critical", "sync")]


async def test_outcome_is_unknown_while_rabbitmq_is_frozen_and_a_repeat_finds_the_order(
    restaurant: RestaurantRig, links: dict[str, Link], lone: httpx.AsyncClient
) -> None:
    await send(lone, body(restaurant))
    sent = body(restaurant)
    links["broker"].freeze()
    try:
        refused(await lone.post("/api/sync/order", json=sent), 504, "outcome_unknown")
    finally:
        await links["broker"].restore()

    async def taken() -> dict[str, Any]:
        return dict((await lone.post("/api/sync/order", json=sent)).json())

    found = await eventually(taken, what="a reply", until=lambda reply: bool(reply["success"]))
    assert found["data"]["version"] == 1
    assert len(await stored(restaurant, found["data"]["id"], 1)) == 1


async def test_recent_orders_are_accepted_while_postgresql_is_unavailable(
    restaurant: RestaurantRig, links: dict[str, Link], lone: httpx.AsyncClient
) -> None:
    """Old and undated orders are refused: they may have left the mirror, so only PostgreSQL knows if they exist."""
    recent, undated, old = (
        body(restaurant, created_at=now()),
        body(restaurant),
        body(restaurant, created_at=now() - timedelta(days=9)),
    )
    known = body(restaurant)
    await send(lone, known)
    await links["database"].cut()
    try:
        assert (await send(lone, recent))["outcome"] == "created"
        assert (await send(lone, recent))["outcome"] == "unchanged"
        assert (await send(lone, {**known, "notes": "x"}))["outcome"] == "updated"
        for sent in (undated, old):
            refused(await lone.post("/api/sync/order", json=sent), 503, "unavailable")
    finally:
        await links["database"].restore()
    assert len(await stored(restaurant, order_id(restaurant.id, recent["external_id"]), 1)) == 1


async def test_order_that_the_command_line_cannot_record_is_refused_and_not_lost(restaurant: RestaurantRig) -> None:
    """A session has no journal: a refusal leaves no claim, and the claim finisher records the change in doubt."""
    async with link_to(restaurant.system.rabbitmq_url) as broker:
        settings = settings_of(restaurant.system, rabbitmq_url=broker.url, publish_timeout_seconds=0.5)
        async with CommandSession(settings) as session:
            upserts = upserts_of(session)
            sent = read_body(json.dumps(body(restaurant)).encode(), ExternalOrder)
            id_ = order_id(restaurant.id, sent.name)
            broker.freeze()
            with pytest.raises(OutcomeUnknown):
                await upserts.upsert(sent)
            await broker.cut()
            second = read_body(json.dumps(body(restaurant)).encode(), ExternalOrder)
            with pytest.raises(Unavailable):
                await upserts.upsert(second)
            claim = keys.claim(restaurant.id, "order", order_id(restaurant.id, second.name))
            assert await restaurant.system.redis.command("EXISTS", claim) == 0
    assert await stored(restaurant, id_, 1) == [("created", "critical", "sync")]
