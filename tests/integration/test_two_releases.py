"""The previous release runs as services, beside a newer one in the process of the test, on the same servers.

The newer release is this one with an optional field more in an order, its items and its payments, and with a second
major version of tables (tests/rigs/newer_release.py).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aio_pika
import msgspec
import pytest
from msgspec import Raw, structs

from shared.entities.contract import ChangeData, Lane, decode_change, encode, split_batch
from shared.entities.table import DiningTable
from shared.messaging import topology
from shared.mirror.claim_replies import Claimed
from tests.rigs import builders
from tests.rigs.newer_release import NEWER_ORDER, WRITES_V2, newer_order, registered
from tests.rigs.postgres_writer import Rig
from tests.rigs.previous_release import previous_release
from tests.rigs.rail.changes import draft
from tests.rigs.rail.instance import RailRig
from tests.rigs.rail.mirror_server import MirrorServer
from tests.rigs.replays import create_job, wait_ended
from tests.rigs.restaurant import expect
from tests.rigs.servers import Servers
from tests.rigs.system import PATIENT, System, eventually, settings_of
from tests.rigs.tree_copy import copy_tree, edit_lines

COURSE, CARD_BRAND, FISCAL_ID = 2, "girocard", "DE-4711"


@pytest.fixture(scope="module")
async def old(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """The services of the previous release, on the schema of this one: `migrate` is the first step of an upgrade."""
    tree = await asyncio.to_thread(previous_release, tmp_path_factory.mktemp("previous-release"))
    own_redis = await asyncio.to_thread(servers.extra_redis)
    system = System(servers, tmp_path_factory.mktemp("home"), redis=own_redis, **PATIENT)
    try:
        await system.cli("migrate")
        system.root = tree
        await system.start_and_seed("orders", "worker")
        yield system
    finally:
        await system.down()
        await asyncio.to_thread(own_redis.discard)


@pytest.fixture(scope="module")
def newer_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree in which the request for an order has an optional field more."""
    tree = copy_tree(tmp_path_factory.mktemp("newer-release") / "clone")
    field = "     special_instructions: Text | None = None\n"
    edit_lines(
        tree / "services/orders/requests.py", f"{field}+    covers: int | None = None\n \n \n class UpdateOrder(Struct"
    )
    return tree


@pytest.fixture
async def new(old: System) -> AsyncIterator[RailRig]:
    settings = settings_of(old)
    with registered(NEWER_ORDER):
        rig = RailRig(settings, MirrorServer(settings.redis_url), restaurant=old.restaurant_id)
        await rig.up()
        yield rig
        await rig.down()


@pytest.fixture
async def published(old: System) -> AsyncIterator[Callable[[str, int], Awaitable[list[bytes]]]]:
    """Yields a function that waits until so many events of an entity are published to its lane, and returns them."""
    seen: list[bytes] = []
    async with await aio_pika.connect(old.rabbitmq_url, timeout=10) as connection:
        queue = await (await connection.channel()).declare_queue(exclusive=True)
        await queue.bind(topology.CHANGES, Lane.CRITICAL.value)

        async def of(id_: str, at_least: int) -> list[bytes]:
            async def look() -> list[bytes]:
                while message := await queue.get(fail=False, no_ack=True):
                    seen.extend(split_batch(message.body))
                return [event for event in seen if f'"order/{id_}"'.encode() in event]

            return await eventually(look, what=f"{at_least} events", until=lambda found: len(found) >= at_least)

        yield of


def fields_of(state: bytes | str | dict[str, Any]) -> tuple[Any, Any, Any]:
    """The fields of the newer release in an encoded order."""
    order = state if isinstance(state, dict) else msgspec.json.decode(state)
    return order["items"][0].get("course"), order["payments"][0].get("card_brand"), order.get("fiscal_id")


ALL_FIELDS = (COURSE, CARD_BRAND, FISCAL_ID)


def of_newer_release(restaurant: str, **fields: Any) -> Any:
    chosen = {"order_number": "", "restaurant_id": restaurant, "payment_status": "partially_paid", **fields}
    return newer_order(course=COURSE, card_brand=CARD_BRAND, fiscal_id=FISCAL_ID, **chosen)


async def stored(system: System, id_: str, count: int) -> list[dict[str, Any]]:
    """Waits until PostgreSQL has `count` changes of an entity; returns their `data` by version."""
    async with system.database() as connection:

        async def look() -> Any:
            return await connection.fetch(
                "select data::text as data from changes where entity_id = $1 order by version", id_
            )

        rows = await eventually(look, what=f"{count} changes", until=lambda found: len(found) == count)
    return [msgspec.json.decode(row["data"]) for row in rows]


async def test_fields_of_the_newer_release_stay_when_the_older_one_changes_the_order(
    old: System, new: RailRig, published: Callable[[str, int], Awaitable[list[bytes]]]
) -> None:
    made = await new.rail.commit(draft(NEWER_ORDER, of_newer_release(old.restaurant_id)))
    path = f"/api/orders/{made.state.id}"
    async with old.client("admin") as admin:
        changed = [
            expect(await admin.put(path, json={"notes": "no onions"})),
            expect(await admin.put(path, json={"status": "received", "table_id": builders.new_id()})),
            expect(await admin.post(f"{path}/payments", json={"amount": 1, "method": "cash"}), 201),
            expect(await admin.put(path, json={"table_id": None})),
            expect(await admin.delete(path)),
            expect(await admin.post(f"{path}/restore")),
        ]
        shown = expect(await admin.get(path))
    # Each reply shows them, and every store has them.
    assert [fields_of(state) for state in (*changed, shown)] == [ALL_FIELDS] * (len(changed) + 1)
    _, (document,) = await new.mirror.read(old.restaurant_id, "order", [made.state.id])
    assert document is not None and fields_of(document.state) == ALL_FIELDS
    changes = await stored(old, made.state.id, 1 + len(changed))
    assert [fields_of(data["after"]) for data in changes] == [ALL_FIELDS] * len(changes)
    events = [decode_change(event) for event in await published(made.state.id, len(changes))]
    assert [fields_of(bytes(event.data.after)) for event in events] == [ALL_FIELDS] * len(changes)
    # The change had its effect: no cleared value stays, and `before` names no field that did not change.
    assert (shown["notes"], shown["status"], shown["table_id"], shown["deleted_at"]) == (
        "no onions",
        "received",
        None,
        None,
    )
    assert len(shown["payments"]) == 2
    assert set(changes[1]["before"]) == {"notes", "updated_at"}
    assert fields_of({**shown, **changes[3]["before"]}) == ALL_FIELDS


async def test_a_change_id_has_one_content_if_the_older_release_finishes_a_claim_of_the_newer_one(
    old: System, new: RailRig, published: Callable[[str, int], Awaitable[list[bytes]]]
) -> None:
    change, reply = await new.claim(draft(NEWER_ORDER, of_newer_release(old.restaurant_id)))
    assert isinstance(reply, Claimed) and reply.number
    await published(change.entity_id, 1)  # the reconciler of the older release finishes the stale claim
    await new.record(change)  # the owner was stalled and records the change now
    events = await published(change.entity_id, 2)
    assert set(events) == {encode(change)}
    [data] = await stored(old, change.entity_id, 1)
    assert (fields_of(data["after"]), data["after"]["order_number"]) == (ALL_FIELDS, reply.number)
    _, (document,) = await new.mirror.read(old.restaurant_id, "order", [change.entity_id])
    assert document is not None and document.state == bytes(change.data.after)


async def test_the_newer_release_changes_an_entity_that_the_older_one_has_changed(old: System, new: RailRig) -> None:
    made = await new.rail.commit(draft(NEWER_ORDER, of_newer_release(old.restaurant_id)))
    async with old.client() as staff:
        expect(await staff.put(f"/api/orders/{made.state.id}", json={"notes": "no onions"}))
    head, state = await new.read(made.state.id, NEWER_ORDER) or pytest.fail("the mirror lacks the order")
    assert (state.fiscal_id, state.notes) == (FISCAL_ID, "no onions")
    await new.put(NEWER_ORDER, structs.replace(state, fiscal_id=None), (head, state))
    assert (await stored(old, made.state.id, 3))[-1]["after"]["fiscal_id"] is None


async def test_a_newer_major_version_becomes_a_dead_letter_and_is_replayed_after_the_upgrade(
    old: System,
) -> None:
    state = DiningTable(
        id=builders.new_id(),
        restaurant_id=old.restaurant_id,
        label="Window 4",
        seats=4,
        created_at=builders.CREATED_AT,
        updated_at=builders.CREATED_AT,
    )
    made = builders.change(state)
    with registered(WRITES_V2):
        after = WRITES_V2.upcast(encode(state))
        change = structs.replace(made, type=WRITES_V2.type("created"), data=ChangeData(after=Raw(after)))
        rig = Rig(settings_of(old))
        await rig.up()
        try:
            await rig.publish(change, lane=Lane.NORMAL)
            dead = await eventually(
                lambda: rig.dead_letters(1, change_id=change.id),
                what="a dead letter of both sinks",
                until=lambda found: len(found[0].sinks) == 2,
            )
            assert {one.reason for one in dead} == {"unsupported_version"}
            assert [split_batch(one.body) for one in dead] == [[encode(change)]]

            await old.stop("worker")  # the worker is the first service that is replaced
            await rig.writer.start()
            rig.replays.start()
            job = await wait_ended(rig, await create_job(rig))
            await rig.written(change)
            assert job.outcomes == {"resolved": 1}
            row = await rig.database.fetchrow("select seats, version from tables where id = $1", state.id)
            assert tuple(row) == (4, 1)
            _, (document,) = await rig.mirror.read(old.restaurant_id, "table", [state.id])
            assert document is not None and document.state == after
        finally:
            await rig.down()
    old.start("worker")
    await old.ready("worker")


@pytest.mark.parametrize("first", ["orders", "newer"])
async def test_a_request_that_one_release_answered_is_recognised_by_the_other_one(
    old: System, newer_tree: Path, first: str
) -> None:
    """The request has one optional field more in the newer release; the repeated body does not name it."""
    previous, old.root = old.root, newer_tree
    try:
        async with old.another_orders("newer"):
            body, key = old.order_body(notes="no onions"), builders.new_id()
            replies = []
            for service in (first, "newer" if first == "orders" else "orders"):
                async with old.client(service=service) as staff:
                    replies.append(await staff.post("/api/orders", json=body, headers={"Idempotency-Key": key}))
            assert [reply.status_code for reply in replies] == [201, 201], replies[1].text
            made, repeated = (expect(reply, reply.status_code) for reply in replies)
            assert replies[1].headers["Idempotency-Replayed"] == "true"
            assert (repeated["id"], repeated["order_number"]) == (made["id"], made["order_number"])
            await stored(old, made["id"], 1)
    finally:
        old.root = previous
