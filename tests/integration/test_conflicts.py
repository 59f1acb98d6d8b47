"""An operator decides which of two forked changes to keep, over HTTP and on the command line."""

import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from msgspec import Struct, structs

from shared.entities import order as orders
from shared.entities.contract import Change, Lane
from shared.security.tokens import Role
from tests.rigs.builders import change, message, payment
from tests.rigs.dead_letters import OperatorRig
from tests.rigs.forks import fork, wait_stored
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import expect, refused
from tests.rigs.system import eventually

CONFLICTS = "/api/ops/conflicts"


class Forked(Struct):
    order: str
    winner: Change
    loser: Change
    conflict: dict[str, Any]

    def notes(self, side: Change) -> str:
        found: str = orders.ENTITY.decode(side).notes
        return found


Fork = Callable[[], Awaitable[Forked]]


@pytest.fixture
def forked(ops_rig: OperatorRig, nadia: httpx.AsyncClient) -> Fork:
    """Makes an order with two changes that claim version 2: their notes differ, and each has a payment of its own."""

    async def make() -> Forked:
        id_ = await ops_rig.place(notes="as it was")
        state, base = await wait_stored(ops_rig.system, orders.ENTITY, id_)
        sides = [
            change(
                structs.replace(state, notes=notes, payments=(payment(amount=100),)),
                event="payment_recorded", before=state, entityversion=2, basechangeid=base,
            )
            for notes in ("no bread", "extra bread")
        ]  # fmt: skip
        winner, loser = fork(sides[0], sides[1])
        await ops_rig.publisher.publish(Lane.CRITICAL.value, message(loser, winner))

        async def listed() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = expect(await nadia.get(CONFLICTS, params={"entity_id": id_}))
            return found

        [conflict] = await eventually(listed, what="the conflict")
        # A further change brings back the payment of the loser.
        await eventually(lambda: order(ops_rig, id_), what="both payments", until=lambda one: len(one["payments"]) == 2)
        return Forked(id_, winner, loser, conflict)

    return make


async def order(ops_rig: OperatorRig, id_: str) -> dict[str, Any]:
    async with ops_rig.restaurant.client() as staff:
        found: dict[str, Any] = expect(await staff.get(f"/api/orders/{id_}"))
        return found


async def change_order(ops_rig: OperatorRig, id_: str, **fields: Any) -> None:
    async with ops_rig.restaurant.client() as staff:
        expect(await staff.put(f"/api/orders/{id_}", json=fields))


async def open_conflicts(ops_rig: OperatorRig) -> float:
    async with http_client(base_url=ops_rig.system.urls["worker"]) as client:
        text = (await client.get("/metrics")).text
    [line] = [line for line in text.splitlines() if line.startswith("ticketrail_conflicts_open ")]
    return float(line.split()[1])


async def resolve(client: httpx.AsyncClient, made: Forked, keep: Change, why: str = "the guest said so") -> Any:
    return await client.post(f"{CONFLICTS}/{made.conflict['id']}/resolve", json={"keep": keep.id, "why": why})


async def test_conflict_shows_both_sides_and_their_differences(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, forked: Fork
) -> None:
    made = await forked()
    assert (made.conflict["entity"], made.conflict["version"], made.conflict["resolved_at"]) == ("order", 2, None)

    async def look() -> Any:
        return expect(await nadia.get(f"{CONFLICTS}/{made.conflict['id']}"))

    # Version 3 is the change that brought back the payment of the loser.
    seen = await eventually(look, what="the head of version 3", until=lambda found: found["head"]["version"] == 3)
    assert seen["conflict"] == made.conflict
    assert [seen[side]["change_id"] for side in ("winner", "loser")] == [made.winner.id, made.loser.id]
    assert seen["loser"]["state"]["notes"] == made.notes(made.loser)
    notes = {"path": "notes", "winner": made.notes(made.winner), "loser": made.notes(made.loser)}
    assert notes in seen["differs"]
    assert {one["path"].partition("[")[0] for one in seen["differs"]} == {"notes", "payments"}


async def test_admins_see_the_conflicts_of_their_restaurant_and_cannot_resolve_them(
    ops_rig: OperatorRig, forked: Fork
) -> None:
    made = await forked()
    path = f"{CONFLICTS}/{made.conflict['id']}"
    async with ops_rig.client(Role.ADMIN) as ours, ops_rig.client(Role.ADMIN, restaurant=str(uuid4())) as theirs:
        assert made.conflict in expect(await ours.get(CONFLICTS))
        assert expect(await ours.get(path))["conflict"] == made.conflict
        refused(await resolve(ours, made, made.winner), 403, "forbidden")
        assert expect(await theirs.get(CONFLICTS)) == []
        refused(await theirs.get(path), 404, "not_found")


async def test_keeping_the_winner_changes_nothing_and_closes_the_conflict(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, forked: Fork
) -> None:
    made = await forked()
    await ops_rig.sync_state(made.order, "conflict")
    counted = await eventually(lambda: open_conflicts(ops_rig), what="the metric", until=lambda count: count >= 1)
    before = await order(ops_rig, made.order)
    done = expect(await resolve(nadia, made, made.winner))
    assert (done["kept_change_id"], done["resolved_change_id"]) == (made.winner.id, None)
    assert (done["resolved_by"], done["why"]) == ("nadia@ops.example", "the guest said so")
    await ops_rig.sync_state(made.order, "synced")
    await eventually(
        lambda: open_conflicts(ops_rig), what="one conflict less", until=lambda count: count == counted - 1
    )
    after = await order(ops_rig, made.order)
    assert (after["version"], after["notes"]) == (before["version"], made.notes(made.winner))
    assert expect(await nadia.get(CONFLICTS, params={"entity_id": made.order})) == []
    assert expect(await nadia.get(CONFLICTS, params={"entity_id": made.order, "open": "false"})) == [done]
    async with ops_rig.client(name="omar") as omar:
        refused(await resolve(omar, made, made.loser), 409, "conflict_resolved")
    async with ops_rig.system.database() as database:
        acts = await database.fetch(
            "select actor, action, why from audit where target = $1", f"conflict/{made.conflict['id']}"
        )
    assert [tuple(act) for act in acts] == [("nadia@ops.example", "conflict.resolve", "the guest said so")]


async def test_keeping_the_loser_restores_its_fields_and_leaves_later_changes(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, forked: Fork
) -> None:
    made = await forked()
    await change_order(ops_rig, made.order, customer_name="Ada")
    before = await order(ops_rig, made.order)
    done = expect(await resolve(nadia, made, made.loser))
    await ops_rig.sync_state(made.order, "synced")
    after = await order(ops_rig, made.order)
    assert (after["notes"], after["customer_name"]) == (made.notes(made.loser), "Ada")
    assert (after["version"], len(after["payments"])) == (before["version"] + 1, 2)
    assert after["payment_status"] == before["payment_status"]
    assert await ops_rig.written(done["resolved_change_id"]) == 1
    assert done["kept_change_id"] == made.loser.id


async def test_field_that_has_a_third_value_by_now_is_not_overwritten(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, forked: Fork
) -> None:
    made = await forked()
    await change_order(ops_rig, made.order, notes="white bread")
    answer = await resolve(nadia, made, made.loser)
    refused(answer, 409, "changed_since")
    assert answer.json()["error"]["details"]["fields"] == ["notes"]
    assert (await order(ops_rig, made.order))["notes"] == "white bread"
    assert expect(await nadia.get(CONFLICTS, params={"entity_id": made.order})) == [made.conflict]
    await change_order(ops_rig, made.order, notes=made.notes(made.loser))
    before = await order(ops_rig, made.order)
    assert expect(await resolve(nadia, made, made.loser))["resolved_change_id"] is None, (
        "a change was made although the order has the loser's notes already"
    )
    assert (await order(ops_rig, made.order))["version"] == before["version"]


async def test_decision_without_a_side_or_a_reason_is_refused(nadia: httpx.AsyncClient, forked: Fork) -> None:
    made = await forked()
    path = f"{CONFLICTS}/{made.conflict['id']}/resolve"
    keep = made.winner.id
    for body, field in (
        ({"keep": str(uuid4()), "why": "?"}, "keep"),
        ({"keep": "the first", "why": "?"}, "keep"),
        ({"keep": keep}, "why"),
        ({"keep": keep, "why": " "}, "why"),
    ):
        refused(await nadia.post(path, json=body), 422, "invalid_input", field)
    refused(await nadia.post(f"{CONFLICTS}/{uuid4()}/resolve", json={"keep": keep, "why": "?"}), 404, "not_found")
    refused(await nadia.get(f"{CONFLICTS}/{uuid4()}"), 404, "not_found")
    refused(await nadia.get(f"{CONFLICTS}/7"), 422, "invalid_input", "conflict_id")


async def test_conflicts_are_listed_in_pages_newest_first(nadia: httpx.AsyncClient, forked: Fork) -> None:
    made = [await forked() for _ in range(3)]
    restaurant = made[0].conflict["restaurant_id"]
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        answer = await nadia.get(CONFLICTS, params={"restaurant_id": restaurant, "limit": 2, **cursor})
        found += [one["id"] for one in expect(answer)]
        if (following := answer.json()["pagination"]["next_cursor"]) is None:
            break
        cursor = {"cursor": following}
    assert found[:3] == [one.conflict["id"] for one in made[::-1]]
    assert len(set(found)) == len(found)


async def test_command_line_lists_shows_and_resolves_conflicts(ops_rig: OperatorRig, forked: Fork) -> None:
    made = await forked()
    id_ = made.conflict["id"]
    code, out, err = await ops_rig.cli("conflicts", "list", "--restaurant", ops_rig.restaurant_id)
    assert (code, err) == (0, "")
    assert id_ in out
    code, out, _ = await ops_rig.cli("conflicts", "list", "--restaurant", ops_rig.restaurant_id, "--json")
    assert id_ in {one["id"] for one in json.loads(out)}

    code, out, _ = await ops_rig.cli("conflicts", "show", id_)
    assert code == 0
    assert f"winner: {made.winner.id}" in out
    assert f"loser:  {made.loser.id}" in out
    assert '"no bread"' in out and '"extra bread"' in out

    code, out, err = await ops_rig.cli("conflicts", "resolve", id_, "--keep", str(uuid4()), "--why", "?")
    assert (code, out, err) == (1, "", "Error: keep: must be the id of one of the two changes\n")
    code, out, _ = await ops_rig.cli("conflicts", "resolve", id_, "--keep", made.loser.id, "--why", "the guest said so")
    assert code == 0
    assert out.startswith(f"resolved: change {made.loser.id} is kept, enforced by change ")
    await eventually(
        lambda: order(ops_rig, made.order),
        what="the notes of the loser",
        until=lambda one: one["notes"] == made.notes(made.loser),
    )
    code, out, err = await ops_rig.cli("conflicts", "resolve", id_, "--keep", made.winner.id, "--why", "no")
    assert (code, out, err) == (1, "", "Error: cli/nadia has already decided this conflict\n")
    code, out, _ = await ops_rig.cli("conflicts", "list", "--restaurant", ops_rig.restaurant_id, "--all", "--json")
    [decided] = [one for one in json.loads(out) if one["id"] == id_]
    assert decided["resolved_by"] == "cli/nadia"
