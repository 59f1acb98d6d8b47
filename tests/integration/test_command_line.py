"""The command line for people: terminals of 80 and 100 columns, prefixes of ids, and order numbers."""

import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from msgspec import structs

from shared.entities import order as orders
from shared.entities.contract import Lane, encode
from shared.rail.journal import Journal
from tests.rigs.builders import change, message, order, payment
from tests.rigs.command_line import in_terminal, ticketrail
from tests.rigs.dead_letters import OperatorRig
from tests.rigs.forks import wait_stored
from tests.rigs.restaurant import RestaurantRig, expect, register_restaurant
from tests.rigs.system import eventually

in_narrow_terminals = pytest.mark.parametrize("columns", [80, 100])


async def printed_json(ops_rig: OperatorRig, *arguments: str) -> Any:
    """Runs a command with --json; returns its JSON."""
    code, out, err = await ops_rig.cli(*arguments, "--json")
    assert code == 0, f"{arguments}: {out}\n{err}"
    return json.loads(out)


async def slug_of(ops_rig: OperatorRig) -> str:
    async with ops_rig.system.database() as connection:
        return str(await connection.fetchval("select slug from restaurants where id = $1", ops_rig.restaurant_id))


async def in_postgres(ops_rig: OperatorRig, order_id: str) -> dict[str, Any]:
    """Waits until `ticketrail orders` lists the order; returns it as listed."""

    async def look() -> Any:
        return await printed_json(ops_rig, "orders", order_id)

    [found] = await eventually(look, what="the order in PostgreSQL", until=bool)
    return dict(found)


async def earlier_order(ops_rig: OperatorRig, number: str, restaurant: RestaurantRig | None = None) -> str:
    """Imports an order of an earlier day with this number; returns its id."""
    async with ops_rig.client() as client:
        body = {
            "restaurant_id": (restaurant or ops_rig.restaurant).id,
            "external_id": f"pos-{number}",
            "order_number": number,
            "created_at": "2026-03-14T12:00:00Z",
            "items": [{"name": "Margherita", "quantity": 1, "unit_price": 980}],
        }
        headers = {"x-sync-token": await (restaurant or ops_rig.restaurant).api_key("sync:write")}
        id_ = str(expect(await client.post("/api/sync/order", json=body, headers=headers))["id"])
    await in_postgres(ops_rig, id_)
    return id_


# -- terminals -----------------------------------------------------------------------------------------------------


@in_narrow_terminals
async def test_dead_letters_keep_their_ids_whole_in_a_narrow_terminal(
    ops_rig: OperatorRig, marker: str, columns: int
) -> None:
    await ops_rig.send_to_dead_queue(
        change(ops_rig.table(label=marker)), place=marker, error=f"KeyError: {'long ' * 40}"
    )
    [dead_letter] = await ops_rig.dead_letters(1, text=marker)
    out = await in_terminal(ops_rig.system, "dlq", "list", "--text", marker, columns=columns)
    assert dead_letter["id"] in out
    assert "KeyError" in out and "…" in out
    assert max(map(len, out.splitlines())) <= columns
    groups = await in_terminal(ops_rig.system, "dlq", "groups", "--text", marker, columns=columns)
    assert dead_letter["fingerprint"] in groups
    assert max(map(len, groups.splitlines())) <= columns


@in_narrow_terminals
async def test_orders_keep_their_ids_whole_in_a_narrow_terminal(ops_rig: OperatorRig, columns: int) -> None:
    placed = await in_postgres(ops_rig, await ops_rig.place())
    out = await in_terminal(ops_rig.system, "orders", "--restaurant", ops_rig.restaurant_id, columns=columns)
    assert placed["id"] in out and placed["order_number"] in out
    assert max(map(len, out.splitlines())) <= columns


@in_narrow_terminals
async def test_conflicts_keep_their_ids_whole_in_a_narrow_terminal(ops_rig: OperatorRig, columns: int) -> None:
    id_ = await ops_rig.place(notes="as it was")
    state, base = await wait_stored(ops_rig.system, orders.ENTITY, id_)
    sides = [
        change(
            structs.replace(state, notes=notes, payments=(payment(amount=100),)),
            event="payment_recorded", before=state, entityversion=2, basechangeid=base,
        )
        for notes in ("no bread", "extra bread")
    ]  # fmt: skip
    await ops_rig.publisher.publish(Lane.CRITICAL.value, message(*sides))

    async def listed() -> Any:
        found = await printed_json(ops_rig, "conflicts", "list", "--restaurant", ops_rig.restaurant_id)
        return [conflict for conflict in found if conflict["entity_id"] == id_]

    [conflict] = await eventually(listed, what="the conflict", until=bool)
    out = await in_terminal(ops_rig.system, "conflicts", "list", "--restaurant", ops_rig.restaurant_id, columns=columns)
    assert conflict["id"] in out and id_ in out
    assert max(map(len, out.splitlines())) <= columns
    shown = await in_terminal(ops_rig.system, "conflicts", "show", conflict["id"], columns=columns)
    for side in sides:
        assert side.id in shown
        assert orders.ENTITY.decode(side).payments[0].id in shown


@in_narrow_terminals
async def test_journal_keeps_its_ids_whole_in_a_narrow_terminal(
    ops_rig: OperatorRig, tmp_path: Path, columns: int
) -> None:
    path = tmp_path / "orders-1.sqlite"
    waiting = change(order(items=1))
    journal = Journal(path, instance=1, max_bytes=1 << 20)
    await journal.open()
    await journal.append([(Lane.CRITICAL, encode(waiting))])
    await journal.close()
    out = await in_terminal(ops_rig.system, "journal", "show", str(path), columns=columns)
    assert waiting.id in out and waiting.subject in out


# -- the demo restaurant -------------------------------------------------------------------------------------------


async def test_a_second_seeding_creates_nothing_and_says_so(ops_rig: OperatorRig) -> None:
    first = await ticketrail(ops_rig.system, "seed")
    again = await ticketrail(ops_rig.system, "seed")
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert again.out.startswith("demo-bistro: 0 created; it has ")


# -- prefixes ------------------------------------------------------------------------------------------------------


async def test_commands_accept_the_prefix_of_an_id(ops_rig: OperatorRig, marker: str) -> None:
    [dead_letter] = await ops_rig.make_dead_letters(marker)
    assert (await printed_json(ops_rig, "dlq", "show", dead_letter["id"][:13]))["dead_letter"] == dead_letter
    assert (await printed_json(ops_rig, "dlq", "discard", dead_letter["id"][:13], "--why", "a test"))[
        "status"
    ] == "discarded"
    assert (await printed_json(ops_rig, "dlq", "restore", dead_letter["id"][:13].replace("-", "")))["status"] == "open"
    replayed = await printed_json(ops_rig, "dlq", "replay", dead_letter["id"][:13], "--yes")
    assert [item["dead_letter_id"] for item in replayed["items"]] == [dead_letter["id"]]
    code, _, err = await ops_rig.dlq("cancel", replayed["job"]["id"][:13])
    assert (code, err) == (1, "Error: this job is done\n")


async def test_ambiguous_prefix_is_refused_and_lists_the_dead_letters(ops_rig: OperatorRig, marker: str) -> None:
    dead_letters = await ops_rig.make_dead_letters(marker, 2)
    shared = dead_letters[0]["id"][:9]
    twin = f"{shared}{dead_letters[1]['id'][9:]}"
    async with ops_rig.system.database() as database:
        await database.execute("update dead_letters set id = $2 where id = $1", dead_letters[1]["id"], twin)
    code, out, err = await ops_rig.dlq("show", shared)
    assert (code, out) == (1, "")
    first, *rest = err.splitlines()
    assert first == f"Error: more than one dead letter has an id that begins with {shared}:"
    assert {line.split()[0] for line in rest} == {dead_letters[0]["id"], twin}
    assert all("open, table v1" in line for line in rest)


@pytest.mark.parametrize("command", ["show", "restore", "replay", "cancel"])
async def test_prefix_without_a_match_is_refused_and_named(ops_rig: OperatorRig, command: str) -> None:
    code, _, err = await ops_rig.dlq(command, "order")
    assert code == 2
    assert "'order' is neither an id nor the beginning of an id" in err
    code, _, err = await ops_rig.dlq(command, "00000000-0000")
    assert code == 1
    assert err.startswith("Error: no ") and err.endswith("has an id that begins with 00000000-0000\n")


async def test_restaurant_is_named_by_its_slug_or_a_prefix_of_its_id(ops_rig: OperatorRig, marker: str) -> None:
    [dead_letter] = await ops_rig.make_dead_letters(marker)
    for name in (await slug_of(ops_rig), ops_rig.restaurant_id[:13], ops_rig.restaurant_id):
        assert await printed_json(ops_rig, "dlq", "list", "--text", marker, "--restaurant", name) == [dead_letter]
    code, _, err = await ops_rig.dlq("list", "--restaurant", "no-such-place")
    assert (code, err) == (1, "Error: no restaurant has the slug no-such-place\n")


async def test_dish_is_named_by_a_prefix_of_its_id(ops_rig: OperatorRig) -> None:
    dish = await ops_rig.restaurant.dish()

    async def stored() -> Any:
        async with ops_rig.system.database() as connection:
            return await connection.fetchval("select true from menu_items where id = $1", dish["id"])

    await eventually(stored, what="the dish in PostgreSQL", until=bool)
    code, out, err = await ops_rig.cli("dish", await slug_of(ops_rig), dish["id"][:13], "--price", "1234")
    assert code == 0, err
    assert json.loads(out)["price"] == 1234


async def test_user_of_a_token_is_named_by_a_prefix_of_its_id(ops_rig: OperatorRig) -> None:
    async with ops_rig.system.database() as connection:
        user = str(await connection.fetchval("select id from users where restaurant_id = $1", ops_rig.restaurant_id))
    code, token, err = await ops_rig.cli("token", "--restaurant", ops_rig.restaurant_id, "--user", user[:13])
    assert code == 0, err
    assert jwt.decode(token.strip(), options={"verify_signature": False})["userId"] == user
    code, _, err = await ops_rig.cli("token", "--restaurant", ops_rig.restaurant_id, "--user", "00000000-0000")
    assert (code, err) == (1, "Error: no user has an id that begins with 00000000-0000\n")


# -- order numbers -------------------------------------------------------------------------------------------------


async def test_order_is_found_by_its_number_with_or_without_leading_zeros(ops_rig: OperatorRig) -> None:
    placed = await in_postgres(ops_rig, await ops_rig.place())
    number = placed["order_number"]
    for text in (number, number.lstrip("0"), placed["id"][:13]):
        assert await printed_json(ops_rig, "orders", text, "--restaurant", ops_rig.restaurant_id) == [placed]


async def test_order_with_the_prefix_of_a_later_mirror_is_found_without_leading_zeros(ops_rig: OperatorRig) -> None:
    id_ = await earlier_order(ops_rig, "ZQ0043")
    for text in ("ZQ0043", "zq43"):
        found = await printed_json(ops_rig, "orders", text, "--restaurant", ops_rig.restaurant_id)
        assert [one["id"] for one in found] == [id_]


async def test_trace_takes_the_newest_order_with_a_number_and_says_so(ops_rig: OperatorRig) -> None:
    placed = await in_postgres(ops_rig, await ops_rig.place())
    number = placed["order_number"]
    await earlier_order(ops_rig, number)
    code, out, err = await ops_rig.cli("trace", number, "--restaurant", await slug_of(ops_rig), "--json")
    assert code == 0, err
    assert json.loads(out)["order_id"] == placed["id"]
    assert f"the newest is {placed['id']}, {number} of {placed['business_day']}" in err
    assert len(await printed_json(ops_rig, "orders", number, "--restaurant", ops_rig.restaurant_id)) == 2


async def test_order_number_of_several_restaurants_is_refused_and_lists_the_orders(
    ops_rig: OperatorRig, marker: str
) -> None:
    number = f"A-{marker[-8:]}"
    ours = await earlier_order(ops_rig, number)
    theirs = await earlier_order(ops_rig, number, await register_restaurant(ops_rig.system))
    code, out, err = await ops_rig.cli("trace", number)
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: several restaurants have an order {number}; choose one with --restaurant:\n")
    assert ours in err and theirs in err
    assert [
        match["id"] for match in await printed_json(ops_rig, "orders", number, "--restaurant", ops_rig.restaurant_id)
    ] == [ours]


async def test_unknown_order_number_is_refused(ops_rig: OperatorRig) -> None:
    code, _, err = await ops_rig.cli("trace", "Z-9999")
    assert code == 1
    assert "no order in PostgreSQL has the number Z-9999" in err
