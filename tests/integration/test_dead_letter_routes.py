"""Dead letters over HTTP: lists, groups, one dead letter in full, and the roles that are refused."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from shared.entities.contract import Lane, encode, now
from shared.messaging import topology
from shared.security.tokens import Role
from tests.rigs.builders import change, message, order
from tests.rigs.dead_letters import DEAD_LETTERS, JOBS, OperatorRig, details_of
from tests.rigs.restaurant import expect, refused
from tests.rigs.system import eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
NOT_UTF8 = b"\x00\xff\xfe \x80 not UTF-8"


# -- reading -------------------------------------------------------------------------------------------------------


async def test_each_filter_selects_the_matching_dead_letters(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    at = datetime(2026, 3, 14, 12, tzinfo=UTC)
    hours = [(at + timedelta(hours=n)).isoformat() for n in range(3)]
    theirs = str(uuid4())
    first = change(order(restaurant_id=ops_rig.restaurant_id, items=1, notes=f"only here {marker}"))
    second, third = change(ops_rig.table()), change(order(restaurant_id=theirs, items=1))
    for made, lane, number in ((first, Lane.CRITICAL, 0), (second, Lane.NORMAL, 1), (third, Lane.CRITICAL, 2)):
        await ops_rig.send_to_dead_queue(made, lane=lane, reason=f"{marker}-{number}", at=hours[number])
    dead_letters = await ops_rig.dead_letters(3, text=marker)
    one, two, three = (dead_letter["id"] for dead_letter in dead_letters)
    discard = {"revision": 1, "why": "a test"}
    expect(await nadia.post(f"{DEAD_LETTERS}/{two}/discard", json=discard))

    async def found(**filters: Any) -> list[str]:
        return [
            dead_letter["id"]
            for dead_letter in expect(await nadia.get(DEAD_LETTERS, params={"text": marker, **filters}))
        ]

    assert await found() == [three, two, one], "the newest failure is not listed first"
    assert await found(queue=topology.dead_queue(Lane.NORMAL)) == [two]
    assert await found(fingerprint=dead_letters[0]["fingerprint"]) == [one]
    assert await found(reason=f"{marker}-2") == [three]
    assert await found(entity="order") == [three, one]
    assert await found(entity_id=second.entity_id) == [two]
    assert await found(change_id=third.id) == [three]
    assert await found(restaurant_id=ops_rig.restaurant_id) == [two, one]
    assert await found(**{"from": hours[1]}) == [three, two]
    assert await found(to=hours[1]) == [two, one]
    assert await found(**{"from": hours[1], "to": hours[1]}) == [two]
    assert await found(status="discarded") == [two]
    assert await found(status="open", entity="table") == []
    assert await found(text=f"only here {marker}") == [one], "the text in the body is not found"


async def test_pages_contain_each_dead_letter_once_while_new_ones_arrive(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    at = datetime(2026, 3, 14, 12, tzinfo=UTC)
    for n in range(7):  # three fail at the same second, so the cursor needs the id as well
        await ops_rig.send_to_dead_queue(
            change(ops_rig.table(label=marker)), at=(at + timedelta(seconds=n // 3)).isoformat()
        )
    expected = [dead_letter["id"] for dead_letter in await ops_rig.dead_letters(7, text=marker)]
    read: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        reply = await nadia.get(DEAD_LETTERS, params={"text": marker, "limit": 2, **cursor})
        read += [dead_letter["id"] for dead_letter in expect(reply)]
        following = reply.json()["pagination"]["next_cursor"]
        if following is None:
            break
        if not cursor:
            await ops_rig.send_to_dead_queue(change(ops_rig.table(label=marker)))
            await ops_rig.dead_letters(8, text=marker)
        cursor = {"cursor": following}
    assert read == expected[::-1]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("status=dead", "status"),
        ("entity_id=7", "entity_id"),
        ("restaurant_id=ours", "restaurant_id"),
        ("from=yesterday", "from"),
        ("to=2026-03-14T12:00:00", "to"),
        ("from=1066-10-14T09:00:00Z", "from"),
        ("text=a%00b", "text"),
        ("limit=0", "limit"),
        ("cursor=abc", "cursor"),
        ("text=", "text"),
        ("quueue=x", "quueue"),
    ],
)
async def test_bad_query_is_refused_with_the_name_of_the_field(
    nadia: httpx.AsyncClient, query: str, field: str
) -> None:
    reply = await nadia.get(f"{DEAD_LETTERS}?{query}")
    assert expect(reply, 422)["details"]["field"] == field


async def test_groups_show_count_first_and_last_failure_and_trend(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    at = now()
    times = [at - timedelta(hours=30), at - timedelta(hours=2, minutes=5), at]
    for number, moment in enumerate(times):
        await ops_rig.send_to_dead_queue(
            change(ops_rig.table(label=marker)), place=marker, error=f"KeyError: {number}", at=moment.isoformat()
        )
    await ops_rig.send_to_dead_queue(change(ops_rig.table(label=marker)), place=f"{marker}:other")
    dead_letters = await ops_rig.dead_letters(4, text=marker)
    expect(await nadia.post(f"{DEAD_LETTERS}/{dead_letters[0]['id']}/discard", json={"revision": 1, "why": "old"}))
    first, second = expect(await nadia.get(f"{DEAD_LETTERS}/groups", params={"text": marker}))
    assert (first["count"], first["open"], first["place"]) == (3, 2, marker)
    assert first["queues"] == [topology.dead_queue(Lane.NORMAL)]
    assert [datetime.fromisoformat(first[name]) for name in ("first_failed_at", "last_failed_at")] == [times[0], at]
    assert (first["sample_id"], first["sample_error"]) == (dead_letters[2]["id"], "KeyError: 2")
    assert len(first["trend"]) == 24
    assert (sum(first["trend"]), first["trend"][-3]) == (2, 1), "the trend counts the failure of 30 hours ago"
    assert (second["count"], second["place"]) == (1, f"{marker}:other")
    assert {one["id"] for one in await ops_rig.dead_letters(3, fingerprint=first["fingerprint"])} == {
        dead_letter["id"] for dead_letter in dead_letters[:3]
    }


async def test_dead_letter_shows_its_change_failure_attempts_headers_and_event(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    made = change(ops_rig.table(label=marker), source="terminal/T-7", traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    broken = encode(made).replace(b'"seats":4', b'"seats":0')
    await ops_rig.publisher.publish(Lane.NORMAL.value, message(broken))
    # The mirror writer reads the broken message too.
    [listed] = await ops_rig.dead_letters(1, sinks=2, text=marker, queue=topology.dead_queue(Lane.NORMAL))
    shown = await details_of(nadia, listed)
    dead_letter = shown["dead_letter"]
    assert dead_letter == listed
    assert {name: dead_letter[name] for name in ("queue", "lane", "change_id", "entity", "entity_id", "version")} == {
        "queue": topology.dead_queue(Lane.NORMAL),
        "lane": "normal",
        "change_id": made.id,
        "entity": "table",
        "entity_id": made.entity_id,
        "version": 1,
    }
    assert (dead_letter["restaurant_id"], dead_letter["terminal_id"]) == (ops_rig.restaurant_id, "T-7")
    assert (dead_letter["trace_id"], dead_letter["type"]) == (TRACE, made.type)
    assert dead_letter["reason"] == "contract_broken"
    assert dead_letter["error"].startswith("BrokenContract: data.after: Expected `int` >= 1")
    assert (dead_letter["place"], len(dead_letter["fingerprint"])) == ("shared.entities.entity:decode", 12)
    assert (dead_letter["deaths"], dead_letter["status"]) == (1, "open")
    attempts = shown["attempts"]  # one of each sink
    assert [attempt["reason"] for attempt in attempts] == ["contract_broken"] * 2
    assert {name: dead_letter[name] for name in ("reason", "error", "place")} in [
        {name: attempt[name] for name in ("reason", "error", "place")} for attempt in attempts
    ]
    assert dead_letter["last_failed_at"] in [attempt["at"] for attempt in attempts]
    assert (shown["headers"]["ticketrail-change-id"], shown["headers"]["ticketrail-lane"]) == (made.id, "normal")
    assert (shown["event"]["id"], shown["event"]["data"]["after"]["seats"]) == (made.id, 0)
    assert (shown["body"], shown["edits"], shown["replays"], shown["actions"]) == (None, [], [], [])
    assert (await nadia.get(f"{DEAD_LETTERS}/{dead_letter['id']}/body")).content == message(broken)


@pytest.mark.parametrize(
    "body",
    [NOT_UTF8, b'[{"n":' + b"9" * 400 + b"}]", b"[" + b"[" * 700 + b"]" * 701, b'[{"id":"\\ud800"}]', b"7"],
    ids=["not-utf8", "long-number", "deep", "half-a-character", "no-event"],
)
async def test_body_of_any_content_can_be_shown_and_fetched_byte_for_byte(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str, body: bytes
) -> None:
    await ops_rig.send_to_dead_queue(body, reason=marker)
    [dead_letter] = await ops_rig.dead_letters(1, reason=marker)
    shown = await details_of(nadia, dead_letter)
    assert shown["event"] is not None or shown["body"] == body.decode(errors="replace")
    reply = await nadia.get(f"{DEAD_LETTERS}/{dead_letter['id']}/body")
    assert (reply.content, reply.headers["content-type"]) == (body, "application/octet-stream")


async def test_body_of_ten_megabytes_is_shown_in_part_and_fetched_whole(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    body = NOT_UTF8 + bytes(range(256)) * 40_000
    assert len(body) > 10_000_000
    await ops_rig.send_to_dead_queue(body, reason=marker)
    [dead_letter] = await ops_rig.dead_letters(1, reason=marker)
    assert dead_letter["body_bytes"] == len(body)
    shown = await details_of(nadia, dead_letter)
    assert (shown["event"], shown["body_cut"], len(shown["body"]) <= 65_536) == (None, True, True)
    assert (await nadia.get(f"{DEAD_LETTERS}/{dead_letter['id']}/body")).content == body


async def test_each_kind_of_bad_input_is_a_group_and_good_changes_are_still_written(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    def make(**fields: Any) -> Any:
        return change(order(restaurant_id=ops_rig.restaurant_id, items=1, notes=marker), **fields)

    def too_large() -> bytes:
        return encode(make()).replace(b'"before":{}', b'"before":{"x":"' + b"y" * 10_000_000 + b'"}')

    kinds: dict[str, Any] = {
        "undecodable": lambda: f"not JSON {marker} {uuid4()}".encode(),
        "unsupported_specversion": lambda: message(make(specversion="0.3")),
        "unknown_type": lambda: message(make(type="ticketrail.order.eaten.v1")),
        "unsupported_version": lambda: message(make(type="ticketrail.order.created.v2")),
        "missing_tenant": lambda: message(encode(make()).replace(b'"restaurantid"', b'"restaurant"')),
        "wrong_tenant": lambda: message(make(restaurantid=str(uuid4()))),
        "negative_amount": lambda: message(encode(make()).replace(b'"total":', b'"total":-')),
        "too_large": lambda: message(too_large()),
    }
    good = make()
    for body_of in kinds.values():
        for _ in range(2):
            await ops_rig.publisher.publish(Lane.CRITICAL.value, body_of())
    await ops_rig.publisher.publish(Lane.CRITICAL.value, message(good))
    # The filter `queue` leaves out the dead letters of the mirror writer. A text search does not read bodies that are
    # too large.
    queue = topology.dead_queue(Lane.CRITICAL)
    selections: tuple[dict[str, Any], ...] = (
        {"text": marker},
        {"reason": "too_large", "restaurant_id": ops_rig.restaurant_id},
    )
    groups: list[dict[str, Any]] = []
    for filters, count in zip(selections, (14, 2), strict=True):
        await ops_rig.dead_letters(count, queue=queue, **filters)
        groups += expect(await nadia.get(f"{DEAD_LETTERS}/groups", params={"queue": queue, **filters}))
    assert {group["reason"]: group["count"] for group in groups} == dict.fromkeys(kinds, 2)
    assert len({group["fingerprint"] for group in groups}) == len(kinds)
    await eventually(lambda: ops_rig.written(good.id), what="the good change written")


# -- permissions -----------------------------------------------------------------------------------------------------


async def test_admins_see_only_the_dead_letters_of_their_restaurant_and_cannot_act_on_them(
    ops_rig: OperatorRig, nadia: httpx.AsyncClient, marker: str
) -> None:
    [ours] = await ops_rig.make_dead_letters(marker)
    other = str(uuid4())
    await ops_rig.send_to_dead_queue(change(ops_rig.table(restaurant_id=other, label=marker)))
    # This dead letter names two restaurants. Neither may see it, because it has content of the other.
    await ops_rig.send_to_dead_queue(
        change(ops_rig.table(restaurant_id=other, label=marker), restaurantid=ops_rig.restaurant_id)
    )
    await ops_rig.send_to_dead_queue(marker.encode())
    everything = await ops_rig.dead_letters(4, text=marker)
    expect(await nadia.post(f"{DEAD_LETTERS}/{ours['id']}/discard", json={"revision": 1, "why": "secret"}))
    expect(await nadia.post(f"{DEAD_LETTERS}/{ours['id']}/restore", json={"revision": 2}))
    async with ops_rig.client(Role.ADMIN) as admin:
        assert [one["id"] for one in expect(await admin.get(DEAD_LETTERS, params={"text": marker}))] == [ours["id"]]
        assert [one["count"] for one in expect(await admin.get(f"{DEAD_LETTERS}/groups", params={"text": marker}))] == [
            1
        ]
        assert expect(await admin.get(DEAD_LETTERS, params={"text": marker, "restaurant_id": other})) == []
        assert (await admin.get(f"{DEAD_LETTERS}/{ours['id']}/body")).status_code == 200
        assert (await details_of(admin, ours))["actions"] == [], "admins see the actions of operators"
        for dead_letter in everything:
            if dead_letter["id"] != ours["id"]:
                for path in ("", "/body"):
                    hidden = await admin.get(f"{DEAD_LETTERS}/{dead_letter['id']}{path}")
                    unknown = await admin.get(f"{DEAD_LETTERS}/{uuid4()}{path}")
                    assert error_of(hidden) == error_of(unknown) == (404, "not_found", "no such dead letter")
        body_of_action = {"revision": 3, "why": "mine"}
        for path, body in (
            (f"{DEAD_LETTERS}/replay", {"ids": [ours["id"]]}),
            (f"{DEAD_LETTERS}/{ours['id']}/edit", {"revision": 3, "event": {}}),
            (f"{DEAD_LETTERS}/{ours['id']}/discard", body_of_action),
            (f"{DEAD_LETTERS}/{ours['id']}/restore", body_of_action),
        ):
            refused(await admin.post(path, json=body), 403, "forbidden")
        for path in (JOBS, "/api/ops/queues", "/api/ops/ledger"):
            refused(await admin.get(path), 403, "forbidden")
    for role in (Role.STAFF, Role.CUSTOMER):
        async with ops_rig.client(role) as client:
            for path in (
                DEAD_LETTERS,
                f"{DEAD_LETTERS}/groups",
                f"{DEAD_LETTERS}/{ours['id']}",
                f"{DEAD_LETTERS}/{ours['id']}/body",
            ):
                refused(await client.get(path), 403, "forbidden")
    assert (await details_of(nadia, ours))["dead_letter"]["revision"] == 3


def error_of(reply: httpx.Response) -> tuple[int, str, str]:
    """Returns (HTTP status, error code, message)."""
    error = expect(reply, reply.status_code)
    return reply.status_code, error["code"], error["message"]
