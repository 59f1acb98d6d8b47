"""What operators do to dead letters over HTTP: replay, edit, discard, restore; and their queues and ledger."""

import asyncio
from datetime import datetime
from typing import Any
from urllib.error import HTTPError
from uuid import uuid4

import aio_pika
import httpx
import pytest
from aiormq.exceptions import ChannelAccessRefused

from services.sync.ledger.balance import PLACES
from shared.entities.contract import Lane, encode
from shared.messaging import management, topology
from tests.rigs.builders import change, message, order
from tests.rigs.dead_letters import JOBS, LETTERS, Desk, seen
from tests.rigs.restaurant import expect, refused
from tests.rigs.system import System, eventually

# -- replaying -------------------------------------------------------------------------------------------------------


async def replay(nadia: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = expect(await nadia.post(f"{LETTERS}/replay", json=body), 202)
    return found


async def test_an_order_that_postgres_refused_is_synced_after_its_replay(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    async with desk.refused_orders(marker) as allow:
        placed = await desk.place(notes=marker)
        await desk.sync_state(placed, "failed")
        [letter] = await desk.letters(1, entity_id=placed)
        assert (letter["reason"], letter["entity_id"]) == ("refused_by_postgres", placed)
        planned = await replay(nadia, ids=[letter["id"]], dry_run=True)
        assert (await desk.ended(planned["job"]))["outcomes"] == {"would_fail": 1}
        await allow()
        planned = await replay(nadia, ids=[letter["id"]], why="allowed again")
    assert planned["plan"]["total"] == 1
    assert planned["plan"]["queues"] == {topology.lane_queue(Lane.CRITICAL): 1}
    job = await desk.ended(planned["job"])
    assert (job["state"], job["outcomes"]) == ("done", {"resolved": 1})
    await desk.sync_state(placed, "synced")
    shown = await seen(nadia, letter)
    assert (shown["dead_letter"]["status"], shown["dead_letter"]["deaths"]) == ("resolved", 1)
    assert [(one["job"]["kind"], one["item"]["outcome"]) for one in shown["replays"]] == [
        ("replay", "resolved"),
        ("dry_run", "would_fail"),
    ]


@pytest.mark.parametrize("way", ["ids", "fingerprint", "filter"])
async def test_letters_are_replayed_by_ids_by_fingerprint_and_by_filter(
    desk: Desk, nadia: httpx.AsyncClient, marker: str, way: str
) -> None:
    born = [change(desk.table(label=marker)) for _ in range(3)]
    await desk.bury(*born, place=marker)
    left = change(desk.table(label=f"left {marker}"))
    await desk.bury(left, place=f"{marker}:left")
    letters = await desk.letters(4, text=marker)
    wanted: dict[str, Any] = {
        "ids": {"ids": [letter["id"] for letter in letters[:3]]},
        "fingerprint": {"fingerprint": letters[0]["fingerprint"]},
        "filter": {"text": f'"{marker}"', "entity": "table", "from": letters[0]["first_failed_at"]},
    }[way]
    planned = await replay(nadia, canary=False, per_second=1_000, **wanted)
    assert planned["plan"]["queues"] == {topology.lane_queue(Lane.NORMAL): 3}
    assert planned["plan"]["fingerprints"] == {letters[0]["fingerprint"]: 3}
    assert (planned["job"]["total"], planned["job"]["actor"]) == (3, "nadia@ops.example")
    job = await desk.ended(planned["job"])
    assert (job["state"], job["outcomes"]) == ("done", {"resolved": 3})
    parts = expect(await nadia.get(f"{JOBS}/{job['id']}/items", params={"outcome": "resolved"}))
    assert [part["dead_letter_id"] for part in parts] == [letter["id"] for letter in letters[:3]]
    assert await desk.written(*(one.id for one in born)) == 3
    assert await desk.written(left.id) == 0
    [untouched] = await desk.letters(1, text=marker, status="open")
    assert untouched == letters[3]


async def test_a_dry_run_tells_what_would_happen_and_changes_nothing(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    good = change(desk.table(label=marker))
    broken = encode(change(desk.table(label=marker))).replace(b'"seats":4', b'"seats":0')
    await desk.bury(good, message(broken))
    letters = await desk.letters(2, text=marker)
    planned = await replay(nadia, text=marker, dry_run=True)
    assert (planned["plan"]["total"], planned["job"]["kind"]) == (2, "dry_run")
    job = await desk.ended(planned["job"])
    assert (job["state"], job["outcomes"]) == ("done", {"would_write": 1, "would_fail": 1})
    first, second = expect(await nadia.get(f"{JOBS}/{job['id']}/items"))
    assert (first["outcome"], first["detail"]) == ("would_write", "version 1")
    assert second["detail"].startswith("contract_broken: BrokenContract: data.after: Expected `int` >= 1")
    assert await desk.letters(2, text=marker) == letters
    assert await desk.written(good.id) == 0


async def test_a_replay_that_is_cancelled_leaves_the_rest_where_it_is(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    await desk.buried(marker, 4)
    planned = await replay(nadia, text=marker, per_second=0.001, canary=False)
    cancelled = expect(await nadia.post(f"{JOBS}/{planned['job']['id']}/cancel"))
    assert cancelled["cancel_asked"] is True
    job = await desk.ended(cancelled)
    assert job["state"] == "cancelled"
    assert job["outcomes"]["waiting"] >= 3, "the rate lets one pass in a thousand seconds"
    still_open = await desk.letters(job["outcomes"]["waiting"], text=marker, status="open")
    assert {letter["revision"] for letter in still_open} == {1}
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
async def test_a_replay_of_nothing_or_of_nonsense_is_refused_by_the_name_of_its_field(
    nadia: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    assert expect(await nadia.post(f"{LETTERS}/replay", json=body), 422)["details"]["field"] == field


async def test_a_replay_of_named_letters_tells_which_are_not_there_and_is_refused_where_none_is(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    [letter] = await desk.buried(marker)
    unknown = [str(uuid4()), str(uuid4())]
    refused(await nadia.post(f"{LETTERS}/replay", json={"ids": unknown}), 404, "not_found")
    planned = await replay(nadia, ids=[unknown[0], letter["id"], unknown[1]])
    assert (planned["plan"]["total"], planned["plan"]["absent"], planned["job"]["total"]) == (1, unknown, 1)
    assert (await desk.ended(planned["job"]))["outcomes"] == {"resolved": 1}
    refused(await nadia.post(f"{LETTERS}/replay", json={"ids": [letter["id"]]}), 409, "dead_letter_not_open")


async def test_a_replay_of_a_filter_that_finds_nothing_is_over_at_once_and_says_so(
    nadia: httpx.AsyncClient, marker: str
) -> None:
    planned = await replay(nadia, text=marker)
    assert planned["plan"] == {"total": 0, "queues": {}, "fingerprints": {}, "absent": []}
    assert (planned["job"]["state"], planned["job"]["message"]) == ("done", "no open dead letter matches")


# -- mending ---------------------------------------------------------------------------------------------------------


async def poisoned(desk: Desk, marker: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a letter, its event), of a table without a seat."""
    born = encode(change(desk.table(label=marker))).replace(b'"seats":4', b'"seats":0')
    await desk.bury(message(born), reason="contract_broken")
    [letter] = await desk.letters(1, text=marker)
    async with desk.client() as client:
        return letter, (await seen(client, letter))["event"]


def with_seats(event: dict[str, Any], seats: Any) -> dict[str, Any]:
    return {**event, "data": {**event["data"], "after": {**event["data"]["after"], "seats": seats}}}


async def test_an_edit_makes_a_new_change_and_the_letter_keeps_what_it_was(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    letter, event = await poisoned(desk, marker)
    body = {"revision": 1, "event": with_seats(event, 6), "why": "it has six"}
    edited = expect(await nadia.post(f"{LETTERS}/{letter['id']}/edit", json=body))
    assert (edited["status"], edited["revision"]) == ("resolved", 2)
    assert edited["replaced_by"] not in (None, letter["change_id"])
    await eventually(lambda: desk.written(edited["replaced_by"]), what="the new change written")
    assert await desk.written(letter["change_id"]) == 0
    async with desk.shop.client() as staff:
        table = expect(await staff.get(f"/api/tables/{letter['entity_id']}"))
    assert (table["seats"], table["label"], table["version"]) == (6, marker, 1)
    shown = await seen(nadia, letter)
    assert shown["event"] == event, "as received"
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
        (lambda event: {**event, "data": {}}, "event.data", "invalid_input"),
        (lambda event: {**event, "type": "ticketrail.table.eaten.v1"}, "event.type", "unknown_type"),
        (lambda event: {**event, "tenant": "x"}, "event.tenant", "invalid_input"),
        (lambda event: {**event, "subject": f"table/{uuid4()}"}, "event.subject", "locked"),
        (lambda event: {**event, "restaurantid": str(uuid4())}, "event.restaurantid", "locked"),
        (lambda event: {name: event[name] for name in event if name != "type"}, "event.type", "invalid_input"),
    ],
    ids=["too-few", "text", "no-after", "type", "unknown", "subject", "restaurant", "missing"],
)
async def test_an_edit_that_may_not_be_is_refused_by_the_name_of_its_field(
    desk: Desk, nadia: httpx.AsyncClient, marker: str, wrong: Any, field: str, code: str
) -> None:
    letter, event = await poisoned(desk, marker)
    body = {"revision": 1, "event": wrong(event)}
    refused(await nadia.post(f"{LETTERS}/{letter['id']}/edit", json=body), 422, code, field)
    assert await desk.letters(1, text=marker) == [letter]


async def test_of_two_operators_who_saw_the_same_letter_the_second_is_told(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    letter, event = await poisoned(desk, marker)
    path = f"{LETTERS}/{letter['id']}/edit"
    async with desk.client(name="omar") as omar:
        replies = await asyncio.gather(
            nadia.post(path, json={"revision": 1, "event": with_seats(event, 2)}),
            omar.post(path, json={"revision": 1, "event": with_seats(event, 8)}),
        )
    assert sorted(reply.status_code for reply in replies) == [200, 409]
    [late] = [reply for reply in replies if reply.status_code == 409]
    assert refused(late, 409, "dead_letter_changed")["revision"] == 2
    assert len((await seen(nadia, letter))["edits"]) == 1


async def test_a_discard_and_a_restore_are_audited_and_an_old_revision_is_told(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    letter, event = await poisoned(desk, marker)
    path = f"{LETTERS}/{letter['id']}"
    for without in ({}, {"why": ""}, {"why": "  "}):
        refused(await nadia.post(f"{path}/discard", json={"revision": 1, **without}), 422, "invalid_input", "why")
    gone = expect(await nadia.post(f"{path}/discard", json={"revision": 1, "why": "a test of the terminal"}))
    assert (gone["status"], gone["why"], gone["revision"]) == ("discarded", "a test of the terminal", 2)
    assert gone["replaced_by"] is None, "nobody ever saw it"
    async with desk.client(name="omar") as omar:
        for act in ("edit", "discard"):
            body = {"revision": 1, "why": "me too"} | ({"event": with_seats(event, 2)} if act == "edit" else {})
            refused(await omar.post(f"{path}/{act}", json=body), 409, "dead_letter_changed")
            refused(await omar.post(f"{path}/{act}", json={**body, "revision": 2}), 409, "dead_letter_not_open")
        refused(await omar.post(f"{LETTERS}/replay", json={"ids": [letter["id"]]}), 409, "dead_letter_not_open")
        back = expect(await omar.post(f"{path}/restore", json={"revision": 2, "why": "it was none"}))
        refused(await omar.post(f"{path}/restore", json={"revision": 3}), 409, "dead_letter_not_discarded")
    assert (back["status"], back["why"], back["closed_at"]) == ("open", None, None)
    acts = (await seen(nadia, letter))["actions"]
    assert [(act["action"], act["actor"], act["why"]) for act in acts] == [
        ("dead_letter.restore", "omar@ops.example", "it was none"),
        ("dead_letter.discard", "nadia@ops.example", "a test of the terminal"),
    ]
    assert all(
        act["restaurant_id"] == desk.restaurant and desk.since < datetime.fromisoformat(act["at"]) for act in acts
    )
    for act in ("edit", "discard", "restore"):
        body = {"revision": 1, "why": "?"} | ({"event": event} if act == "edit" else {})
        refused(await nadia.post(f"{LETTERS}/{uuid4()}/{act}", json=body), 404, "not_found")


async def test_what_readers_saw_of_a_letter_is_taken_back_when_it_is_discarded(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    async with desk.refused_orders(marker):
        placed = await desk.place(notes=marker)
        await desk.sync_state(placed, "failed")
        [letter] = await desk.letters(1, entity_id=placed)
        body = {"revision": letter["revision"], "why": "never cooked"}
        gone = expect(await nadia.post(f"{LETTERS}/{letter['id']}/discard", json=body))
    assert gone["replaced_by"] not in (None, letter["change_id"])
    async with desk.shop.client() as staff:
        refused(await staff.get(f"/api/orders/{placed}"), 404, "order_deleted")


# -- queues and the ledger -------------------------------------------------------------------------------------------


async def test_queues_are_told_by_the_management_api_and_without_it_by_the_broker(
    desk: Desk, nadia: httpx.AsyncClient
) -> None:
    names = [topology.MIRROR_DEAD, *(of(lane) for lane in Lane for of in (topology.lane_queue, topology.dead_queue))]

    def tells_all(told: dict[str, Any]) -> bool:
        queues = {queue["name"]: queue for queue in told["queues"]}
        return all(isinstance(queues[name]["depth"], int) for name in names) and all(
            queues[topology.lane_queue(lane)]["consumers"] for lane in Lane
        )

    async def look() -> dict[str, Any]:
        found: dict[str, Any] = expect(await nadia.get("/api/ops/queues"))
        return found

    # The management API counts every few seconds: of a queue that is young it tells nothing yet. Where it takes three
    # to answer, the broker is asked in its place.
    told = await eventually(
        look, what="a count of every queue", until=lambda told: told["source"] == "management" and tells_all(told)
    )
    assert told["away"] == []
    assert set(told["heartbeat_age_seconds"]) == {lane.value for lane in Lane}
    wrong = "http://nobody:wrong@127.0.0.1:9"
    async with desk.another_api(rabbitmq_watcher_url=wrong) as url, desk.client(url=url) as client:
        blind = expect(await client.get("/api/ops/queues"))
    assert (blind["source"], blind["away"]) == ("broker", ["management"])
    assert tells_all(blind)
    assert {queue["name"] for queue in told["queues"]} == {queue["name"] for queue in blind["queues"]}


async def test_the_watcher_of_the_queues_may_look_and_do_nothing(system: System) -> None:
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


async def test_the_ledger_adds_up_and_explains_every_change(desk: Desk, nadia: httpx.AsyncClient, marker: str) -> None:
    good = change(order(restaurant_id=desk.restaurant, items=1, notes=marker))
    await desk.publisher.publish(Lane.CRITICAL.value, message(good))
    await desk.poison(marker)
    await desk.letters(1, text=marker, queue=topology.dead_queue(Lane.NORMAL))

    async def balance() -> Any:
        return expect(await nadia.get("/api/ops/ledger", params={"since": desk.since.isoformat()}))

    def ours(found: Any) -> dict[str, int]:
        [one] = [one for one in found["restaurants"] if one["restaurant_id"] == desk.restaurant]
        assert one["slug"] == desk.shop.slug
        return {place: one[place] for place in PLACES}

    found = await eventually(balance, within=60, what="nothing queued", until=lambda seen: not ours(seen)["queued"])
    assert (found["unexplained"], found["missing"]) == (0, [])
    for one in (found, *found["restaurants"]):
        assert one["accepted"] == sum(one[place] for place in PLACES)
    for name in ("accepted", *PLACES):
        assert found[name] == sum(one[name] for one in found["restaurants"])
    assert ours(found)["synced"] >= 1
    assert ours(found)["dead"] >= 1
    refused(await nadia.get("/api/ops/ledger?since=yesterday"), 422, "invalid_input", "since")
