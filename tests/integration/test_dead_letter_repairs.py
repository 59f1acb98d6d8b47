"""Operators repair dead letters over HTTP: replay, edit, discard, restore; also the queues and the ledger."""

import asyncio
from datetime import datetime
from typing import Any
from urllib.error import HTTPError
from uuid import uuid4

import aio_pika
import httpx
import pytest
from aiormq.exceptions import ChannelAccessRefused

from services.sync.ledger.report_shapes import PLACES
from shared.entities.contract import Lane, encode
from shared.messaging import management, topology
from tests.rigs.builders import change, message, order
from tests.rigs.dead_letters import DEAD_LETTERS, JOBS, OperatorRig, details_of
from tests.rigs.restaurant import expect, refused
from tests.rigs.system import System, eventually

# -- replaying -------------------------------------------------------------------------------------------------------


async def replay(nadia: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = expect(await nadia.post(f"{DEAD_LETTERS}/replay", json=body), 202)
    return found


async def test_order_that_postgres_refused_is_synced_after_its_replay(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    async with ops_rig.refused_orders(marker) as allow:
        placed = await ops_rig.place(notes=marker)
        await ops_rig.sync_state(placed, "failed")
        [dead_letter] = await ops_rig.dead_letters(1, entity_id=placed)
        assert (dead_letter["reason"], dead_letter["entity_id"]) == ("refused_by_postgres", placed)
        planned = await replay(nadia, ids=[dead_letter["id"]], dry_run=True)
        assert (await ops_rig.ended(planned["job"]))["outcomes"] == {"would_fail": 1}
        await allow()
        planned = await replay(nadia, ids=[dead_letter["id"]], why="allowed again")
    assert planned["plan"]["total"] == 1
    assert planned["plan"]["queues"] == {topology.lane_queue(Lane.CRITICAL): 1}
    job = await ops_rig.ended(planned["job"])
    assert (job["state"], job["outcomes"]) == ("done", {"resolved": 1})
    await ops_rig.sync_state(placed, "synced")
    shown = await details_of(nadia, dead_letter)
    assert (shown["dead_letter"]["status"], shown["dead_letter"]["deaths"]) == ("resolved", 1)
    assert [(one["job"]["kind"], one["item"]["outcome"]) for one in shown["replays"]] == [
        ("replay", "resolved"),
        ("dry_run", "would_fail"),
    ]


@pytest.mark.parametrize("way", ["ids", "fingerprint", "filter"])
async def test_dead_letters_are_replayed_by_ids_by_fingerprint_and_by_filter(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str, way: str
) -> None:
    made = [change(ops_rig.table(label=marker)) for _ in range(3)]
    await ops_rig.send_to_dead_queue(*made, place=marker)
    other = change(ops_rig.table(label=f"other {marker}"))
    await ops_rig.send_to_dead_queue(other, place=f"{marker}:other")
    dead_letters = await ops_rig.dead_letters(4, text=marker)
    selection: dict[str, Any] = {
        "ids": {"ids": [dead_letter["id"] for dead_letter in dead_letters[:3]]},
        "fingerprint": {"fingerprint": dead_letters[0]["fingerprint"]},
        "filter": {"text": f'"{marker}"', "entity": "table", "from": dead_letters[0]["first_failed_at"]},
    }[way]
    planned = await replay(nadia, canary=False, per_second=1_000, **selection)
    assert planned["plan"]["queues"] == {topology.lane_queue(Lane.NORMAL): 3}
    assert planned["plan"]["fingerprints"] == {dead_letters[0]["fingerprint"]: 3}
    assert (planned["job"]["total"], planned["job"]["actor"]) == (3, "nadia@ops.example")
    job = await ops_rig.ended(planned["job"])
    assert (job["state"], job["outcomes"]) == ("done", {"resolved": 3})
    items = expect(await nadia.get(f"{JOBS}/{job['id']}/items", params={"outcome": "resolved"}))
    assert [item["dead_letter_id"] for item in items] == [dead_letter["id"] for dead_letter in dead_letters[:3]]
    assert await ops_rig.written(*(one.id for one in made)) == 3
    assert await ops_rig.written(other.id) == 0
    [untouched] = await ops_rig.dead_letters(1, text=marker, status="open")
    assert untouched == dead_letters[3]


async def test_dry_run_reports_outcomes_and_changes_nothing(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    good = change(ops_rig.table(label=marker))
    broken = encode(change(ops_rig.table(label=marker))).replace(b'"seats":4', b'"seats":0')
    await ops_rig.send_to_dead_queue(good, message(broken))
    dead_letters = await ops_rig.dead_letters(2, text=marker)
    planned = await replay(nadia, text=marker, dry_run=True)
    assert (planned["plan"]["total"], planned["job"]["kind"]) == (2, "dry_run")
    job = await ops_rig.ended(planned["job"])
    assert (job["state"], job["outcomes"]) == ("done", {"would_write": 1, "would_fail": 1})
    first, second = expect(await nadia.get(f"{JOBS}/{job['id']}/items"))
    assert (first["outcome"], first["detail"]) == ("would_write", "version 1")
    assert second["detail"].startswith("contract_broken: BrokenContract: data.after: Expected `int` >= 1")
    assert await ops_rig.dead_letters(2, text=marker) == dead_letters
    assert await ops_rig.written(good.id) == 0


async def test_cancelled_replay_leaves_the_remaining_dead_letters_open(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    await ops_rig.make_dead_letters(marker, 4)
    planned = await replay(nadia, text=marker, per_second=0.001, canary=False)
    cancelled = expect(await nadia.post(f"{JOBS}/{planned['job']['id']}/cancel"))
    assert cancelled["cancel_requested"] is True
    job = await ops_rig.ended(cancelled)
    assert job["state"] == "cancelled"
    assert job["outcomes"]["waiting"] >= 3, "more replays were sent than one in 1,000 seconds"
    still_open = await ops_rig.dead_letters(job["outcomes"]["waiting"], text=marker, status="open")
    assert {dead_letter["revision"] for dead_letter in still_open} == {1}
    refused(await nadia.post(f"{JOBS}/{job['id']}/cancel"), 409, "job_ended")
    refused(await nadia.post(f"{JOBS}/{uuid4()}/cancel"), 404, "not_found")
    refused(await nadia.get(f"{JOBS}/{uuid4()}"), 404, "not_found")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "ids"),
        ({"dry_run": True}, "ids"),
        ({"ids": ["7"]}, "ids[0]"),
        ({"status": "dead"}, "status"),
        ({"text": "a\0b"}, "text"),
        ({"from": "2026-03-14T12:00:00"}, "from"),
        ({"from": "0001-01-01T00:00:00+14:00"}, "from"),
        ({"text": "x", "per_second": 0}, "per_second"),
        ({"texxt": "x"}, "texxt"),
    ],
    ids=["nothing", "nothing-dry", "id", "status", "nul", "no-zone", "no-such-time", "rate", "unknown"],
)
async def test_invalid_replay_request_is_refused_with_the_name_of_the_field(
    nadia: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    assert expect(await nadia.post(f"{DEAD_LETTERS}/replay", json=body), 422)["details"]["field"] == field


async def test_replay_by_ids_lists_unknown_ids_and_is_refused_when_all_are_unknown(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    [dead_letter] = await ops_rig.make_dead_letters(marker)
    unknown = [str(uuid4()), str(uuid4())]
    refused(await nadia.post(f"{DEAD_LETTERS}/replay", json={"ids": unknown}), 404, "not_found")
    planned = await replay(nadia, ids=[unknown[0], dead_letter["id"], unknown[1]])
    assert (planned["plan"]["total"], planned["plan"]["absent"], planned["job"]["total"]) == (1, unknown, 1)
    assert (await ops_rig.ended(planned["job"]))["outcomes"] == {"resolved": 1}
    refused(await nadia.post(f"{DEAD_LETTERS}/replay", json={"ids": [dead_letter["id"]]}), 409, "dead_letter_not_open")


async def test_replay_of_a_filter_without_matches_is_done_at_once_and_says_so(
    nadia: httpx.AsyncClient, marker: str
) -> None:
    planned = await replay(nadia, text=marker)
    assert planned["plan"] == {"total": 0, "queues": {}, "fingerprints": {}, "absent": []}
    assert (planned["job"]["state"], planned["job"]["message"]) == ("done", "no open dead letter matches")


# -- edit and discard --------------------------------------------------------------------------------------------------


async def contract_breaker(ops_rig: OperatorRig, marker: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes a dead letter of a table without seats; returns (the dead letter, its event)."""
    body = encode(change(ops_rig.table(label=marker))).replace(b'"seats":4', b'"seats":0')
    await ops_rig.send_to_dead_queue(message(body), reason="contract_broken")
    [dead_letter] = await ops_rig.dead_letters(1, text=marker)
    async with ops_rig.client() as client:
        return dead_letter, (await details_of(client, dead_letter))["event"]


def with_after(event: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**event, "data": {**event["data"], "after": {**event["data"]["after"], "seats": 4, **fields}}}


def with_seats(event: dict[str, Any], seats: Any) -> dict[str, Any]:
    return {**event, "data": {**event["data"], "after": {**event["data"]["after"], "seats": seats}}}


async def test_edit_makes_a_new_change_and_the_dead_letter_keeps_its_original_event(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    dead_letter, event = await contract_breaker(ops_rig, marker)
    body = {"revision": 1, "event": with_seats(event, 6), "why": "it has six"}
    edited = expect(await nadia.post(f"{DEAD_LETTERS}/{dead_letter['id']}/edit", json=body))
    assert (edited["status"], edited["revision"]) == ("resolved", 2)
    assert edited["replaced_by"] not in (None, dead_letter["change_id"])
    await eventually(lambda: ops_rig.written(edited["replaced_by"]), what="the new change written")
    assert await ops_rig.written(dead_letter["change_id"]) == 0
    async with ops_rig.restaurant.client() as staff:
        table = expect(await staff.get(f"/api/tables/{dead_letter['entity_id']}"))
    assert (table["seats"], table["label"], table["version"]) == (6, marker, 1)
    shown = await details_of(nadia, dead_letter)
    assert shown["event"] == event, "the dead letter does not show the event as it was received"
    [edit] = shown["edits"]
    assert edit["difference"] == [{"path": "data.after.seats", "before": 0, "after": 6}]
    assert (edit["actor"], edit["why"], edit["change_id"]) == (
        "nadia@ops.example",
        "it has six",
        edited["replaced_by"],
    )
    assert edit["event"] == body["event"]
    [act] = shown["actions"]
    assert (act["action"], act["actor"], act["role"]) == ("dead_letter.edit", "nadia@ops.example", "operator")


@pytest.mark.parametrize(
    ("wrong", "field", "code"),
    [
        (lambda event: with_seats(event, -1), "event.data.after.seats", "contract_broken"),
        (lambda event: with_seats(event, "six"), "event.data.after.seats", "contract_broken"),
        (lambda event: with_after(event, id="x"), "event.data.after.id", "contract_broken"),
        (lambda event: with_after(event, state="closed"), "event.data.after.state", "contract_broken"),
        (lambda event: {**event, "data": {}}, "event.data", "invalid_input"),
        (lambda event: {**event, "type": "ticketrail.table.eaten.v1"}, "event.type", "unknown_type"),
        (lambda event: {**event, "tenant": "x"}, "event.tenant", "invalid_input"),
        (lambda event: {**event, "subject": f"table/{uuid4()}"}, "event.subject", "locked"),
        (lambda event: {**event, "restaurantid": str(uuid4())}, "event.restaurantid", "locked"),
        (lambda event: {name: event[name] for name in event if name != "type"}, "event.type", "invalid_input"),
    ],
    ids=["too-few", "text", "id", "state", "no-after", "type", "unknown", "subject", "restaurant", "missing"],
)
async def test_invalid_edit_is_refused_with_the_name_of_the_field(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str, wrong: Any, field: str, code: str
) -> None:
    dead_letter, event = await contract_breaker(ops_rig, marker)
    body = {"revision": 1, "event": wrong(event)}
    reply = await nadia.post(f"{DEAD_LETTERS}/{dead_letter['id']}/edit", json=body)
    details = refused(reply, 422, code, field)
    assert not any(word in reply.json()["error"]["message"] for word in ("regex", "$", "data.after:"))
    if field.endswith(".state"):
        assert "occupied" in details["allowed"]
    assert await ops_rig.dead_letters(1, text=marker) == [dead_letter]


async def test_second_of_two_operators_who_edit_one_dead_letter_gets_a_conflict(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    dead_letter, event = await contract_breaker(ops_rig, marker)
    path = f"{DEAD_LETTERS}/{dead_letter['id']}/edit"
    async with ops_rig.client(name="omar") as omar:
        replies = await asyncio.gather(
            nadia.post(path, json={"revision": 1, "event": with_seats(event, 2)}),
            omar.post(path, json={"revision": 1, "event": with_seats(event, 8)}),
        )
    assert sorted(reply.status_code for reply in replies) == [200, 409]
    [late] = [reply for reply in replies if reply.status_code == 409]
    assert refused(late, 409, "dead_letter_changed")["revision"] == 2
    assert len((await details_of(nadia, dead_letter))["edits"]) == 1


async def test_discard_and_restore_are_audited_and_an_old_revision_is_refused(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    dead_letter, event = await contract_breaker(ops_rig, marker)
    path = f"{DEAD_LETTERS}/{dead_letter['id']}"
    for without in ({}, {"why": ""}, {"why": "  "}):
        refused(await nadia.post(f"{path}/discard", json={"revision": 1, **without}), 422, "invalid_input", "why")
    gone = expect(await nadia.post(f"{path}/discard", json={"revision": 1, "why": "a test of the terminal"}))
    assert (gone["status"], gone["why"], gone["revision"]) == ("discarded", "a test of the terminal", 2)
    assert gone["replaced_by"] is None, "a change that no reader has seen was replaced"
    async with ops_rig.client(name="omar") as omar:
        for act in ("edit", "discard"):
            body = {"revision": 1, "why": "me too"} | ({"event": with_seats(event, 2)} if act == "edit" else {})
            refused(await omar.post(f"{path}/{act}", json=body), 409, "dead_letter_changed")
            refused(await omar.post(f"{path}/{act}", json={**body, "revision": 2}), 409, "dead_letter_not_open")
        refused(
            await omar.post(f"{DEAD_LETTERS}/replay", json={"ids": [dead_letter["id"]]}), 409, "dead_letter_not_open"
        )
        back = expect(await omar.post(f"{path}/restore", json={"revision": 2, "why": "it was none"}))
        refused(await omar.post(f"{path}/restore", json={"revision": 3}), 409, "dead_letter_not_discarded")
    assert (back["status"], back["why"], back["closed_at"]) == ("open", None, None)
    acts = (await details_of(nadia, dead_letter))["actions"]
    assert [(act["action"], act["actor"], act["why"]) for act in acts] == [
        ("dead_letter.restore", "omar@ops.example", "it was none"),
        ("dead_letter.discard", "nadia@ops.example", "a test of the terminal"),
    ]
    assert all(
        act["restaurant_id"] == ops_rig.restaurant_id and ops_rig.since < datetime.fromisoformat(act["at"])
        for act in acts
    )
    for act in ("edit", "discard", "restore"):
        body = {"revision": 1, "why": "?"} | ({"event": event} if act == "edit" else {})
        refused(await nadia.post(f"{DEAD_LETTERS}/{uuid4()}/{act}", json=body), 404, "not_found")


async def test_discard_of_an_order_that_readers_saw_deletes_the_order(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    async with ops_rig.refused_orders(marker):
        placed = await ops_rig.place(notes=marker)
        await ops_rig.sync_state(placed, "failed")
        [dead_letter] = await ops_rig.dead_letters(1, entity_id=placed)
        body = {"revision": dead_letter["revision"], "why": "never cooked"}
        gone = expect(await nadia.post(f"{DEAD_LETTERS}/{dead_letter['id']}/discard", json=body))
    assert gone["replaced_by"] not in (None, dead_letter["change_id"])
    async with ops_rig.restaurant.client() as staff:
        refused(await staff.get(f"/api/orders/{placed}"), 404, "order_deleted")


# -- queues and the ledger -------------------------------------------------------------------------------------------


async def test_queue_depths_come_from_the_management_api_and_without_it_from_the_broker(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient
) -> None:
    names = [topology.MIRROR_DEAD, *(of(lane) for lane in Lane for of in (topology.lane_queue, topology.dead_queue))]

    def has_all_counts(reply: dict[str, Any]) -> bool:
        queues = {queue["name"]: queue for queue in reply["queues"]}
        return all(isinstance(queues[name]["depth"], int) for name in names) and all(
            queues[topology.lane_queue(lane)]["consumers"] for lane in Lane
        )

    async def look() -> dict[str, Any]:
        found: dict[str, Any] = expect(await nadia.get("/api/ops/queues"))
        return found

    # The management API counts every few seconds, so it has no figures for a new queue. When it takes more than
    # three seconds to answer, the route asks the broker instead.
    counted = await eventually(
        look,
        what="a count of every queue",
        until=lambda reply: reply["source"] == "management" and has_all_counts(reply),
    )
    assert counted["unavailable"] == []
    assert set(counted["heartbeat_age_seconds"]) == {lane.value for lane in Lane}
    wrong = "http://nobody:wrong@127.0.0.1:9"
    async with ops_rig.another_api(rabbitmq_watcher_url=wrong) as url, ops_rig.client(url=url) as client:
        without_management = expect(await client.get("/api/ops/queues"))
    assert (without_management["source"], without_management["unavailable"]) == ("broker", ["management"])
    assert has_all_counts(without_management)
    assert {queue["name"] for queue in counted["queues"]} == {queue["name"] for queue in without_management["queues"]}


async def test_queue_watcher_account_may_read_depths_and_nothing_else(system: System) -> None:
    watcher, lane = system.env["TICKETRAIL_RABBITMQ_WATCHER_URL"], topology.lane_queue(Lane.NORMAL)
    queues = f"/api/queues/{system.name}"
    assert await asyncio.to_thread(management.ask, watcher, "GET", f"{queues}/{lane}?columns=name") == {"name": lane}
    calls: tuple[tuple[str, str, object], ...] = (
        ("PUT", f"{queues}/its-own", {"durable": True}),
        ("DELETE", f"{queues}/{lane}", None),
        ("DELETE", f"{queues}/{lane}/contents", None),
    )
    for method, path, body in calls:
        with pytest.raises(HTTPError) as denied:
            await asyncio.to_thread(management.ask, watcher, method, path, body)
        assert denied.value.code in (401, 403), f"{method} {path}"
    credentials = watcher.partition("://")[2].rpartition("@")[0]
    scheme, _, rest = system.rabbitmq_url.partition("://")
    connection = await aio_pika.connect(f"{scheme}://{credentials}@{rest.rpartition('@')[2]}", timeout=10)
    async with connection:
        with pytest.raises(ChannelAccessRefused):
            await (await connection.channel()).declare_queue("its-own")
        with pytest.raises(ChannelAccessRefused):
            await (await (await connection.channel()).get_queue(lane, ensure=False)).get(fail=False)
        exchange = await (await connection.channel()).get_exchange(topology.CHANGES, ensure=False)
        with pytest.raises(ChannelAccessRefused):
            await exchange.publish(aio_pika.Message(b"[]"), Lane.NORMAL.value)


async def test_bulk_discard_reverts_visible_states_and_cancels_and_skips_like_a_replay(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    async with ops_rig.refused_orders(marker) as allow:
        placed = [await ops_rig.place(notes=marker) for _ in range(2)]
        for order_id in placed:
            await ops_rig.sync_state(order_id, "failed")
        await ops_rig.dead_letters(2, text=marker, status="open")
        body = {"text": marker, "why": "orders made by mistake"}
        planned = expect(await nadia.post(f"{DEAD_LETTERS}/discard", json=body), 202)
        assert planned["plan"]["queues"] == {topology.lane_queue(Lane.CRITICAL): 2}
        job = await ops_rig.ended(planned["job"])
        assert (job["state"], job["outcomes"]) == ("done", {"discarded": 2})
        items = expect(await nadia.get(f"{JOBS}/{job['id']}/items"))
        assert all(item["detail"].startswith("reverted by change ") for item in items)
        async with ops_rig.restaurant.client() as staff:
            for order_id in placed:
                refused(await staff.get(f"/api/orders/{order_id}"), 404, "order_deleted")
        await allow()
    await ops_rig.make_dead_letters(f"slow {marker}", 3)
    slow = {"text": f"slow {marker}", "why": "slowly", "per_second": 0.001}
    planned = expect(await nadia.post(f"{DEAD_LETTERS}/discard", json=slow), 202)
    refused(await nadia.post(f"{JOBS}/{planned['job']['id']}/undo", json={}), 409, "job_running")
    expect(await nadia.post(f"{JOBS}/{planned['job']['id']}/cancel"))
    job = await ops_rig.ended(planned["job"])
    assert job["state"] == "cancelled"
    assert job["outcomes"]["waiting"] >= 2, "more were discarded than one in 1,000 seconds"
    refused(await nadia.post(f"{DEAD_LETTERS}/discard", json={"why": "x"}), 422, "invalid_input", "ids")
    refused(await nadia.post(f"{DEAD_LETTERS}/discard", json={"text": "x"}), 422, "invalid_input", "why")


async def test_broken_message_has_one_dead_letter_that_names_both_sinks_and_its_queue(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    await ops_rig.poison(marker)

    async def found() -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = expect(await nadia.get(DEAD_LETTERS, params={"text": marker}))
        return listed

    [dead_letter] = await eventually(
        found, what="both sinks", until=lambda seen: bool(seen) and len(seen[0]["sinks"]) == 2
    )
    assert dead_letter["sinks"] == ["postgres", "mirror"]
    assert (dead_letter["lane"], dead_letter["deaths"]) == ("normal", 1)
    code, out, _ = await ops_rig.dlq("list", "--text", marker)
    assert code == 0
    assert f"{topology.dead_queue(Lane.NORMAL)}  postgres, mirror" in out


async def test_ledger_adds_up_and_explains_every_change(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    good = change(order(restaurant_id=ops_rig.restaurant_id, items=1, notes=marker))
    await ops_rig.publisher.publish(Lane.CRITICAL.value, message(good))
    await ops_rig.poison(marker)
    await ops_rig.dead_letters(1, text=marker, queue=topology.dead_queue(Lane.NORMAL))

    async def report() -> Any:
        return expect(await nadia.get("/api/ops/ledger", params={"whole": "true"}))

    found = await eventually(
        report,
        within=60,
        what="empty queues and a checkpoint",
        until=lambda seen: not seen["queued"] and seen["leader"],
    )
    assert (found["unexplained"], found["alarms"]) == (0, [])
    assert found["accepted"] == sum(found[place] for place in PLACES)
    assert found["synced"] >= 1
    assert found["dead"] >= 1
    assert found["leader"]["age_seconds"] < 60
    # Reports at once take turns: each needs a connection for itself, and the other routes need one too.
    paths = [*["/api/ops/ledger"] * 5, "/api/ops/dead-letters"]
    replies = await asyncio.gather(*(nadia.get(path, timeout=120.0) for path in paths))
    assert {reply.status_code for reply in replies} == {200}
    since = expect(await nadia.get("/api/ops/ledger", params={"since": ops_rig.since.isoformat()}))
    assert (since["unexplained"], since["queued"]) == (0, 0)
    refused(await nadia.get("/api/ops/ledger?since=yesterday"), 422, "invalid_input", "since")
