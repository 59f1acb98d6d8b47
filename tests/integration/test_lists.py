"""Features that all entities share: lists, soft delete and restore, repeats and the audit. Also the summary by day."""

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest

from deploy.local.port_check import find_free
from services.orders.resources import RESOURCES, Resource
from shared.entities.order import OrderStatus, PaymentStatus
from shared.security.tokens import Role
from tests.rigs.builders import change, item, new_id, order
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually

EVERY = pytest.mark.parametrize("resource", RESOURCES, ids=[one.entity.name for one in RESOURCES])
# BODIES: the body that creates each entity. CHANGES: one field of each entity and its changed value.
BODIES: dict[str, dict[str, Any]] = {
    "category": {"name": "Mains", "position": 2},
    "brand": {"name": "Fritz", "description": "from Hamburg"},
    "menu_item": {
        "name": "Dosa",
        "price": 900,
        "category": "Mains",
        "customizations": [{"name": "size", "options": [{"name": "large", "price": 50}]}],
    },
    "table": {"label": "Window", "seats": 2},
    "bay": {"name": "Grill", "kind": "kitchen"},
    "job": {"title": "Wash", "expected_minutes": 5, "scheduled_at": "2026-03-14T12:30:00+01:00"},
    "customer": {"name": "Ada", "phone": "+4930123456"},
    "inventory_item": {"name": "Dough", "quantity": 5, "unit": "piece"},
}
CHANGES: dict[str, tuple[str, Any]] = {
    "category": ("position", 7),
    "brand": ("description", None),
    "menu_item": ("price", 950),
    "table": ("seats", 4),
    "bay": ("is_open", False),
    "job": ("notes", "with wax"),
    "customer": ("name", "Ada L."),
    "inventory_item": ("low_at", 3),
}


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system, tax_basis_points=0)


@pytest.fixture(scope="module")
async def bay(restaurant: RestaurantRig) -> str:
    async with restaurant.client() as staff:
        return str(made(await staff.post("/api/bays", json={"name": "Wash"}))["id"])


def body_of(resource: Resource, bay: str) -> dict[str, Any]:
    found = BODIES[resource.entity.name]
    return {**found, "bay_id": bay} if resource.entity.name == "job" else found


def test_every_entity_is_tested() -> None:
    assert {one.entity.name for one in RESOURCES} == set(BODIES) == set(CHANGES)


async def ids(client: httpx.AsyncClient, path: str, **query: Any) -> list[str]:
    """Reads all pages and returns the ids."""
    found: list[str] = []
    cursor = None
    while True:
        reply = await client.get(path, params={"limit": 200, **query, **({"cursor": cursor} if cursor else {})})
        page = [one["id"] for one in expect(reply)]
        assert len(page) <= int(query.get("limit", 200))
        found += page
        cursor = reply.json()["pagination"]["next_cursor"]
        if cursor is None:
            return found


# -- create, change, delete, restore -----------------------------------------------------------------------------


@EVERY
async def test_every_entity_can_be_deleted_and_restored(
    restaurant: RestaurantRig, bay: str, resource: Resource
) -> None:
    path, name = resource.path, resource.entity.name
    field, value = CHANGES[name]
    async with restaurant.client(Role.ADMIN) as admin, restaurant.client() as staff:
        one = made(await admin.post(path, json=body_of(resource, bay)))
        url = f"{path}/{one['id']}"
        assert (one["version"], one["deleted_at"]) == (1, None)
        assert expect(await staff.get(url))["id"] == one["id"] == (await ids(staff, path))[0]
        changed = expect(await admin.put(url, json={field: value}, headers={"If-Match": '"1"'}))
        assert (changed["version"], changed[field]) == (2, value)
        assert changed["created_at"] == one["created_at"] < changed["updated_at"]
        for late in (
            await admin.put(url, json={field: one[field]}, headers={"If-Match": '"1"'}),
            await admin.delete(url, headers={"If-Match": '"1"'}),
        ):
            assert refused(late, 409, "version_conflict", "If-Match")["version"] == 2

        removed = expect(await admin.delete(url))
        assert removed["version"] == 3
        assert removed["deleted_at"] is not None
        assert one["id"] not in await ids(staff, path)
        refused(await admin.get(url), 404, f"{name}_deleted")
        refused(await admin.put(url, json={field: value}), 404, f"{name}_deleted")
        refused(await admin.delete(url), 404, f"{name}_deleted")
        refused(await staff.get(path, params={"include_deleted": "true"}), 403, "forbidden", "include_deleted")
        assert (await ids(admin, path, include_deleted="true"))[0] == one["id"]

        async def stored() -> Any:
            async with restaurant.system.database() as connection:
                return await connection.fetchrow(
                    f"select version, deleted_at from {resource.entity.table.name} where id = $1", one["id"]
                )

        row = await eventually(
            stored, what="the deleted state in PostgreSQL", until=lambda found: found and found["version"] == 3
        )
        assert row["deleted_at"] == datetime.fromisoformat(removed["deleted_at"])
        assert one["id"] not in await ids(staff, path)
        assert (await ids(admin, path, include_deleted="true"))[0] == one["id"]

        back = expect(await admin.post(f"{url}/restore"))
        unlike = ("version", "updated_at", "sync", "durability", "visible")
        assert {x: y for x, y in back.items() if x not in unlike} == {
            x: y for x, y in changed.items() if x not in unlike
        }
        assert back["version"] == 4
        assert (await ids(staff, path))[0] == one["id"]
        refused(await admin.post(f"{url}/restore"), 409, "not_deleted")
        refused(await admin.post(f"{path}/{uuid4()}/restore"), 404, "not_found")
        await eventually(stored, what="the restored state in PostgreSQL", until=lambda found: tuple(found) == (4, None))


@EVERY
async def test_repeated_creation_with_its_key_returns_the_same_entity(
    restaurant: RestaurantRig, bay: str, resource: Resource
) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    body = body_of(resource, bay)
    async with restaurant.client(Role.ADMIN) as admin:
        first = await admin.post(resource.path, json=body, headers=key)
        again = await admin.post(resource.path, json=body, headers=key)
        assert made(again)["id"] == made(first)["id"]
        assert again.headers["idempotency-replayed"] == "true"
        other = {**body, next(iter(BODIES[resource.entity.name])): "Another"}
        refused(await admin.post(resource.path, json=other, headers=key), 422, "idempotency_key_reused")
        # The entity may have changed since; then the reply shows its current state.
        field, value = CHANGES[resource.entity.name]
        expect(await admin.put(f"{resource.path}/{made(first)['id']}", json={field: value}))
        assert made(await admin.post(resource.path, json=body, headers=key))[field] == value
        assert (await ids(admin, resource.path)).count(made(first)["id"]) == 1
        refused(await admin.post(resource.path, json=other, headers=key), 422, "idempotency_key_reused")
        assert "request_hash" not in made(first)
        expect(await admin.delete(f"{resource.path}/{made(first)['id']}"))
        assert made(await admin.post(resource.path, json=body, headers=key))["deleted_at"]
        refused(await admin.post(resource.path, json=other, headers=key), 422, "idempotency_key_reused")


@EVERY
async def test_change_without_effect_creates_no_version(
    restaurant: RestaurantRig, bay: str, resource: Resource
) -> None:
    body = body_of(resource, bay)
    if resource.entity.name == "inventory_item":
        # A count of the stock is always a change, so the body leaves the quantity out.
        body = {name: value for name, value in body.items() if name != "quantity"}
    async with restaurant.client(Role.ADMIN) as admin:
        one = made(await admin.post(resource.path, json=body_of(resource, bay)))
        same = await admin.put(f"{resource.path}/{one['id']}", json=body)
        assert (expect(same)["version"], expect(same)["updated_at"]) == (1, one["updated_at"])
        assert expect(await admin.put(f"{resource.path}/{one['id']}", json={}))["version"] == 1


# -- lists -------------------------------------------------------------------------------------------------------


@EVERY
async def test_pages_list_every_entity_once_newest_first(
    restaurant: RestaurantRig, bay: str, resource: Resource
) -> None:
    path = resource.path
    async with restaurant.client(Role.ADMIN) as admin:
        new = [made(await admin.post(path, json=body_of(resource, bay))) for _ in range(5)]
        newest = [one["id"] for one in reversed(new)]
        since = new[0]["created_at"]

        async def states() -> set[str]:
            return {one["sync"]["state"] for one in expect(await admin.get(path, params={"created_from": since}))}

        # The first round reads while the entities are pending, the second one when PostgreSQL has them.
        for _ in range(2):
            for limit in (1, 2, 5, 6):
                assert await ids(admin, path, created_from=since, limit=limit) == newest
            await eventually(states, what="the state `synced`", until=lambda seen: seen == {"synced"})
        first = await admin.get(path, params={"limit": 2, "created_from": since})
        cursor = first.json()["pagination"]["next_cursor"]
        # Entities that are created, changed or deleted between two pages do not shift the pages.
        made(await admin.post(path, json=body_of(resource, bay)))
        field, value = CHANGES[resource.entity.name]
        expect(await admin.put(f"{path}/{newest[2]}", json={field: value}))
        expect(await admin.delete(f"{path}/{newest[0]}"))
        rest = await admin.get(path, params={"limit": 2, "created_from": since, "cursor": cursor})
        assert [one["id"] for one in expect(first) + expect(rest)] == newest[:4]
        assert await ids(admin, path, created_from=since, created_to=new[2]["created_at"]) == newest[2:]
        assert await ids(admin, path, created_from=since, created_to=new[2]["created_at"], limit=2) == newest[2:]
        refused(await admin.get(path, params={"cursor": cursor + "!"}), 422, "invalid_cursor", "cursor")
        refused(await admin.get(path, params={"limit": 201}), 422, "invalid_input", "limit")
        refused(await admin.get(path, params={"colour": "red"}), 422, "invalid_input", "colour")


@EVERY
async def test_fields_select_the_returned_fields(restaurant: RestaurantRig, bay: str, resource: Resource) -> None:
    field, _ = CHANGES[resource.entity.name]
    nothing = {"created_to": "1999-01-01T00:00:00Z"}
    async with restaurant.client(Role.ADMIN) as admin:
        one = made(await admin.post(resource.path, json=body_of(resource, bay)))
        requested = [field, "version", *resource.derived_types]
        listed = expect(await admin.get(resource.path, params={"fields": ", ".join(requested), "limit": 1}))
        assert listed == [{"id": one["id"], **{name: one[name] for name in requested}}]
        # The names of the fields are checked even if the list is empty.
        assert expect(await admin.get(resource.path, params={"fields": ",".join(requested), **nothing})) == []
        for query in ({}, nothing):
            reply = await admin.get(resource.path, params={"fields": f"id,{field},secret", **query})
            refused(reply, 422, "invalid_input", "fields")


async def test_orders_are_filtered_and_shown_as_requested(restaurant: RestaurantRig) -> None:
    dish = (await restaurant.dish())["id"]
    body = {"items": [{"menu_item_id": dish, "quantity": 1}], "table_id": str(uuid4())}
    async with restaurant.client(Role.ADMIN) as admin, restaurant.client() as staff:
        orders = [
            made(await staff.post("/api/orders", json=body, headers={"Idempotency-Key": new_id()})) for _ in "abc"
        ]
        newest = [one["id"] for one in reversed(orders)]
        at_table: dict[str, Any] = {"table_id": body["table_id"]}
        assert await ids(staff, "/api/orders", limit=2, **at_table) == newest
        expect(await staff.delete(f"/api/orders/{newest[1]}"))
        expect(await staff.put(f"/api/orders/{newest[0]}", json={"status": "received"}))
        assert await ids(staff, "/api/orders", **at_table) == [newest[0], newest[2]]
        assert await ids(staff, "/api/orders", status="received", **at_table) == [newest[0]]
        assert await ids(admin, "/api/orders", include_deleted="true", **at_table) == newest
        refused(await staff.get("/api/orders", params={"include_deleted": "true"}), 403, "forbidden", "include_deleted")
        listed = expect(await staff.get("/api/orders", params={"fields": "total,payment_status", **at_table}))
        assert listed[0] == {"id": newest[0], "total": 1_000, "payment_status": "pending"}
        # No client may request the request hash, which only serves idempotency.
        refused(await staff.get("/api/orders", params={"fields": "request_hash"}), 422, "invalid_input", "fields")


async def test_guest_sees_nothing_of_other_guests(restaurant: RestaurantRig) -> None:
    dish = (await restaurant.dish())["id"]
    async with restaurant.client(Role.ADMIN) as admin:
        table = made(await admin.post("/api/tables", json={"label": "Bar", "seats": 9}))["id"]
        others = made(
            await admin.post(
                "/api/orders",
                json={
                    "items": [{"menu_item_id": dish, "quantity": 1}],
                    "table_id": table,
                    "customer_name": "Grace",
                    "customer_session_id": "session-of-grace",
                },
            )
        )
        deleted = made(await admin.post("/api/menu", json={"name": "Old dish", "price": 1, "category": "x"}))["id"]
        expect(await admin.delete(f"/api/menu/{deleted}"))
    async with restaurant.client(Role.CUSTOMER, session="session-of-ada") as guest:
        for path in ("/api/orders", "/api/menu", "/api/menu/categories", "/api/menu/brands", "/api/tables"):
            seen = await guest.get(path, params={"limit": 200})
            expect(seen)
            for secret in (others["id"], "Grace", "session-of-grace", deleted):
                assert secret not in seen.text, path
            refused(await guest.get(path, params={"include_deleted": "true"}), 403, "forbidden", "include_deleted")
        assert expect(await guest.get("/api/orders", params={"table_id": table})) == []
        for path in ("customers", "inventory", "bays", "jobs", "payments", "audit", "orders/summary", "users"):
            refused(await guest.get(f"/api/{path}"), 403, "forbidden")


# -- the audit ---------------------------------------------------------------------------------------------------


async def test_page_of_large_orders_ends_after_some_megabytes_and_the_next_one_continues(system: System) -> None:
    restaurant = await register_restaurant(system)
    dish = (await restaurant.dish())["id"]
    items = [{"menu_item_id": dish, "quantity": 1, "special_instructions": "x" * 800}] * 1_000
    placed = []
    async with restaurant.client(Role.ADMIN) as admin:
        for number in range(8):
            large = {"items": items if number % 4 else items[:1]}
            placed.append(made(await admin.post("/api/orders", json=large))["id"])
        for state in ("pending", "synced"):  # some are pending at first
            if state == "synced":
                await eventually(
                    lambda: admin.get("/api/orders", params={"sync_state": "pending", "limit": 1}),
                    until=lambda reply: expect(reply) == [],
                    what="all orders are in PostgreSQL",
                )
            found, sizes, cursor = list[str](), list[int](), ""
            while cursor is not None:
                params: dict[str, Any] = {"limit": 200, **({"cursor": cursor} if cursor else {})}
                reply = await admin.get("/api/orders", params=params)
                found += [one["id"] for one in expect(reply)]
                sizes.append(len(reply.content))
                cursor = reply.json()["pagination"]["next_cursor"]
            assert found == placed[::-1]
        assert len(sizes) > 1 and max(sizes) < 6_000_000


async def test_audit_of_an_unknown_entity_is_refused_with_the_names_of_all(restaurant: RestaurantRig) -> None:
    async with restaurant.client(Role.ADMIN) as admin:
        reply = await admin.get("/api/audit", params={"entity": "users"})
        refused(reply, 422, "invalid_input", "entity")
        assert reply.json()["error"]["message"].startswith("must be one of order, menu_item, ")
        for entity in ("order", "user", "api_key"):
            expect(await admin.get("/api/audit", params={"entity": entity}))


async def audit(client: httpx.AsyncClient, count: int, **query: Any) -> list[dict[str, Any]]:
    """Waits until the audit, which is read from PostgreSQL, has `count` rows; returns them."""

    async def look() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = expect(await client.get("/api/audit", params=query))
        return found

    return await eventually(look, what=f"{count} in the audit", until=lambda found: len(found) == count)


@EVERY
async def test_audit_shows_actor_and_changed_fields(restaurant: RestaurantRig, bay: str, resource: Resource) -> None:
    field, value = CHANGES[resource.entity.name]
    async with restaurant.client(Role.ADMIN) as admin:
        one = made(await admin.post(resource.path, json=body_of(resource, bay)))
        url = f"{resource.path}/{one['id']}"
        expect(await admin.put(url, json={field: value}))
        removed = expect(await admin.delete(url))
        expect(await admin.post(f"{url}/restore"))
        found = await audit(admin, 4, entity=resource.entity.name, entity_id=one["id"])
    name = resource.entity.name
    events = [f"ticketrail.{name}.{event}.v1" for event in ("restored", "deleted", "updated", "created")]
    assert [(each["type"], each["version"]) for each in found] == list(zip(events, (4, 3, 2, 1), strict=True))
    assert {each["actor"] for each in found} == {restaurant.admin_id}
    assert {(each["entity"], each["source"]) for each in found} == {(name, "orders")}
    restored, deleted, updated, created = (each["changed"] for each in found)
    assert created == {}
    assert updated == {field: {"before": one[field], "after": value}}
    assert deleted == {"deleted_at": {"before": None, "after": removed["deleted_at"]}}
    assert restored == {"deleted_at": {"before": removed["deleted_at"], "after": None}}


async def test_page_of_large_changes_ends_after_some_megabytes_and_the_next_one_goes_on(system: System) -> None:
    restaurant = await register_restaurant(system)
    dish = (await restaurant.dish())["id"]
    items = [{"menu_item_id": dish, "quantity": 1, "special_instructions": "x" * 800}] * 1_000
    async with restaurant.client(Role.ADMIN) as admin:
        url = f"/api/orders/{made(await admin.post('/api/orders', json={'items': items}))['id']}"
        for number in range(8):
            notes = [{"menu_item_id": dish, "quantity": 2, "special_instructions": f"{number}" * 800}] * 1_000
            expect(await admin.put(url, json={"items": notes}))
        id_ = url.rpartition("/")[2]
        versions, sizes, cursor = list[int](), list[int](), ""

        async def all_stored() -> bool:
            return expect(await admin.get("/api/audit", params={"entity_id": id_, "limit": 1}))[0]["version"] == 9

        await eventually(all_stored, what="the newest change in PostgreSQL")
        while cursor is not None:
            params: dict[str, Any] = {"entity_id": id_, "limit": 200, **({"cursor": cursor} if cursor else {})}
            reply = await admin.get("/api/audit", params=params)
            versions += [one["version"] for one in expect(reply)]
            sizes.append(len(reply.content))
            cursor = reply.json()["pagination"]["next_cursor"]
    assert versions == list(range(9, 0, -1))
    assert len(sizes) > 1 and max(sizes) < 8_000_000


async def test_audit_names_guests_by_session_and_staff_by_user(system: System) -> None:
    restaurant = await register_restaurant(system)
    dish = (await restaurant.dish())["id"]
    session = f"table-{uuid4()}"
    async with restaurant.client(Role.ADMIN) as admin, restaurant.client() as staff:
        async with restaurant.client(Role.CUSTOMER, session=session) as guest:
            placed = made(await guest.post("/api/orders", json={"items": [{"menu_item_id": dish, "quantity": 1}]}))
        url = f"/api/orders/{placed['id']}"
        expect(await staff.put(url, json={"status": "received", "notes": "hurry"}))
        made(await staff.post(f"{url}/payments", json={"amount": 5, "method": "cash"}))
        expect(await admin.delete(url))
        expect(await staff.post(f"{url}/restore"))
        expect(await staff.post("/api/menu/availability", json={"menu_item_ids": [dish], "is_available": False}))
        found = await audit(admin, 7)
        assert [(one["type"].split(".", 1)[1], one["actor"]) for one in found] == [
            ("menu_item.updated.v1", restaurant.staff_id),
            ("order.restored.v1", restaurant.staff_id),
            ("order.deleted.v1", restaurant.admin_id),
            ("order.payment_recorded.v1", restaurant.staff_id),
            ("order.status_changed.v1", restaurant.staff_id),
            ("order.created.v1", session),
            ("menu_item.created.v1", restaurant.admin_id),
        ]
        assert found[0]["changed"] == {"is_available": {"before": True, "after": False}}
        assert found[4]["changed"] == {
            "status": {"before": "pending", "after": "received"},
            "notes": {"before": None, "after": "hurry"},
        }
        payments = found[3]["changed"]["payments"]
        assert (payments["before"], [one["amount"] for one in payments["after"]]) == ([], [5])

        everything = [one["change_id"] for one in found]
        pages: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            reply = await admin.get("/api/audit", params={"limit": 3, **cursor})
            pages += [one["change_id"] for one in expect(reply)]
            if (following := reply.json()["pagination"]["next_cursor"]) is None:
                break
            cursor = {"cursor": following}
        assert pages == everything

        async def chosen(**query: str) -> list[int]:
            rows = expect(await admin.get("/api/audit", params=query))
            return [everything.index(one["change_id"]) for one in rows]

        assert await chosen(actor=session) == [5]
        assert await chosen(actor=restaurant.admin_id) == [2, 6]
        assert await chosen(entity="menu_item") == [0, 6]
        assert await chosen(entity="order", entity_id=dish) == []
        assert await chosen(**{"from": found[3]["accepted_at"]}) == [0, 1, 2, 3]
        assert await chosen(**{"from": found[3]["accepted_at"], "to": found[2]["accepted_at"]}) == [2, 3]
        refused(await admin.get("/api/audit", params={"cursor": "x"}), 422, "invalid_cursor", "cursor")
        for client in (restaurant.client(Role.STAFF), restaurant.client(Role.CUSTOMER, session=session)):
            async with client as other:
                refused(await other.get("/api/audit"), 403, "forbidden")
    async with (await register_restaurant(system)).client(Role.ADMIN) as stranger:
        assert expect(await stranger.get("/api/audit")) == []


# -- the summary -------------------------------------------------------------------------------------------------


async def test_summary_adds_up_each_business_day(system: System) -> None:
    restaurant = await register_restaurant(system, currency="CHF", tax_basis_points=0)
    monday, tuesday, friday = date(2026, 3, 2), date(2026, 3, 3), date(2026, 3, 6)

    def of(day: date, price: int, **fields: Any) -> Any:
        return order(
            items=(item(unit_price=price),),
            restaurant_id=restaurant.id,
            business_day=day,
            subtotal=price,
            tax_amount=price // 10,
            total=price + price // 10,
            currency="CHF",
            **fields,
        )

    states = [
        of(monday, 1_000, tip_amount=50, payment_status=PaymentStatus.PAID),
        of(monday, 2_000, discount_amount=20, status=OrderStatus.COMPLETED),
        of(monday, 4_000, status=OrderStatus.CANCELLED, payment_status=PaymentStatus.REFUNDED),
        of(monday, 8_000, deleted_at=datetime(2026, 3, 14, tzinfo=UTC)),
        of(tuesday, 100),
        of(friday, 10),
    ]
    await restaurant.publish(*(change(state) for state in states))
    async with restaurant.client() as staff:
        span = {"from": "2026-03-01", "to": "2026-03-06"}

        async def look() -> Any:
            return expect(await staff.get("/api/orders/summary", params=span))

        found = await eventually(look, what="all orders", until=lambda seen: seen["orders"] == 5)
        assert found["days"][0] == {
            "business_day": "2026-03-02",
            "orders": 3,
            "cancelled": 1,
            "subtotal": 3_000,
            "tax_amount": 300,
            "tip_amount": 50,
            "discount_amount": 20,
            "total": 3_300,
            "paid_orders": 1,
        }
        days = [(day["business_day"], day["total"]) for day in found["days"]]
        assert days == [("2026-03-02", 3_300), ("2026-03-03", 110), ("2026-03-06", 11)]
        assert (found["total"], found["currency"]) == (3_421, "CHF")
        reply = await staff.get("/api/orders/summary", params={"from": "2026-03-03", "to": "2026-03-03"})
        assert [day["total"] for day in expect(reply)["days"]] == [110]
        assert expect(await staff.get("/api/orders/summary", params={"to": "2026-03-03"}))["orders"] == 4

        # Without dates the summary ends today, which is the business day of the new order.
        dish = (await restaurant.dish(price=700))["id"]
        placed = made(await staff.post("/api/orders", json={"items": [{"menu_item_id": dish, "quantity": 1}]}))

        async def today() -> list[dict[str, Any]]:
            return list(expect(await staff.get("/api/orders/summary"))["days"])

        until_today = await eventually(today, what="the day of today", until=lambda seen: bool(seen))
        assert (until_today[-1]["business_day"], until_today[-1]["total"]) == (placed["business_day"], 700)
        for query, field in (
            ({"from": "2026-13-01"}, "from"),
            ({"to": "yesterday"}, "to"),
            ({"from": "2026-03-02", "to": "2026-03-01"}, "from"),
            ({"from": "1999-01-01", "to": "2026-03-01"}, "from"),
            ({"day": "2026-03-01"}, "day"),
        ):
            refused(await staff.get("/api/orders/summary", params=query), 422, "invalid_input", field)


# -- without PostgreSQL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def blind(system: System, restaurant: RestaurantRig) -> AsyncIterator[str]:
    """Yields the URL of a second orders instance that cannot reach PostgreSQL."""
    port, unused_port = find_free(2)
    system.start(
        "orders",
        alias="blind",
        instance=2,
        orders_port=port,
        database_api_url=f"postgresql://ticketrail_api:x@127.0.0.1:{unused_port}/none",
    )
    system.urls["blind"] = f"http://127.0.0.1:{port}"
    try:
        await system.ready("blind")
        yield system.urls["blind"]
    finally:
        await system.stop("blind")
        del system.urls["blind"]


async def test_lists_without_postgres_come_from_the_mirror_and_are_marked_incomplete(
    restaurant: RestaurantRig, bay: str, blind: str
) -> None:
    dish = (await restaurant.dish())["id"]
    async with restaurant.client() as staff:
        body = {"items": [{"menu_item_id": dish, "quantity": 1}]}
        placed = made(await staff.post("/api/orders", json=body))["id"]
        paid = [
            made(await staff.post(f"/api/orders/{placed}/payments", json={"amount": amount, "method": "card"}))[
                "payment"
            ]
            for amount in (300, 200, 100)
        ]

        async def synced() -> bool:
            return bool(expect(await staff.get(f"/api/orders/{placed}"))["sync"]["state"] == "synced")

        await eventually(synced, what="the state `synced`")
    headers = {"Authorization": f"Bearer {restaurant.token}"}
    async with http_client(base_url=blind, headers=headers, timeout=10.0) as admin:
        for resource in RESOURCES:
            one = made(await admin.post(resource.path, json=body_of(resource, bay)))
            reply = await admin.get(resource.path, params={"limit": 1})
            assert [each["id"] for each in expect(reply)] == [one["id"]]
            assert (reply.json()["complete"], reply.headers["x-served-by"]) == (False, "mirror")
        reply = await admin.get("/api/payments", params={"order_id": placed, "limit": 2})
        assert [one["id"] for one in expect(reply)] == [paid[2]["id"], paid[1]["id"]]
        assert reply.json()["complete"] is False
        query = {"order_id": placed, "cursor": reply.json()["pagination"]["next_cursor"]}
        assert [one["id"] for one in expect(await admin.get("/api/payments", params=query))] == [paid[0]["id"]]
        for path in ("/api/orders/summary", "/api/audit"):
            reply = await admin.get(path)
            assert expect(reply, 503)["code"] == "unavailable"
            assert int(reply.headers["retry-after"]) >= 1
