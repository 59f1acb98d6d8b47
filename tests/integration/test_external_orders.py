"""POST /api/sync/order on a running system: orders of another system, in whatever order and however often they come."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from deploy.local.ports import find_free
from services.sync.command_session import CommandSession
from services.sync.imports import routes
from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.external_orders import ExternalOrder, order_id
from shared.entities.contract import now
from shared.errors import OutcomeUnknown, Unauthenticated, Unavailable
from shared.http.bodies import read_body
from shared.mirror import keys
from shared.settings import Settings
from tests.rigs.http_client import http_client
from tests.rigs.link import Link, link_to
from tests.rigs.restaurant import Shop, expect, open_shop, refused
from tests.rigs.system import System, eventually, settings_of

TOKEN = Settings.model_fields["sync_token"].default
NAMES = ["Margherita", "House red"]


@pytest.fixture(scope="module")
async def shop(system: System) -> Shop:
    return await open_shop(system, tax_basis_points=700)


@pytest.fixture
async def other(system: System) -> AsyncIterator[httpx.AsyncClient]:
    """The other system."""
    async with http_client(base_url=system.urls["sync"], headers={"x-sync-token": TOKEN}, timeout=10.0) as client:
        yield client


def body(shop: Shop, **fields: Any) -> dict[str, Any]:
    found = {
        "restaurant_id": shop.restaurant,
        "external_id": f"pos-{uuid4().hex}",
        "items": [{"name": name, "quantity": 2, "unit_price": 980} for name in NAMES],
        **fields,
    }
    return json.loads(json.dumps(found, default=lambda at: at.isoformat()))


async def send(client: httpx.AsyncClient, wanted: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = expect(await client.post("/api/sync/order", json=wanted))
    return found


async def send_on(client: httpx.AsyncClient, wanted: dict[str, Any]) -> dict[str, Any]:
    """Of many who change one order at once the last are refused where the machine is slow: as another system would,
    they come again."""

    async def taken() -> httpx.Response:
        return await client.post("/api/sync/order", json=wanted)

    def is_taken(reply: httpx.Response) -> bool:
        return reply.status_code != 409 or reply.json()["error"]["code"] != "version_conflict"

    found: dict[str, Any] = expect(await eventually(taken, what="taken", until=is_taken))
    return found


async def read(shop: Shop, id_: str) -> dict[str, Any]:
    async with shop.client() as staff:
        found: dict[str, Any] = expect(await staff.get(f"/api/orders/{id_}"))
        return found


async def stored(shop: Shop, id_: str, version: int) -> list[tuple[str, str, str]]:
    """(type, lane, source) of each change of an order, once PostgreSQL has it in that version."""

    async def look() -> int | None:
        return (await shop.system.stored_orders()).get(id_)

    await eventually(look, what=f"version {version} in PostgreSQL", until=lambda found: found == version)
    async with shop.system.database() as connection:
        rows = await connection.fetch(
            "select type, lane, source from changes where entity_id = $1 order by version", id_
        )
        assert await connection.fetchval("select count(*) from conflicts where entity_id = $1", id_) == 0
    return [(row["type"].split(".")[2], row["lane"], row["source"]) for row in rows]


async def test_an_order_is_created_updated_and_left_unchanged(shop: Shop, other: httpx.AsyncClient) -> None:
    wanted = body(shop, status="received", table_id=str(uuid4()))
    first = await send(other, wanted)
    assert (first["outcome"], first["version"]) == ("created", 1)
    assert first["id"] == order_id(shop.restaurant, wanted["external_id"])
    again = await send(other, wanted)
    assert again == {**first, "outcome": "unchanged"}
    paid = {"id": "card-1", "amount": 4194, "method": "card"}
    assert await send(other, {**wanted, "status": "ready", "payments": [paid]}) == {
        **first,
        "outcome": "updated",
        "version": 2,
    }
    seen = await read(shop, first["id"])
    assert (seen["status"], seen["payment_status"], seen["order_number"]) == ("ready", "paid", first["order_number"])
    assert (seen["subtotal"], seen["tax_amount"], seen["total"]) == (3920, 274, 4194)
    assert await stored(shop, first["id"], 2) == [
        ("created", "critical", "sync"),
        ("status_changed", "critical", "sync"),
    ]
    async with shop.system.database() as connection:
        items = await connection.fetch("select name, quantity from order_items where order_id = $1", first["id"])
        amounts = await connection.fetch("select amount from payments where order_id = $1", first["id"])
        external = await connection.fetchval("select external_id from orders where id = $1", first["id"])
    assert sorted(tuple(item) for item in items) == sorted((name, 2) for name in NAMES)
    assert [row["amount"] for row in amounts] == [4194]
    assert external == wanted["external_id"]


async def test_by_convex_id_by_external_id_and_by_both_it_is_one_order(shop: Shop, other: httpx.AsyncClient) -> None:
    name = f"k{uuid4().hex}"
    found = [
        await send(other, body(shop, external_id=external, convex_id=convex, notes=notes))
        for external, convex, notes in ((name, None, "1"), (None, name, "2"), (name, name, "2"))
    ]
    assert [one["outcome"] for one in found] == ["created", "updated", "unchanged"]
    assert len({one["id"] for one in found}) == 1


async def test_eight_at_once_are_one_order(shop: Shop, other: httpx.AsyncClient) -> None:
    wanted = body(shop)
    found = await asyncio.gather(*(send_on(other, wanted) for _ in range(8)))
    assert sorted(one["outcome"] for one in found) == ["created", *["unchanged"] * 7]
    assert len({(one["id"], one["order_number"], one["version"]) for one in found}) == 1
    assert await stored(shop, found[0]["id"], 1) == [("created", "critical", "sync")]


async def test_of_different_updates_at_once_each_payment_counts(shop: Shop, other: httpx.AsyncClient) -> None:
    wanted = body(shop)
    payments = [{"id": f"p{i}", "amount": 100 + i, "method": "cash"} for i in range(8)]
    found = await asyncio.gather(*(send_on(other, {**wanted, "payments": [one]}) for one in payments))
    id_ = found[0]["id"]
    assert max(one["version"] for one in found) == 8
    assert sorted(one["amount"] for one in (await read(shop, id_))["payments"]) == list(range(100, 108))
    changes = await stored(shop, id_, 8)
    assert {kind for kind, _, _ in changes[1:]} == {"payment_recorded"}


async def test_an_older_update_that_comes_late_is_ignored_but_for_its_payments(
    shop: Shop, other: httpx.AsyncClient
) -> None:
    placed = now() - timedelta(minutes=20)

    def at(minutes: int, **fields: Any) -> dict[str, Any]:
        return {**wanted, "updated_at": (placed + timedelta(minutes=minutes)).isoformat(), **fields}

    wanted = body(shop, created_at=placed)
    await send(other, at(0))
    ready = await send(other, at(10, status="ready"))
    assert await send(other, at(5, status="preparing")) == {**ready, "outcome": "unchanged"}
    late = at(5, status="preparing", payments=[{"id": "deposit", "amount": 1000, "method": "cash"}])
    assert (await send(other, late))["outcome"] == "updated"
    seen = await read(shop, ready["id"])
    assert (seen["status"], seen["payment_status"]) == ("ready", "partially_paid")


async def test_history_goes_through_the_background_lane(shop: Shop, other: httpx.AsyncClient) -> None:
    old = await send(other, body(shop, status="completed", created_at=now() - timedelta(days=3)))
    assert await stored(shop, old["id"], 1) == [("created", "background", "sync")]


async def test_a_new_tax_rate_does_not_change_what_was_placed_before(shop: Shop, other: httpx.AsyncClient) -> None:
    """By another instance than the one that remembers the old rate."""
    wanted = body(shop)
    id_ = (await send(other, wanted))["id"]
    async with (
        shop.system.database("ticketrail_writer") as connection,
        CommandSession(settings_of(shop.system)) as session,
    ):
        await connection.execute("update restaurants set tax_basis_points = 1900 where id = $1", shop.restaurant)
        try:
            again = await upserts_of(session).upsert(read_body(json.dumps(wanted).encode(), ExternalOrder))
            later = await upserts_of(session).upsert(
                read_body(json.dumps({**wanted, "notes": "x"}).encode(), ExternalOrder)
            )
        finally:
            await connection.execute("update restaurants set tax_basis_points = 700 where id = $1", shop.restaurant)
    assert (again.outcome, later.outcome) == ("unchanged", "updated")
    assert (await read(shop, id_))["tax_amount"] == 274


# -- who may call, and with what -----------------------------------------------------------------------------------


async def test_without_the_token_nothing_is_taken(shop: Shop, system: System) -> None:
    wanted = body(shop)
    wrong = ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é", system.token("admin")]
    async with http_client(base_url=system.urls["sync"]) as client:
        for token in (None, *wrong):
            headers = [] if token is None else [(b"x-sync-token", token.encode("latin-1"))]
            reply = await client.post("/api/sync/order", json=wanted, headers=headers)
            refused(reply, 401, "unauthenticated", "x-sync-token")
        # Who has a user's token has none of another system; and nobody learns whether the body would have been good.
        reply = await client.post(
            "/api/sync/order", content=b"{", headers={"Authorization": f"Bearer {system.token('admin')}"}
        )
        assert reply.status_code == 401
    async with shop.client() as staff:
        assert (await staff.get(f"/api/orders/{order_id(shop.restaurant, wanted['external_id'])}")).status_code == 404


async def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is of one length whatever was sent, by the comparison that is made for it."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((given, expected))
        return real(given, expected)

    monkeypatch.setattr(routes.hmac, "compare_digest", compare)  # type: ignore[attr-defined]
    for token in ("x", "y" * 5_000):
        with pytest.raises(Unauthenticated):
            routes.check_token(token, "a token")
    assert [(len(given), len(expected)) for given, expected in compared] == [(32, 32)] * 2
    with pytest.raises(Unauthenticated):  # an empty setting accepts no token
        routes.check_token("", "")


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
async def test_a_bad_field_is_named(shop: Shop, other: httpx.AsyncClient, fields: dict[str, Any], field: str) -> None:
    refused(await other.post("/api/sync/order", json=body(shop, **fields)), 422, "invalid_input", field)


async def test_what_is_no_order_of_a_restaurant_of_ours_is_refused(shop: Shop, other: httpx.AsyncClient) -> None:
    unknown = await other.post("/api/sync/order", json=body(shop, restaurant_id=str(uuid4())))
    refused(unknown, 404, "not_found", "restaurant_id")
    for content in (b"", b"{", b"[]", b"null", b"\xff"):
        reply = await other.post("/api/sync/order", content=content)
        assert reply.status_code == 422
        assert reply.json()["error"]["details"]["field"] == "body"
    refused(await other.post("/api/sync/order", content=b"x" * 2_000_000), 413, "body_too_large", "body")


async def test_a_payment_that_contradicts_one_that_is_known_is_a_conflict(shop: Shop, other: httpx.AsyncClient) -> None:
    wanted = body(shop, payments=[{"id": "p", "amount": 100, "method": "card"}])
    id_ = (await send(other, wanted))["id"]
    wanted["payments"][0]["amount"] = 200
    refused(await other.post("/api/sync/order", json=wanted), 409, "payment_id_reused", "payments[0].id")
    assert [one["amount"] for one in (await read(shop, id_))["payments"]] == [100]


# -- backends away: an instance of its own, whose links the test cuts ------------------------------------------------


def upserts_of(session: CommandSession) -> ExternalOrderUpserts:
    return ExternalOrderUpserts(session.postgres, session.mirror, session.rail, source="sync", window_days=3)


@pytest.fixture(scope="module")
async def links(system: System) -> AsyncIterator[dict[str, Link]]:
    async with link_to(system.rabbitmq_url) as broker, link_to(system.database_url("ticketrail_api")) as database:
        yield {"broker": broker, "database": database}


@pytest.fixture(scope="module")
async def second(system: System, links: dict[str, Link]) -> AsyncIterator[httpx.AsyncClient]:
    """A second instance of the sync API."""
    (port,) = find_free(1)
    system.start(
        "sync",
        alias="lone-sync",
        sync_port=port,
        rabbitmq_url=links["broker"].url,
        database_api_url=links["database"].url,
    )
    async with http_client(
        base_url=f"http://127.0.0.1:{port}", headers={"x-sync-token": TOKEN}, timeout=10.0
    ) as client:

        async def ready() -> int:
            return (await client.get("/health/ready")).status_code

        await eventually(ready, what="the second instance", until=lambda status: status == 200)
        try:
            yield client
        finally:
            await system.stop("lone-sync")


@pytest.fixture
async def lone(shop: Shop, second: httpx.AsyncClient) -> httpx.AsyncClient:
    """Once it has got over what the test before did to its links."""

    async def taken() -> int:
        return (await second.post("/api/sync/order", json=body(shop))).status_code

    await eventually(taken, what="the second instance takes orders", until=lambda status: status == 200)
    return second


async def test_while_rabbitmq_is_away_an_order_is_refused_and_absent(
    shop: Shop, links: dict[str, Link], lone: httpx.AsyncClient
) -> None:
    known = body(shop)
    first = await send(lone, known)
    new = body(shop)
    await links["broker"].cut()
    try:

        async def connected() -> int:
            return (await lone.post("/api/sync/order", json=body(shop))).status_code

        await eventually(connected, what="the loss noticed", until=lambda status: status == 503)
        for wanted in (new, {**known, "notes": "x"}):
            reply = await lone.post("/api/sync/order", json=wanted)
            refused(reply, 503, "unavailable")
            assert int(reply.headers["retry-after"]) >= 1
    finally:
        await links["broker"].restore()
    id_ = order_id(shop.restaurant, new["external_id"])
    async with shop.client() as staff:
        assert (await staff.get(f"/api/orders/{id_}")).status_code == 404
    assert (await read(shop, first["id"]))["version"] == 1

    async def taken() -> dict[str, Any]:
        return dict((await lone.post("/api/sync/order", json=new)).json())

    found = await eventually(taken, what="taken again", until=lambda reply: bool(reply["success"]))
    # The first that was sent over a link that stands again may have been without an answer.
    assert found["data"]["outcome"] in ("created", "unchanged")
    assert await stored(shop, id_, 1) == [("created", "critical", "sync")]


async def test_while_rabbitmq_is_frozen_the_outcome_is_unknown_and_a_repeat_finds_it(
    shop: Shop, links: dict[str, Link], lone: httpx.AsyncClient
) -> None:
    await send(lone, body(shop))
    wanted = body(shop)
    links["broker"].freeze()
    try:
        refused(await lone.post("/api/sync/order", json=wanted), 504, "outcome_unknown")
    finally:
        await links["broker"].restore()

    async def taken() -> dict[str, Any]:
        return dict((await lone.post("/api/sync/order", json=wanted)).json())

    found = await eventually(taken, what="an answer", until=lambda reply: bool(reply["success"]))
    assert found["data"]["version"] == 1
    assert len(await stored(shop, found["data"]["id"], 1)) == 1


async def test_while_postgresql_is_away_the_orders_of_today_are_taken(
    shop: Shop, links: dict[str, Link], lone: httpx.AsyncClient
) -> None:
    """An order that may have left the mirror is not: nobody could tell whether it exists."""
    recent, undated, old = body(shop, created_at=now()), body(shop), body(shop, created_at=now() - timedelta(days=9))
    known = body(shop)
    await send(lone, known)
    await links["database"].cut()
    try:
        assert (await send(lone, recent))["outcome"] == "created"
        assert (await send(lone, recent))["outcome"] == "unchanged"
        assert (await send(lone, {**known, "notes": "x"}))["outcome"] == "updated"
        for wanted in (undated, old):
            refused(await lone.post("/api/sync/order", json=wanted), 503, "unavailable")
        fresh = await open_shop(shop.system)
        another = body(fresh, created_at=now())
        assert (await send(lone, another))["outcome"] == "created", "the mirror knows the restaurant"
    finally:
        await links["database"].restore()
    assert len(await stored(shop, order_id(shop.restaurant, recent["external_id"]), 1)) == 1


async def test_what_the_command_line_cannot_record_is_refused_and_not_lost(shop: Shop) -> None:
    """A session has no journal: nothing is claimed after a refusal, and what was sent in vain is finished later."""
    async with link_to(shop.system.rabbitmq_url) as broker:
        settings = settings_of(shop.system, rabbitmq_url=broker.url, publish_timeout_seconds=0.5)
        async with CommandSession(settings) as session:
            upserts = upserts_of(session)
            wanted = read_body(json.dumps(body(shop)).encode(), ExternalOrder)
            id_ = order_id(shop.restaurant, wanted.name)
            broker.freeze()
            with pytest.raises(OutcomeUnknown):
                await upserts.upsert(wanted)
            await broker.cut()
            second = read_body(json.dumps(body(shop)).encode(), ExternalOrder)
            with pytest.raises(Unavailable):
                await upserts.upsert(second)
            claim = keys.claim(shop.restaurant, "order", order_id(shop.restaurant, second.name))
            assert await session.mirror._redis.call("EXISTS", claim) == 0
    assert await stored(shop, id_, 1) == [("created", "critical", "sync")]
