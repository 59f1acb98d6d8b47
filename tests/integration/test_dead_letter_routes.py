"""Dead letters as operators see them over HTTP: found, in groups, one with all that is known of it; and who may not."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from shared.entities.contract import Lane, encode, now
from shared.messaging import topology
from shared.security.tokens import Role
from tests.rigs.builders import change, message, order
from tests.rigs.dead_letters import JOBS, LETTERS, Desk, seen
from tests.rigs.restaurant import expect, refused
from tests.rigs.system import eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
NOT_UTF8 = b"\x00\xff\xfe \x80 not UTF-8"


# -- looking -------------------------------------------------------------------------------------------------------


async def test_each_filter_finds_what_it_names(desk: Desk, nadia: httpx.AsyncClient, marker: str) -> None:
    at = datetime(2026, 3, 14, 12, tzinfo=UTC)
    hours = [(at + timedelta(hours=n)).isoformat() for n in range(3)]
    theirs = str(uuid4())
    first = change(order(restaurant_id=desk.restaurant, items=1, notes=f"only here {marker}"))
    second, third = change(desk.table()), change(order(restaurant_id=theirs, items=1))
    for made, lane, number in ((first, Lane.CRITICAL, 0), (second, Lane.NORMAL, 1), (third, Lane.CRITICAL, 2)):
        await desk.bury(made, lane=lane, reason=f"{marker}-{number}", at=hours[number])
    letters = await desk.letters(3, text=marker)
    one, two, three = (letter["id"] for letter in letters)
    discard = {"revision": 1, "why": "a test"}
    expect(await nadia.post(f"{LETTERS}/{two}/discard", json=discard))

    async def found(**filters: Any) -> list[str]:
        return [letter["id"] for letter in expect(await nadia.get(LETTERS, params={"text": marker, **filters}))]

    assert await found() == [three, two, one], "the newest failure first"
    assert await found(queue=topology.dead_queue(Lane.NORMAL)) == [two]
    assert await found(fingerprint=letters[0]["fingerprint"]) == [one]
    assert await found(reason=f"{marker}-2") == [three]
    assert await found(entity="order") == [three, one]
    assert await found(entity_id=second.entity_id) == [two]
    assert await found(change_id=third.id) == [three]
    assert await found(restaurant_id=desk.restaurant) == [two, one]
    assert await found(**{"from": hours[1]}) == [three, two]
    assert await found(to=hours[1]) == [two, one]
    assert await found(**{"from": hours[1], "to": hours[1]}) == [two]
    assert await found(status="discarded") == [two]
    assert await found(status="open", entity="table") == []
    assert await found(text=f"only here {marker}") == [one], "in the body"


async def test_pages_hold_each_letter_once_also_when_others_die_meanwhile(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    at = datetime(2026, 3, 14, 12, tzinfo=UTC)
    for n in range(7):  # three at a time: the cursor must tell them apart
        await desk.bury(change(desk.table(label=marker)), at=(at + timedelta(seconds=n // 3)).isoformat())
    expected = [letter["id"] for letter in await desk.letters(7, text=marker)]
    read: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        reply = await nadia.get(LETTERS, params={"text": marker, "limit": 2, **cursor})
        read += [letter["id"] for letter in expect(reply)]
        following = reply.json()["pagination"]["next_cursor"]
        if following is None:
            break
        if not cursor:
            await desk.bury(change(desk.table(label=marker)))
            await desk.letters(8, text=marker)
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
async def test_a_bad_query_is_refused_by_the_name_of_its_field(
    nadia: httpx.AsyncClient, query: str, field: str
) -> None:
    reply = await nadia.get(f"{LETTERS}?{query}")
    assert expect(reply, 422)["details"]["field"] == field


async def test_groups_tell_how_many_since_when_and_how_they_came(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    at = now()
    times = [at - timedelta(hours=30), at - timedelta(hours=2, minutes=5), at]
    for number, moment in enumerate(times):
        await desk.bury(
            change(desk.table(label=marker)), place=marker, error=f"KeyError: {number}", at=moment.isoformat()
        )
    await desk.bury(change(desk.table(label=marker)), place=f"{marker}:other")
    letters = await desk.letters(4, text=marker)
    expect(await nadia.post(f"{LETTERS}/{letters[0]['id']}/discard", json={"revision": 1, "why": "old"}))
    first, second = expect(await nadia.get(f"{LETTERS}/groups", params={"text": marker}))
    assert (first["count"], first["open"], first["place"]) == (3, 2, marker)
    assert first["queues"] == [topology.dead_queue(Lane.NORMAL)]
    assert [datetime.fromisoformat(first[name]) for name in ("first_failed_at", "last_failed_at")] == [times[0], at]
    assert (first["sample_id"], first["sample_error"]) == (letters[2]["id"], "KeyError: 2")
    assert len(first["trend"]) == 24
    assert (sum(first["trend"]), first["trend"][-3]) == (2, 1), "not what failed thirty hours ago"
    assert (second["count"], second["place"]) == (1, f"{marker}:other")
    assert {one["id"] for one in await desk.letters(3, fingerprint=first["fingerprint"])} == {
        letter["id"] for letter in letters[:3]
    }


async def test_a_letter_shows_all_that_is_known_of_it(desk: Desk, nadia: httpx.AsyncClient, marker: str) -> None:
    born = change(desk.table(label=marker), source="terminal/T-7", traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    broken = encode(born).replace(b'"seats":4', b'"seats":0')
    await desk.publisher.publish(Lane.NORMAL.value, message(broken))
    # The mirror writer has read it too, and has a letter of its own.
    [listed] = await desk.letters(1, text=marker, queue=topology.dead_queue(Lane.NORMAL))
    shown = await seen(nadia, listed)
    letter = shown["dead_letter"]
    assert letter == listed
    assert {name: letter[name] for name in ("queue", "lane", "change_id", "entity", "entity_id", "version")} == {
        "queue": topology.dead_queue(Lane.NORMAL),
        "lane": "normal",
        "change_id": born.id,
        "entity": "table",
        "entity_id": born.entity_id,
        "version": 1,
    }
    assert (letter["restaurant_id"], letter["terminal_id"]) == (desk.restaurant, "T-7")
    assert (letter["trace_id"], letter["type"]) == (TRACE, born.type)
    assert letter["reason"] == "contract_broken"
    assert letter["error"].startswith("BrokenContract: data.after: Expected `int` >= 1")
    assert (letter["place"], len(letter["fingerprint"])) == ("shared.entities.entity:decode", 12)
    assert (letter["deaths"], letter["status"], letter["revision"]) == (1, "open", 1)
    [attempt] = shown["attempts"]
    assert attempt == {name: letter[name] for name in ("reason", "error", "place")} | {"at": letter["last_failed_at"]}
    assert letter["first_failed_at"] == letter["last_failed_at"]
    assert (shown["headers"]["ticketrail-change-id"], shown["headers"]["ticketrail-lane"]) == (born.id, "normal")
    assert (shown["event"]["id"], shown["event"]["data"]["after"]["seats"]) == (born.id, 0)
    assert (shown["body"], shown["edits"], shown["replays"], shown["actions"]) == (None, [], [], [])
    assert (await nadia.get(f"{LETTERS}/{letter['id']}/body")).content == message(broken)


@pytest.mark.parametrize(
    "body",
    [NOT_UTF8, b'[{"n":' + b"9" * 400 + b"}]", b"[" + b"[" * 700 + b"]" * 701, b'[{"id":"\\ud800"}]', b"7"],
    ids=["not-utf8", "long-number", "deep", "half-a-character", "no-event"],
)
async def test_a_body_of_any_content_can_be_shown_and_fetched_byte_for_byte(
    desk: Desk, nadia: httpx.AsyncClient, marker: str, body: bytes
) -> None:
    await desk.bury(body, reason=marker)
    [letter] = await desk.letters(1, reason=marker)
    shown = await seen(nadia, letter)
    assert shown["event"] is not None or shown["body"] == body.decode(errors="replace")
    reply = await nadia.get(f"{LETTERS}/{letter['id']}/body")
    assert (reply.content, reply.headers["content-type"]) == (body, "application/octet-stream")


async def test_a_body_of_ten_megabytes_is_cut_where_it_is_shown_and_whole_where_it_is_fetched(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    body = NOT_UTF8 + bytes(range(256)) * 40_000
    assert len(body) > 10_000_000
    await desk.bury(body, reason=marker)
    [letter] = await desk.letters(1, reason=marker)
    assert letter["body_bytes"] == len(body)
    shown = await seen(nadia, letter)
    assert (shown["event"], shown["body_cut"], len(shown["body"]) <= 65_536) == (None, True, True)
    assert (await nadia.get(f"{LETTERS}/{letter['id']}/body")).content == body


async def test_each_kind_of_bad_input_is_a_group_of_its_own_and_the_good_among_them_is_written(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    def born(**fields: Any) -> Any:
        return change(order(restaurant_id=desk.restaurant, items=1, notes=marker), **fields)

    def too_large() -> bytes:
        return encode(born()).replace(b'"before":{}', b'"before":{"x":"' + b"y" * 10_000_000 + b'"}')

    kinds: dict[str, Any] = {
        "undecodable": lambda: f"not JSON {marker} {uuid4()}".encode(),
        "unsupported_specversion": lambda: message(born(specversion="0.3")),
        "unknown_type": lambda: message(born(type="ticketrail.order.eaten.v1")),
        "unsupported_version": lambda: message(born(type="ticketrail.order.created.v2")),
        "missing_tenant": lambda: message(encode(born()).replace(b'"restaurantid"', b'"restaurant"')),
        "wrong_tenant": lambda: message(born(restaurantid=str(uuid4()))),
        "negative_amount": lambda: message(encode(born()).replace(b'"total":', b'"total":-')),
        "too_large": lambda: message(too_large()),
    }
    good = born()
    for make in kinds.values():
        for _ in range(2):
            await desk.publisher.publish(Lane.CRITICAL.value, make())
    await desk.publisher.publish(Lane.CRITICAL.value, message(good))
    # Not those of the mirror writer, which has read them too; and too long a body is not searched for its text.
    queue = topology.dead_queue(Lane.CRITICAL)
    wanted = ({"text": marker}, {"reason": "too_large", "restaurant_id": desk.restaurant})
    groups: list[dict[str, Any]] = []
    for filters, count in zip(wanted, (14, 2), strict=True):
        await desk.letters(count, queue=queue, **filters)
        groups += expect(await nadia.get(f"{LETTERS}/groups", params={"queue": queue, **filters}))
    assert {group["reason"]: group["count"] for group in groups} == dict.fromkeys(kinds, 2)
    assert len({group["fingerprint"] for group in groups}) == len(kinds)
    await eventually(lambda: desk.written(good.id), what="the good one written")


# -- who may ---------------------------------------------------------------------------------------------------------


async def test_admins_see_the_letters_of_their_restaurant_alone_and_do_nothing_to_them(
    desk: Desk, nadia: httpx.AsyncClient, marker: str
) -> None:
    [ours] = await desk.buried(marker)
    other = str(uuid4())
    await desk.bury(change(desk.table(restaurant_id=other, label=marker)))
    # It names two restaurants: none of them may see the other's part.
    await desk.bury(change(desk.table(restaurant_id=other, label=marker), restaurantid=desk.restaurant))
    await desk.bury(marker.encode())
    everything = await desk.letters(4, text=marker)
    expect(await nadia.post(f"{LETTERS}/{ours['id']}/discard", json={"revision": 1, "why": "secret"}))
    expect(await nadia.post(f"{LETTERS}/{ours['id']}/restore", json={"revision": 2}))
    async with desk.client(Role.ADMIN) as admin:
        assert [one["id"] for one in expect(await admin.get(LETTERS, params={"text": marker}))] == [ours["id"]]
        assert [one["count"] for one in expect(await admin.get(f"{LETTERS}/groups", params={"text": marker}))] == [1]
        assert expect(await admin.get(LETTERS, params={"text": marker, "restaurant_id": other})) == []
        assert (await admin.get(f"{LETTERS}/{ours['id']}/body")).status_code == 200
        assert (await seen(admin, ours))["actions"] == [], "who mends is not theirs to know"
        for letter in everything:
            if letter["id"] != ours["id"]:
                for path in ("", "/body"):
                    hidden = await admin.get(f"{LETTERS}/{letter['id']}{path}")
                    unknown = await admin.get(f"{LETTERS}/{uuid4()}{path}")
                    assert told(hidden) == told(unknown) == (404, "not_found", "no such dead letter")
        mend = {"revision": 3, "why": "mine"}
        for path, body in (
            (f"{LETTERS}/replay", {"ids": [ours["id"]]}),
            (f"{LETTERS}/{ours['id']}/edit", {"revision": 3, "event": {}}),
            (f"{LETTERS}/{ours['id']}/discard", mend),
            (f"{LETTERS}/{ours['id']}/restore", mend),
        ):
            refused(await admin.post(path, json=body), 403, "forbidden")
        for path in (JOBS, "/api/ops/queues", "/api/ops/ledger"):
            refused(await admin.get(path), 403, "forbidden")
    for role in (Role.STAFF, Role.CUSTOMER):
        async with desk.client(role) as client:
            for path in (LETTERS, f"{LETTERS}/groups", f"{LETTERS}/{ours['id']}", f"{LETTERS}/{ours['id']}/body"):
                refused(await client.get(path), 403, "forbidden")
    assert (await seen(nadia, ours))["dead_letter"]["revision"] == 3


def told(reply: httpx.Response) -> tuple[int, str, str]:
    error = expect(reply, reply.status_code)
    return reply.status_code, error["code"], error["message"]
