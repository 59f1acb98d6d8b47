"""Fields that this release does not know are kept on every path that changes an entity, and shown in every reply.

The orders of these tests were recorded by a newer release: the order has `fiscal_id` more, its item `course`, and each
payment `card_brand`.
"""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
from msgspec import Raw, structs

from shared.entities.contract import Change, ChangeData, Lane, encode
from shared.entities.menu_item import ENTITY as MENU_ITEM
from shared.entities.order import Order
from shared.entities.overlay import with_field
from shared.security.tokens import Role
from tests.rigs import builders
from tests.rigs.dead_letters import DEAD_LETTERS, OperatorRig
from tests.rigs.forks import fork
from tests.rigs.http_client import http_client
from tests.rigs.newer_release import NewerOrder, newer_order
from tests.rigs.restaurant import expect
from tests.rigs.system import System, eventually

CONFLICTS = "/api/ops/conflicts"


def recorded_order(restaurant: str, *, fiscal_id: str = "DE-1", **fields: Any) -> NewerOrder:
    chosen = {"restaurant_id": restaurant, "payment_status": "partially_paid", **fields}
    return newer_order(course=2, card_brand="girocard", fiscal_id=fiscal_id, **chosen)


def recorded(state: NewerOrder, *, on: Change | None = None) -> Change:
    """The change of a newer release that leads to `state`."""
    plain = builders.change(msgspec.convert(msgspec.to_builtins(state), Order), base=on)
    return structs.replace(plain, id=builders.new_id(), data=ChangeData(after=Raw(encode(state))))


def newer_fields(order: dict[str, Any]) -> tuple[Any, Any, set[Any]]:
    return order.get("fiscal_id"), order["items"][0].get("course"), {one.get("card_brand") for one in order["payments"]}


async def shown(ops_rig: OperatorRig, id_: str, *, version: int) -> dict[str, Any]:
    """Waits until the API shows this version, or a later one, and PostgreSQL has it; returns what PostgreSQL has."""
    async with ops_rig.restaurant.client() as staff, ops_rig.system.database() as database:

        async def look() -> Any:
            order = expect(await staff.get(f"/api/orders/{id_}"))
            row = await database.fetchrow(
                "select c.version, (c.data->'after')::text as state from orders o"
                " join changes c using (restaurant_id, change_id) where o.id = $1",
                id_,
            )
            return row and (order["version"], row["version"], order, msgspec.json.decode(row["state"]))

        found = await eventually(
            look, what=f"version {version} of the order", until=lambda one: one and one[0] == one[1] >= version
        )
    assert newer_fields(found[2]) == newer_fields(found[3])
    return found[3]


@pytest.fixture
async def order(ops_rig: OperatorRig) -> AsyncIterator[Change]:
    """A recorded order, which every store has."""
    made = recorded(recorded_order(ops_rig.restaurant_id))
    await ops_rig.restaurant.publish(made)
    await shown(ops_rig, made.entity_id, version=1)
    yield made


async def test_every_reply_to_a_write_shows_the_fields(ops_rig: OperatorRig, order: Change) -> None:
    path, payment = f"/api/orders/{order.entity_id}", {"id": str(uuid4()), "amount": 1, "method": "cash"}
    async with ops_rig.restaurant.client(Role.ADMIN) as admin:
        replies = [
            expect(await admin.put(path, json={"notes": "no onions"})),
            expect(await admin.put(path, json={"notes": "no onions"})),
            expect(await admin.delete(path)),
            expect(await admin.post(f"{path}/restore")),
        ]
        assert [newer_fields(reply) for reply in replies] == [("DE-1", 2, {"girocard"})] * len(replies)
        for _ in range(2):  # the second one repeats the first one
            paid = expect(await admin.post(f"{path}/payments", json=payment), 201)
            assert newer_fields(paid) == ("DE-1", 2, {"girocard", None})


async def test_an_order_of_another_system_keeps_the_fields(ops_rig: OperatorRig) -> None:
    token = await ops_rig.restaurant.api_key("sync:write")
    sent = {
        "restaurant_id": ops_rig.restaurant_id,
        "external_id": f"pos-{uuid4().hex}",
        "items": [{"name": "Margherita", "quantity": 1, "unit_price": 980}],
        "payments": [{"id": "1", "amount": 100, "method": "card"}],
    }
    async with http_client(base_url=ops_rig.system.urls["sync"], headers={"x-sync-token": token}) as other:
        made = expect(await other.post("/api/sync/order", json=sent))
        state = await shown(ops_rig, made["id"], version=1)
        newer = {**state, "fiscal_id": "DE-1"}
        newer["items"] = [{**one, "course": 2} for one in state["items"]]
        newer["payments"] = [{**one, "card_brand": "girocard"} for one in state["payments"]]
        async with ops_rig.system.database() as database:
            head = await database.fetchval("select change_id::text from orders where id = $1", made["id"])
        first = structs.replace(builders.change(msgspec.convert(state, Order)), id=head)
        await ops_rig.restaurant.publish(recorded(msgspec.convert(newer, NewerOrder), on=first))
        await shown(ops_rig, made["id"], version=2)
        expect(await other.post("/api/sync/order", json={**sent, "notes": "no onions", "status": "received"}))
    after = await shown(ops_rig, made["id"], version=3)
    assert (after["notes"], after["status"]) == ("no onions", "received")
    assert newer_fields(after) == ("DE-1", 2, {"girocard"})


async def test_a_fork_keeps_the_fields_of_both_payments_and_a_decision_restores_those_of_its_side(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, order: Change
) -> None:
    base = msgspec.json.decode(order.data.after, type=NewerOrder)
    sides = [
        recorded(
            structs.replace(
                base,
                notes=notes,
                fiscal_id=fiscal_id,
                payments=(*base.payments, structs.replace(base.payments[0], id=builders.new_id(), card_brand=brand)),
            ),
            on=order,
        )
        for notes, fiscal_id, brand in (("one", "DE-2", "visa"), ("two", "DE-3", "amex"))
    ]
    winner, loser = fork(*sides)
    await ops_rig.restaurant.publish(loser, winner)
    joined = await shown(ops_rig, order.entity_id, version=3)  # the reconciler adds the payment of the loser
    assert newer_fields(joined)[1:] == (2, {"girocard", "visa", "amex"})
    [conflict] = expect(await nadia.get(CONFLICTS, params={"entity_id": order.entity_id}))
    expect(await nadia.post(f"{CONFLICTS}/{conflict['id']}/resolve", json={"keep": loser.id, "why": "the guest"}))
    decided = await shown(ops_rig, order.entity_id, version=4)
    kept = msgspec.json.decode(loser.data.after)
    assert (decided["notes"], decided["fiscal_id"]) == (kept["notes"], kept["fiscal_id"])
    assert newer_fields(decided)[1:] == (2, {"girocard", "visa", "amex"})


async def test_an_edited_dead_letter_keeps_the_fields(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, order: Change, marker: str
) -> None:
    base = msgspec.json.decode(order.data.after, type=NewerOrder)
    change = recorded(structs.replace(base, notes=marker, fiscal_id="DE-2"), on=order)
    after = with_field(bytes(change.data.after), "total", b"-1")
    await ops_rig.restaurant.publish(structs.replace(change, data=ChangeData(after=Raw(after))))
    [dead] = await ops_rig.dead_letters(1, sinks=2, text=marker)
    path = f"{DEAD_LETTERS}/{dead['id']}"
    event = expect(await nadia.get(path))["event"]
    event["data"]["after"]["total"] = 7
    expect(await nadia.post(f"{path}/edit", json={"revision": dead["revision"], "event": event, "why": "x"}))
    edited = await shown(ops_rig, order.entity_id, version=2)
    assert (edited["total"], newer_fields(edited)) == (7, ("DE-2", 2, {"girocard"}))


async def test_a_discarded_change_restores_the_fields_that_postgres_has(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, order: Change, marker: str
) -> None:
    base = msgspec.json.decode(order.data.after, type=NewerOrder)
    async with ops_rig.refused_orders(marker):
        await ops_rig.restaurant.publish(recorded(structs.replace(base, notes=marker, fiscal_id="DE-2"), on=order))
        [dead] = await ops_rig.dead_letters(1, entity_id=order.entity_id)
        await ops_rig.sync_state(order.entity_id, "failed")
        expect(await nadia.post(f"{DEAD_LETTERS}/{dead['id']}/discard", json={"revision": 1, "why": "a mistake"}))
        after = await shown(ops_rig, order.entity_id, version=3)
    assert (after["notes"], newer_fields(after)) == (None, ("DE-1", 2, {"girocard"}))


async def test_a_dish_that_the_command_line_changes_keeps_the_fields(ops_rig: OperatorRig, system: System) -> None:
    state = builders.menu_item(restaurant_id=ops_rig.restaurant_id)
    plain = builders.change(state)
    after = encode({**msgspec.json.decode(encode(state)), "allergens": ["nuts"]})
    await ops_rig.restaurant.publish(structs.replace(plain, data=ChangeData(after=Raw(after))), lane=Lane.NORMAL)

    async def stored(version: int) -> dict[str, Any]:
        async with system.database() as database:

            async def look() -> Any:
                return await database.fetchval(
                    "select (data->'after')::text from changes where entity_id = $1 and version = $2", state.id, version
                )

            return msgspec.json.decode(await eventually(look, what=f"version {version} of the dish"))

    await stored(1)
    await system.cli("dish", ops_rig.restaurant_id, state.id, "--price", "950")
    changed = await stored(2)
    assert (changed["price"], changed["allergens"]) == (950, ["nuts"])
    assert MENU_ITEM.decode_state(encode(changed)).price == 950
