"""The mirror's scripts on a real Redis: the guard in Lua, claims, numbers, the live window, and cold mirrors."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from msgspec import structs

from shared.entities.contract import Head, Outline, encode, outline
from shared.entities.job import ENTITY as JOB
from shared.entities.job import BayJob
from shared.entities.order import ENTITY as ORDER
from shared.messaging.position import LogPosition
from shared.mirror import keys
from shared.mirror.claim_replies import Claimed, Cold, HeadMoved, Stale
from shared.mirror.identity import MirrorIdentity, mirror_identity
from shared.mirror.mirror import NOTHING_APPLIED, Apply, Mirror
from shared.mirror.stored_heads import FailedState, FeedNote, StoredHead
from tests.rigs import builders
from tests.rigs.mirror import answers, head_of, state
from tests.rigs.rail.changes import applied
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually

DAY = "2026-03-14"


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because its tests stop it and clear it."""
    return servers.extra_redis()


@pytest.fixture
async def mirror(redis: Redis) -> AsyncIterator[Mirror]:
    await redis.command("DEL", keys.LOG, keys.WARM)
    mirror = Mirror(redis.url, timeout=5.0, stale_seconds=0.0)
    yield mirror
    await mirror.close()


arrivals = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=10)


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(arrivals=arrivals, more=st.lists(st.integers(0, 9), max_size=6), split=st.integers(1, 10))
async def test_states_in_any_order_and_repetition_end_the_same_in_lua(
    mirror: Mirror, arrivals: list[tuple[int, int]], more: list[int], split: int
) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    arrivals = arrivals + [arrivals[n % len(arrivals)] for n in more]
    states = [state(version, change, id_=id_, restaurant=restaurant) for version, change in arrivals]
    for start in range(0, len(states), split):
        await mirror.apply(states[start : start + split])  # a batch may hold several states of one order
    version, change = max(arrivals)
    _, (found,) = await mirror.read(restaurant, "order", [id_])
    assert found is not None
    assert found.head == Head(version, str(UUID(int=change)))
    assert ORDER.decode_state(found.state).notes == f"{version}/{change}"
    assert found.pending


def _outline(one: Apply) -> Outline:
    found = outline(encode(builders.change(one.state, entityversion=one.head.version)))
    assert found is not None
    return structs.replace(found, id=one.head.change_id)


@settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(arrivals=arrivals, next_one=st.tuples(st.integers(1, 12), st.integers(1, 4)))
async def test_mirror_lacks_exactly_the_changes_that_would_alter_it(
    mirror: Mirror, arrivals: list[tuple[int, int]], next_one: tuple[int, int]
) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    await mirror.apply([state(*one, id_=id_, restaurant=restaurant) for one in arrivals])
    other = state(1, id_=builders.new_id(), restaurant=restaurant)
    requested = [state(*next_one, id_=id_, restaurant=restaurant), other]
    missing = [1] if next_one <= max(arrivals) else [0, 1]
    assert await mirror.missing([_outline(one) for one in requested]) == missing
    await mirror.apply(requested)
    assert await mirror.missing([_outline(one) for one in requested]) == []


async def test_mirror_lacks_states_that_left_the_window_or_kept_their_claim(mirror: Mirror, redis: Redis) -> None:
    restaurant, series = builders.new_id(), DAY
    await warmed(mirror)
    placed = builders.order(items=0, restaurant_id=restaurant, request_hash="ab" * 32, order_number="")
    change = builders.change(placed)
    assert isinstance(await mirror.claim(ORDER, change, encode(change), None, series), Claimed)
    found = outline(encode(change))
    assert found is not None
    assert await mirror.missing([found]) == [0]
    await mirror.apply([applied(change, "stored")])
    assert await mirror.missing([found]) == []
    await mirror.trim(restaurant, "order", {placed.id: change.id})
    assert await mirror.missing([found]) == [0], (
        "a trimmed order counts as present, although the mirror keeps only its version"
    )
    await mirror.apply([applied(change, "stored")])
    await redis.command("HSET", keys.claim(restaurant, "order", placed.id), "v", 1)
    assert await mirror.missing([found]) == [0], "the claim stayed although its version is taken"


async def test_states_that_one_mirror_lacks_are_not_applied_to_a_cold_one(mirror: Mirror, redis: Redis) -> None:
    restaurant = builders.new_id()
    at = await warmed(mirror)
    one = state(1, id_=builders.new_id(), restaurant=restaurant)
    note = LogPosition(at.offset + 1, 7)
    # Like a promoted replica, the mirror now has the log state but no stamp.
    await redis.command("DEL", keys.WARM)
    assert await mirror.apply([one], at=at, note=note, only_warm=True) is None
    assert await mirror.log_position() == at
    assert await mirror.apply([one], at=at, note=note) == []


async def test_late_state_of_a_missing_document_is_reported_and_not_written(mirror: Mirror) -> None:
    restaurant, there, missing = (builders.new_id() for _ in range(3))
    await mirror.apply([state(1, id_=there, restaurant=restaurant)])
    late = [state(2, id_=id_, restaurant=restaurant, how="late") for id_ in (missing, there)]
    assert await mirror.apply(late) == [0]
    assert await head_of(mirror, restaurant, missing) is None
    assert await head_of(mirror, restaurant, there) == late[1].head


def at_offset(offset: int, crc: int = 1) -> LogPosition:
    return LogPosition(offset, crc)


async def begun(mirror: Mirror, at: LogPosition) -> None:
    """Begins to fill a mirror that has applied the log up to `at`, the position that a mirror writer has then."""
    await mirror.begin_log()
    assert await mirror.apply([], at=NOTHING_APPLIED, note=at) == []


async def test_state_that_was_revealed_before_it_is_loaded_from_postgres_is_synced(mirror: Mirror) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    older, one = (state(version, id_=id_, restaurant=restaurant) for version in (1, 2))
    await mirror.apply([one])
    await mirror.note_failures([FailedState(restaurant, "order", id_, one.head.change_id, b"{}")])
    assert await mirror.counts(restaurant, "order") == (1, 1)
    await mirror.apply([structs.replace(older, how="stored")])
    assert await mirror.counts(restaurant, "order") == (1, 1), "PostgreSQL has only an older state"
    await mirror.apply([structs.replace(one, how="stored")])
    assert await mirror.counts(restaurant, "order") == (0, 0)


async def test_states_for_another_mirror_are_refused(mirror: Mirror) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    await begun(mirror, at_offset(7))
    one = state(1, id_=id_, restaurant=restaurant)
    assert await mirror.apply([one], at=at_offset(8), note=at_offset(9)) is None
    assert await mirror.apply([one], at=at_offset(7, crc=2), note=at_offset(8)) is None
    assert await head_of(mirror, restaurant, id_) is None
    assert await mirror.apply([one], at=at_offset(7), note=at_offset(8)) == []
    assert await mirror.log_position() == at_offset(8)


async def test_states_for_another_server_are_refused(mirror: Mirror, redis: Redis) -> None:
    """While a mirror is filled from PostgreSQL, its position stays the same, so that the position does not distinguish
    the server from a replica that was promoted before it had all states."""
    restaurant, id_ = builders.new_id(), builders.new_id()
    await mirror.begin_log()
    server, _ = await mirror.server()
    one, two = (state(version, id_=id_, restaurant=restaurant) for version in (1, 2))
    assert await mirror.apply([one], at=NOTHING_APPLIED, server=server) == []
    await fail_over_and_back(redis)
    assert await mirror.apply([two], at=NOTHING_APPLIED, server=server) is None
    assert await head_of(mirror, restaurant, id_) == one.head
    assert not await mirror.warm(NOTHING_APPLIED, server, MirrorIdentity(1, "", ""))
    assert not await mirror.is_warm()


def standing(restaurant: str, one: Apply) -> StoredHead:
    return StoredHead(restaurant, "order", one.state.id, one.head)


async def pending(mirror: Mirror, restaurant: str) -> list[str]:
    return await mirror.pending_ids(restaurant, "order")


async def test_state_is_synced_once_postgres_has_it_and_a_later_head_stays_pending(mirror: Mirror) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    first, second = (state(version, version, id_=id_, restaurant=restaurant) for version in (1, 2))
    await mirror.apply([first, second])
    failures = [FailedState(restaurant, "order", id_, one.head.change_id, b'{"error": "x"}') for one in (first, second)]
    assert await mirror.note_failures(failures[:1]) == [0]
    assert await mirror.settle([standing(restaurant, first)]) == []
    assert await pending(mirror, restaurant) == [id_]
    assert await mirror.note_failures(failures[1:]) == []
    assert await mirror.counts(restaurant, "order") == (1, 1)
    assert await mirror.settle([standing(restaurant, second)]) == []
    assert await mirror.counts(restaurant, "order") == (0, 0)


async def test_older_and_missing_states_are_reported_and_the_position_waits_for_them(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    behind, missing, there = (state(2, id_=builders.new_id(), restaurant=restaurant) for _ in range(3))
    older = state(1, id_=behind.state.id, restaurant=restaurant)
    await mirror.apply([older, there])
    entities = [standing(restaurant, one) for one in (there, behind, missing)]
    xid = 1 << 40
    note = FeedNote(xid, f"first {restaurant}")
    assert await mirror.settle(entities, note=note) == [1, 2]
    assert await mirror.feed_position() != note.position
    assert set(await pending(mirror, restaurant)) == {behind.state.id}
    await mirror.apply([structs.replace(behind, how="stored"), structs.replace(missing, how="stored")])
    assert await mirror.settle(entities, note=note) == []
    assert await mirror.feed_position() == note.position
    assert await pending(mirror, restaurant) == []

    assert await mirror.settle(entities, at=xid + 1) is None, "another mirror was settled"
    await mirror.settle([], note=FeedNote(xid - 1, "back"))
    assert await mirror.feed_position() == note.position
    await mirror.settle([], note=FeedNote(0, "again", again=True))
    assert await mirror.feed_position() == "again"


async def test_state_that_postgres_lacks_becomes_pending_only_on_request(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    ahead, lost = (state(2, id_=builders.new_id(), restaurant=restaurant, how="stored") for _ in range(2))
    await mirror.apply([ahead, lost])
    known = StoredHead(restaurant, "order", ahead.state.id, Head(1, ahead.head.change_id))
    entities = [known, StoredHead(restaurant, "order", lost.state.id, None)]
    assert await mirror.settle(entities) == []
    assert await pending(mirror, restaurant) == []
    assert await mirror.settle(entities, mark=True) == []
    assert set(await pending(mirror, restaurant)) == {ahead.state.id, lost.state.id}


async def test_change_that_is_synced_before_its_reveal_is_not_pending(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror)
    placed = [builders.order(items=0, restaurant_id=restaurant, order_number="") for _ in range(2)]
    changes = [builders.change(one) for one in placed]
    for change in changes:
        assert isinstance(await mirror.claim(ORDER, change, encode(change), None, DAY), Claimed)
    quick, slow = changes
    await mirror.apply([applied(quick, "stored")])
    await mirror.apply([applied(change) for change in changes])
    assert await mirror.pending_ids(restaurant, "order") == [slow.entity_id]


async def warmed(mirror: Mirror, identity: int = 1) -> LogPosition:
    """Makes the mirror warm. If it was warm, it first becomes cold, like a mirror that has lost applied states."""
    assert await mirror.apply([], at=at_offset(10**9)) is None
    if (position := await mirror.log_position()) is not None:
        assert await mirror.go_back(position, NOTHING_APPLIED)
    await begun(mirror, at_offset(0))
    assert not await mirror.is_warm()
    server, _ = await mirror.server()
    named = mirror_identity(identity, builders.CREATED_AT)
    assert not await mirror.warm(at_offset(1), server, named)  # the position has changed since the mirror was filled
    assert not await mirror.warm(at_offset(0, crc=2), server, named)
    assert await mirror.warm(at_offset(0), server, named)
    assert await mirror.is_warm()
    return at_offset(0)


async def claimed(mirror: Mirror, restaurant: str, series: str | None = DAY) -> Any:
    change = builders.change(builders.order(items=0, restaurant_id=restaurant, order_number=""))
    return await mirror.claim(ORDER, change, encode(change), None, series)


async def fail_over_and_back(redis: Redis) -> None:
    """The process keeps its run id and its data, and gets another replication id."""
    await redis.command("REPLICAOF", "127.0.0.1", 1)
    await redis.command("REPLICAOF", "NO", "ONE")


async def test_only_a_warm_mirror_takes_claims_and_a_restart_makes_it_cold(mirror: Mirror, redis: Redis) -> None:
    restaurant = builders.new_id()
    await warmed(mirror)
    assert await claimed(mirror, restaurant) == Claimed("0001")
    await asyncio.to_thread(redis.stop)
    await asyncio.to_thread(redis.start)
    await eventually(lambda: answers(mirror), what="a server that answers again")
    assert await claimed(mirror, restaurant) == Cold()
    await warmed(mirror, identity=2)
    assert await claimed(mirror, restaurant) == Claimed("A0002")


@pytest.mark.parametrize("fault", ["failback", "restart", "flush"])
async def test_server_that_its_stamp_does_not_name_is_cold_to_every_script(
    mirror: Mirror, redis: Redis, fault: str
) -> None:
    restaurant = builders.new_id()
    await warmed(mirror)
    placed = [builders.change(builders.order(items=0, restaurant_id=restaurant, order_number="")) for _ in range(2)]
    for one in placed:
        assert isinstance(await mirror.claim(ORDER, one, encode(one), None, DAY), Claimed)
    if fault == "failback":
        before = await redis.command("INFO", "server")
        await fail_over_and_back(redis)
        after = await redis.command("INFO", "server")
        assert after["run_id"] == before["run_id"]
    elif fault == "restart":
        await asyncio.to_thread(redis.stop)
        await asyncio.to_thread(redis.start)
        await eventually(lambda: answers(mirror), what="a server that answers again")
    else:
        await redis.command("FLUSHALL")
    assert not await mirror.is_warm()
    assert not (await mirror.read(restaurant, "order", []))[0]
    assert await claimed(mirror, restaurant) == Cold()
    assert await mirror.take_back(placed[0]) is False
    assert await mirror.mark(keys.member(restaurant, "order", placed[1].entity_id)) is None
    # After the mirror writer has filled it, it is a new mirror: older claims are dropped, and may be taken again.
    await warmed(mirror, identity=2)
    assert await mirror.take_back(placed[0]) is False
    again = builders.change(builders.order(items=0, id=placed[0].entity_id, restaurant_id=restaurant, order_number=""))
    assert await mirror.claim(ORDER, again, encode(again), None, None) == Claimed("")


async def test_mirror_that_lost_a_part_of_the_log_is_cold_and_drops_its_claims(mirror: Mirror, redis: Redis) -> None:
    """Somebody restores an old copy into the running server. The copy has the stamp of this very server."""
    restaurant = builders.new_id()
    at = await warmed(mirror)
    left = builders.change(builders.order(items=0, restaurant_id=restaurant, order_number=""))
    assert await mirror.claim(ORDER, left, encode(left), None, DAY) == Claimed("0001")
    copy = [(key, await redis.command("DUMP", key)) for key in (keys.WARM, keys.LOG)]
    later = at_offset(at.offset + 1)
    assert await mirror.apply([], at=at, note=later) == []
    for key, value in copy:
        await redis.command("RESTORE", key, 0, value, "REPLACE")
    assert await mirror.is_warm(), "the restored copy has the stamp of this server"
    assert await mirror.apply([], at=later) is None
    assert not await mirror.is_warm()
    server, _ = await mirror.server()
    assert await mirror.warm(at, server, mirror_identity(2, builders.CREATED_AT))
    assert await mirror.mark(keys.member(restaurant, "order", left.entity_id)) is None, "the claim may be taken back"
    assert await claimed(mirror, restaurant) == Claimed("A0002")


async def test_numbers_of_the_days_after_the_next_business_day_have_no_prefix(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror, identity=28)
    assert builders.CREATED_AT.date().isoformat() == DAY
    for day, number in (("2026-03-13", "AA0001"), (DAY, "AA0001"), ("2026-03-16", "AA0001"), ("2026-03-17", "0001")):
        assert await claimed(mirror, restaurant, day) == Claimed(number)


async def test_claim_from_the_future_is_stale(redis: Redis) -> None:
    """The clock of the server was set back by an hour since the claim was made."""
    restaurant = builders.new_id()
    mirror = Mirror(redis.url, timeout=5.0, stale_seconds=30.0)
    await warmed(mirror)
    left, other = (builders.change(builders.order(items=0, restaurant_id=restaurant)) for _ in range(2))
    member = keys.member(restaurant, "order", left.entity_id)
    for one in (left, other):
        assert isinstance(await mirror.claim(ORDER, one, encode(one), None, None), Claimed)
    assert await mirror.mark(member) is None
    assert member not in await mirror.stale_claims()
    seconds, _ = await redis.command("TIME")
    future = (seconds + 3600) * 1000
    await redis.command("HSET", keys.claim(restaurant, "order", left.entity_id), "at", future)
    await redis.command("ZADD", keys.CLAIMS, future, member)
    assert [one for one in await mirror.stale_claims() if one.startswith(restaurant)] == [member]
    found = await mirror.mark(member)
    assert found is not None and found.change_id == left.id
    order = builders.order(items=0, id=left.entity_id, restaurant_id=restaurant, notes="another")
    another = builders.change(order)
    reply = await mirror.claim(ORDER, another, encode(another), None, None)
    assert isinstance(reply, Stale) and reply.change_id == left.id
    await mirror.close()


async def test_numbers_that_were_seen_are_not_given(mirror: Mirror, redis: Redis) -> None:
    restaurant = builders.new_id()
    await warmed(mirror)
    seen = [
        state(1, id_=builders.new_id(), restaurant=restaurant, order_number=number)
        for number in ("0041", "J1-0900", "", "0007", "B0100", "UE77777", "A12-9")
    ]
    await mirror.apply(seen)
    assert await claimed(mirror, restaurant) == Claimed("0042")
    assert await claimed(mirror, restaurant, series=None) == Claimed("")
    await redis.command("DEL", keys.WARM)
    await warmed(mirror, identity=2)
    assert [await claimed(mirror, restaurant) for _ in range(2)] == [Claimed("A0043"), Claimed("A0044")]
    await redis.command("DEL", keys.WARM)
    await warmed(mirror, identity=3)
    assert await claimed(mirror, restaurant) == Claimed("B0101")


async def test_number_too_long_to_count_from_does_not_spoil_the_series(mirror: Mirror) -> None:
    """The contract allows numbers of 40 digits. A counter at such a number would stop the series, and no mirror would
    become warm."""
    restaurant = builders.new_id()
    await warmed(mirror)
    for number in ("9" * 40, "A" + "9" * 39):
        await mirror.apply([state(1, id_=builders.new_id(), restaurant=restaurant, order_number=number)])
    assert await claimed(mirror, restaurant) == Claimed("0001")


async def test_repeated_claim_is_the_same_claim(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror)
    change = builders.change(builders.order(items=0, restaurant_id=restaurant))
    first = [await mirror.claim(ORDER, change, encode(change), None, DAY) for _ in range(3)]
    assert first == [Claimed("0001")] * 3
    assert await claimed(mirror, restaurant) == Claimed("0002")


async def test_claim_on_another_base_than_the_head_gets_the_head(mirror: Mirror) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    await warmed(mirror)
    one = state(2, 5, id_=id_, restaurant=restaurant)
    await mirror.apply([one])
    for base in (None, Head(1, one.head.change_id), Head(2, str(UUID(int=4)))):
        order = structs.replace(one.state, updated_at=one.state.updated_at + timedelta(seconds=1))
        change = builders.change(order, entityversion=(base.version if base else 0) + 1)
        reply = await mirror.claim(ORDER, change, encode(change), base, None)
        assert reply == HeadMoved(one.head, one.encoded)


async def test_position_only_moves_forward_when_two_writers_write_it(mirror: Mirror) -> None:
    await begun(mirror, at_offset(5))
    assert await mirror.apply([], at=at_offset(5), note=at_offset(9)) == []
    assert await mirror.apply([], at=at_offset(5), note=at_offset(7)) == []
    assert await mirror.log_position() == at_offset(9)
    await mirror.begin_log()  # the other writer finds a position, so it does not start again
    assert await mirror.log_position() == at_offset(9)


async def test_broken_position_moves_back_only_if_the_mirror_still_has_it(mirror: Mirror) -> None:
    await warmed(mirror)
    assert await mirror.apply([], at=at_offset(0), note=at_offset(9)) == []
    assert not await mirror.go_back(at_offset(7), NOTHING_APPLIED)
    assert not await mirror.go_back(at_offset(9, crc=2), NOTHING_APPLIED)
    assert await mirror.log_position() == at_offset(9)
    assert await mirror.go_back(at_offset(9), at_offset(4))
    assert await mirror.log_position() == at_offset(4)
    assert await mirror.apply([], at=at_offset(9), note=at_offset(10)) is None, "a writer with the old position goes on"
    assert await mirror.is_warm(), "the other writer took the mirror for one that has lost data"
    assert await mirror.apply([], at=at_offset(4), note=at_offset(10)) == []


async def test_mirror_that_lost_data_after_it_went_back_becomes_cold(mirror: Mirror, redis: Redis) -> None:
    await warmed(mirror)
    assert await mirror.apply([], at=at_offset(0), note=at_offset(9)) == []
    assert await mirror.go_back(at_offset(9), at_offset(4))
    copy = await redis.command("HGETALL", keys.LOG)
    assert await mirror.apply([], at=at_offset(4), note=at_offset(10)) == []
    assert await redis.command("HEXISTS", keys.LOG, "broken") == 0
    await redis.command("HSET", keys.LOG, *(part for pair in copy.items() for part in pair))
    assert await mirror.apply([], at=at_offset(10)) is None
    assert not await mirror.is_warm()


async def test_keyed_creation_outside_the_window_is_remembered_without_its_state(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror)
    placed = builders.order(items=0, restaurant_id=restaurant, request_hash="ab" * 32)
    change = builders.change(placed)
    await mirror.apply([applied(change, "stored")])
    assert await mirror.trim(restaurant, "order", {placed.id: change.id}) == 1
    assert await head_of(mirror, restaurant, placed.id) is None
    repeat = builders.change(builders.order(items=0, id=placed.id, restaurant_id=restaurant, order_number=""))
    assert await mirror.claim(ORDER, repeat, encode(repeat), None, DAY) == HeadMoved(change.head, None)
    # The log is read again: the mirror cannot know whether PostgreSQL has this state.
    assert await mirror.apply([applied(change, "late")]) == [0]
    assert await head_of(mirror, restaurant, placed.id) is None
    # A read of the order brings it back.
    await mirror.apply([applied(change, "stored")])
    assert await head_of(mirror, restaurant, placed.id) == change.head


async def test_job_outside_the_window_is_not_created_again(mirror: Mirror) -> None:
    """The state of a job does not tell whether it was created with a key."""
    restaurant, at = builders.new_id(), builders.CREATED_AT
    await warmed(mirror)
    job = BayJob(
        id=builders.new_id(),
        restaurant_id=restaurant,
        bay_id=builders.new_id(),
        title="Wash",
        created_at=at,
        updated_at=at,
    )
    change, repeat = builders.change(job), builders.change(structs.replace(job, title="Wash it"))
    await mirror.apply([applied(change, "stored")])
    assert await mirror.trim(restaurant, "job", {job.id: change.id}) == 1
    assert await mirror.claim(JOB, repeat, encode(repeat), None, None) == HeadMoved(change.head, None)


async def test_trimming_keeps_entities_that_changed_or_are_pending(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    old, changed, waiting = (builders.new_id() for _ in range(3))
    await mirror.apply([state(1, id_=id_, restaurant=restaurant, how="stored") for id_ in (old, changed)])
    await mirror.apply([state(1, id_=waiting, restaurant=restaurant)])
    seen = dict.fromkeys((old, changed, waiting), str(UUID(int=1)))
    await mirror.apply([state(2, 2, id_=changed, restaurant=restaurant, how="stored")])
    assert await mirror.trim(restaurant, "order", seen) == 1
    assert await head_of(mirror, restaurant, old) is None
    assert await head_of(mirror, restaurant, changed) is not None
    assert await head_of(mirror, restaurant, waiting) is not None
    assert set(await mirror.live_ids(restaurant, "order")) == {changed, waiting}
