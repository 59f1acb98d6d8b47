"""The sync state of an order as readers see it: pending, synced, failed or conflict. Lists by sync state, and the
request that records an order again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
import redis.asyncio
from msgspec import structs

from shared.entities import order as orders
from shared.mirror import keys
from shared.security.tokens import Identity, Role, Tokens
from tests.rigs.builders import change
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually


@pytest.fixture
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


@pytest.fixture
async def staff(restaurant: RestaurantRig) -> AsyncIterator[httpx.AsyncClient]:
    async with restaurant.client() as client:
        yield client


@asynccontextmanager
async def refusing(system: System, notes: str) -> AsyncIterator[None]:
    """Makes the database refuse orders with these notes for the block."""
    name = f"no_{uuid4().hex}"
    owner = await asyncpg.connect(system.database_url("ticketrail_owner"))
    try:
        await owner.execute(f"alter table orders add constraint {name} check (notes is distinct from '{notes}')")
        yield
    finally:
        await owner.execute(f"alter table orders drop constraint {name}")
        await owner.close()


async def place(restaurant: RestaurantRig, client: httpx.AsyncClient, **fields: Any) -> str:
    dish = await restaurant.dish()
    body = {"items": [{"menu_item_id": dish["id"], "quantity": 1}], **fields}

    async def placed() -> httpx.Response:
        return await client.post("/api/orders", json=body)

    reply = await eventually(placed, what="an accepted order", until=lambda reply: reply.status_code == 201)
    return str(made(reply)["id"])


async def sync_of(client: httpx.AsyncClient, id_: str) -> dict[str, Any]:
    found: dict[str, Any] = expect(await client.get(f"/api/orders/{id_}"))["sync"]
    return found


async def becomes(client: httpx.AsyncClient, id_: str, state: str, *, within: float = 20.0) -> dict[str, Any]:
    return await eventually(
        lambda: sync_of(client, id_), within=within, what=state, until=lambda sync: sync["state"] == state
    )


async def listed(client: httpx.AsyncClient, state: str) -> list[str]:
    return [one["id"] for one in expect(await client.get("/api/orders", params={"sync_state": state}))]


async def test_order_that_postgres_refuses_is_failed_and_can_be_recorded_again_on_request(
    system: System, restaurant: RestaurantRig, staff: httpx.AsyncClient
) -> None:
    notes = f"refused {uuid4()}"
    async with refusing(system, notes):
        good, bad = await place(restaurant, staff), await place(restaurant, staff, notes=notes)
        sync = await becomes(staff, bad, "failed")
        assert sync["error"] and sync["attempts"] >= 1 and sync["last_attempt"]
        await becomes(staff, good, "synced")
        assert await listed(staff, "failed") == [bad]
        assert await listed(staff, "pending") == []
        assert await listed(staff, "synced") == [good]

        async with system.client(token=restaurant.token_of(Role.STAFF), service="sync") as client:
            status = expect(await client.get("/api/ops/sync"))
        assert (status["summary"], status["tables"]["order"]["failed"]) == ("failed", 1)

        async with system.frozen("worker"):
            again = expect(await staff.post(f"/api/orders/{bad}/sync"))
            assert (again["version"], again["sync"]["state"], again["notes"]) == (2, "pending", notes)
            assert await sync_of(staff, bad) == {"state": "pending"}, (
                "the new version shows the failure of the previous one"
            )
        await becomes(staff, bad, "failed")  # PostgreSQL still refuses the order
    assert expect(await staff.post(f"/api/orders/{bad}/sync"))["version"] == 3
    await becomes(staff, bad, "synced")
    assert await listed(staff, "failed") == []
    assert set(await listed(staff, "synced")) == {good, bad}
    assert (await system.stored_orders())[bad] == 3

    untouched = expect(await staff.post(f"/api/orders/{bad}/sync"))
    assert (untouched["version"], untouched["sync"]["state"]) == (3, "synced")
    refused(await staff.post(f"/api/orders/{uuid4()}/sync"), 404, "not_found")


async def test_a_guest_reads_no_error_of_the_database(
    system: System, restaurant: RestaurantRig, staff: httpx.AsyncClient
) -> None:
    notes = f"refused {uuid4()}"
    async with refusing(system, notes), restaurant.client(Role.CUSTOMER, session=f"table-{uuid4()}") as guest:
        id_ = await place(restaurant, guest, notes=notes)
        assert "violates check constraint" in (await becomes(staff, id_, "failed"))["error"]
        for path, params in (
            (f"/api/orders/{id_}", {}),
            ("/api/orders", {}),
            ("/api/orders", {"sync_state": "failed"}),
        ):
            reply = await guest.get(path, params=params)
            shown = expect(reply)
            (order,) = shown if isinstance(shown, list) else [shown]
            assert (order["id"], order["sync"]) == (id_, {"state": "failed"})
            assert "constraint" not in reply.text
    expect(await staff.post(f"/api/orders/{id_}/sync"))
    await becomes(staff, id_, "synced")


async def test_pending_orders_are_listed_in_pages_and_only_by_a_warm_mirror(
    system: System, restaurant: RestaurantRig, staff: httpx.AsyncClient
) -> None:
    first = await place(restaurant, staff)
    await becomes(staff, first, "synced")
    async with system.frozen("worker"):
        placed = [await place(restaurant, staff) for _ in range(3)]
        found: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            reply = await staff.get("/api/orders", params={"sync_state": "pending", "limit": 2, **cursor})
            found += [one["id"] for one in expect(reply)]
            if (after := reply.json()["pagination"]["next_cursor"]) is None:
                break
            cursor = {"cursor": after}
        assert found == placed[::-1]
        assert await listed(staff, "synced") == [first]

        again = expect(await staff.post(f"/api/orders/{placed[0]}/sync"))
        assert (again["version"], again["sync"]["state"]) == (2, "pending")

        async with redis.asyncio.from_url(system.redis.url) as mirror:
            await mirror.rename(keys.WARM, "aside")
            try:
                reply = await staff.get("/api/orders", params={"sync_state": "pending"})
                refused(reply, 503, "unavailable")
                assert int(reply.headers["retry-after"]) > 0
            finally:
                await mirror.rename("aside", keys.WARM)
    for id_ in placed:
        await becomes(staff, id_, "synced")
    assert await listed(staff, "pending") == []
    refused(await staff.get("/api/orders", params={"sync_state": "lost"}), 422, "invalid_input", "sync_state")


async def test_open_conflict_is_shown_from_both_stores_until_it_is_resolved(
    system: System, restaurant: RestaurantRig, staff: httpx.AsyncClient
) -> None:
    other, id_ = await place(restaurant, staff), await place(restaurant, staff)
    await becomes(staff, id_, "synced")
    async with system.database() as connection:
        created = await connection.fetchrow(
            "select change_id::text, (data->'after')::text from changes where entity_id = $1", id_
        )
        assert created is not None
        base, state = created
        before = orders.ENTITY.decode_state(state.encode())
        for notes in ("one side", "the other"):
            after = structs.replace(before, notes=notes)
            await restaurant.publish(change(after, before=before, event="updated", entityversion=2, basechangeid=base))
        assert await becomes(staff, id_, "conflict") == {"state": "conflict"}
        await becomes(staff, other, "synced")
        assert await listed(staff, "conflict") == [id_]
        assert await listed(staff, "synced") == [other]

        # The worker is frozen, because it may not have read both sides yet and would write one to the mirror again.
        async with system.frozen("worker"), redis.asyncio.from_url(system.redis.url) as mirror:
            await mirror.delete(keys.doc(restaurant.id, "order", id_))
            from_postgres = await staff.get(f"/api/orders/{id_}")
            assert from_postgres.headers["x-served-by"] == "postgres"
            assert expect(from_postgres)["sync"] == {"state": "conflict"}

            async def served_by() -> str:
                return (await staff.get(f"/api/orders/{id_}")).headers["x-served-by"]

            await eventually(served_by, what="the order from the mirror again", until=lambda by: by == "mirror")

        await connection.execute("update conflicts set resolved_at = now() where entity_id = $1", id_)
    await becomes(staff, id_, "synced")
    assert await listed(staff, "conflict") == []


async def test_sync_status_has_the_exact_fields_of_the_terminals_contract_and_operators_read_all_of_it(
    system: System, restaurant: RestaurantRig, staff: httpx.AsyncClient
) -> None:
    notes = f"refused {uuid4()}"
    async with refusing(system, notes):
        good, bad = await place(restaurant, staff), await place(restaurant, staff, notes=notes)
        await becomes(staff, bad, "failed")
        await becomes(staff, good, "synced")
        tokens = Tokens(system.env["TICKETRAIL_JWT_SECRET"], ttl_seconds=600)
        operator = tokens.issue(Identity(str(uuid4()), Role.OPERATOR, "", "nadia@ops.example", "a session"))
        async with (
            system.client(token=restaurant.token_of(Role.STAFF), service="sync") as client,
            system.client(token=operator, service="sync") as nadia,
        ):

            async def status() -> dict[str, Any]:
                found: dict[str, Any] = (await client.get("/api/sync/status", params={"terminalId": "T-7"})).json()
                return found

            # The two dishes are written by another lane than the orders.
            found = await eventually(
                status, what="the dishes", until=lambda one: one["tables"]["Product"]["synced"] == 2
            )
            counts = {"pending": 0, "failed": 0, "synced": 0, "conflicts": 0}
            names = ("SaleOrder", "Product", "Table", "Category", "Brand", "Bay", "Job", "Customer", "InventoryItem")
            assert found == {
                "terminalId": "T-7",
                "tables": {
                    **dict.fromkeys(names, counts),
                    "SaleOrder": {**counts, "pending": 1, "failed": 1, "synced": 1},
                    "Product": {**counts, "synced": 2},
                },
                "totals": {**counts, "pending": 1, "failed": 1, "synced": 3},
                "summary": {
                    "totalTables": 9,
                    "tablesWithPending": 1,
                    "tablesWithFailed": 1,
                    "tablesWithSynced": 2,
                    "tablesWithConflicts": 0,
                },
            }
            ours = {"restaurant_id": restaurant.id}
            assert (await nadia.get("/api/sync/status", params=ours)).json() == {**found, "terminalId": None}
            everything = expect(await nadia.get("/api/ops/sync"))
            assert everything["totals"]["failed"] >= 1
            assert everything["totals"]["synced"] > found["totals"]["synced"]
            other = await client.get("/api/ops/sync", params={"restaurant_id": str(uuid4())})
            refused(other, 403, "forbidden", "restaurant_id")
