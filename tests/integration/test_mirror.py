"""The mirror's connection and scripts on a real Redis: silence, breakers, forgotten scripts, and the guard in Lua."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from msgspec import structs
from redis.asyncio import from_url
from redis.exceptions import ResponseError

from shared.entities.contract import Outline, Standing, encode, now, outline
from shared.entities.order import ENTITY as ORDER
from shared.mirror import connection, keys
from shared.mirror.connection import MirrorAway, MirrorConnection, MirrorInDoubt, MirrorMisconfigured
from shared.mirror.mirror import Apply, Claimed, Cold, LogState, Mirror, Stands
from tests import builders
from tests.proxy import Mode, Proxy
from tests.servers import Redis, Servers
from tests.system import eventually

DAY = "2026-03-14"
BREAKER_OPEN = "the mirror did not answer a moment ago"
TIMEOUT = 5.0
IMPATIENT = 0.3  # for a server that is frozen


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """One for this module: its tests freeze it, stop it and make it forget."""
    return servers.extra_redis()


@pytest.fixture
async def link(redis: Redis) -> AsyncIterator[MirrorConnection]:
    link = MirrorConnection(redis.url, timeout=TIMEOUT)
    yield link
    await link.close()


@pytest.fixture
async def mirror(redis: Redis) -> AsyncIterator[Mirror]:
    mirror = Mirror(redis.url, timeout=5.0, stale_seconds=0.0)
    yield mirror
    await mirror.close()


@asynccontextmanager
async def configured(redis: Redis, setting: str, value: str | int) -> AsyncIterator[None]:
    """As long as the block lasts. By a client of its own, which waits for the server: left as it is, the setting would
    fail every test that comes after."""
    async with from_url(redis.url) as client:
        before = (await client.config_get(setting))[setting]
        await client.config_set(setting, value)
        try:
            yield
        finally:
            await client.config_set(setting, before)


async def answers(link: MirrorConnection) -> bool:
    try:
        return bool(await link.call("PING"))
    except (MirrorAway, MirrorInDoubt):
        return False


def state(version: int, change: int = 1, *, id_: str, restaurant: str, how: str = "reveal", **fields: Any) -> Apply:
    """One state of an order, whose notes say which."""
    notes = f"{version}/{change}"
    order = builders.order(items=0, id=id_, restaurant_id=restaurant, notes=notes, **fields)
    return Apply(ORDER, order, Standing(version, str(UUID(int=change))), encode(order), now(), how)


# -- the connection --------------------------------------------------------------------------------------------


async def test_calls_that_wait_at_the_same_moment_get_their_own_replies(link: MirrorConnection) -> None:
    replies = await asyncio.gather(*(link.call("ECHO", f"{n}") for n in range(2_000)))
    assert replies == [f"{n}".encode() for n in range(2_000)]


async def test_an_error_of_the_server_reaches_its_own_caller_alone(link: MirrorConnection) -> None:
    good, bad, also = await asyncio.gather(
        link.call("ECHO", "a"), link.call("NO SUCH COMMAND"), link.call("ECHO", "b"), return_exceptions=True
    )
    assert (good, also) == (b"a", b"b")
    assert isinstance(bad, ResponseError)


@pytest.fixture
async def hasty(redis: Redis) -> AsyncIterator[MirrorConnection]:
    """Does not wait long for a server that is frozen."""
    hasty = MirrorConnection(redis.url, timeout=IMPATIENT)
    yield hasty
    await hasty.close()


async def test_a_frozen_server_is_in_doubt_once_then_away_at_once_and_a_probe_heals(
    link: MirrorConnection, hasty: MirrorConnection, redis: Redis
) -> None:
    await link.call("SET", "k", "before")
    await eventually(lambda: answers(hasty), what="a connection")
    await asyncio.to_thread(redis.freeze)
    try:
        sent = await asyncio.gather(hasty.call("INCR", "n"), hasty.call("GET", "k"), return_exceptions=True)
        assert [type(one) for one in sent] == [MirrorInDoubt, MirrorInDoubt]
        refusals = set()

        async def down() -> bool:
            with pytest.raises(MirrorAway) as away:  # probes fail too
                await hasty.call("PING")
            refusals.add(str(away.value))
            return hasty.down and BREAKER_OPEN in refusals

        await eventually(down, what="several attempts in a row failed, and calls between them refused without one")
    finally:
        await asyncio.to_thread(redis.thaw)
    await eventually(lambda: answers(hasty), what="a probe that heals")
    assert hasty.available
    assert not hasty.down

    async def own_replies() -> list[Any] | None:
        try:
            return await asyncio.gather(hasty.call("GET", "k"), hasty.call("ECHO", "mine"))
        except (MirrorAway, MirrorInDoubt):
            return None

    # Replies of what was in doubt went nowhere: the next caller gets its own.
    replies = await eventually(own_replies, what="two replies", until=lambda seen: seen is not None)
    assert replies == [b"before", b"mine"]


async def test_a_server_that_is_gone_is_away_and_nothing_was_sent() -> None:
    link = MirrorConnection("redis://127.0.0.1:1/0", timeout=TIMEOUT)
    for _ in range(3):
        with pytest.raises(MirrorAway):
            await link.call("PING")
    await link.close()
    await link.close()


async def test_scripts_that_the_server_forgot_are_loaded_again_for_everybody_who_waits(mirror: Mirror) -> None:
    await mirror.check()
    for _ in range(5):
        await mirror._redis.call("SCRIPT", "FLUSH")
        found = await asyncio.wait_for(
            asyncio.gather(*(mirror.read("r", "order", [f"{n}" * 200]) for n in range(700))), 10
        )
        assert [documents for _, documents in found] == [[None]] * 700


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_evicts_is_refused(redis: Redis, link: MirrorConnection, policy: str) -> None:
    async with configured(redis, "maxmemory-policy", policy):
        with pytest.raises(MirrorMisconfigured):
            await link.check()


async def test_a_server_that_is_full_says_that_nothing_happened_and_still_answers_readers(
    mirror: Mirror, redis: Redis
) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    await mirror.apply([state(1, id_=id_, restaurant=restaurant)])
    async with configured(redis, "maxmemory", 1):
        with pytest.raises(MirrorAway):
            await mirror.apply([state(2, id_=id_, restaurant=restaurant)])
        assert await standing(mirror, restaurant, id_) == Standing(1, str(UUID(int=1)))
    await mirror.apply([state(2, id_=id_, restaurant=restaurant)])
    assert await standing(mirror, restaurant, id_) == Standing(2, str(UUID(int=1)))


async def test_closing_answers_everybody_who_still_waits(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_MAX_PIPELINE", 1)
    link = MirrorConnection(redis.url, timeout=TIMEOUT)
    calls = [asyncio.create_task(link.call("PING")) for _ in range(50)]
    await asyncio.sleep(0)
    await link.close()
    for one in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5):
        assert one == b"PONG" or isinstance(one, (MirrorAway, MirrorInDoubt))


# -- scripts ---------------------------------------------------------------------------------------------------


async def standing(mirror: Mirror, restaurant: str, id_: str) -> Standing | None:
    _, (document,) = await mirror.read(restaurant, "order", [id_])
    return document.standing if document else None


arrivals = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=10)


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(arrivals=arrivals, more=st.lists(st.integers(0, 9), max_size=6), split=st.integers(1, 10))
async def test_any_order_and_any_repetition_of_states_end_the_same_in_lua(
    mirror: Mirror, arrivals: list[tuple[int, int]], more: list[int], split: int
) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    arrivals = arrivals + [arrivals[n % len(arrivals)] for n in more]
    states = [state(version, change, id_=id_, restaurant=restaurant) for version, change in arrivals]
    for start in range(0, len(states), split):
        await mirror.apply(states[start : start + split])  # several of one order in a batch too
    version, change = max(arrivals)
    _, (found,) = await mirror.read(restaurant, "order", [id_])
    assert found is not None
    assert found.standing == Standing(version, str(UUID(int=change)))
    assert ORDER.decode_state(found.state).notes == f"{version}/{change}"
    assert found.pending


def _outline(one: Apply) -> Outline:
    found = outline(encode(builders.change(one.state, entityversion=one.standing.version)))
    assert found is not None
    return structs.replace(found, id=one.standing.change_id)


@settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(arrivals=arrivals, next_one=st.tuples(st.integers(1, 12), st.integers(1, 4)))
async def test_the_mirror_lacks_exactly_what_would_change_it(
    mirror: Mirror, arrivals: list[tuple[int, int]], next_one: tuple[int, int]
) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    await mirror.apply([state(*one, id_=id_, restaurant=restaurant) for one in arrivals])
    other = state(1, id_=builders.new_id(), restaurant=restaurant)
    wanted = [state(*next_one, id_=id_, restaurant=restaurant), other]
    places = [1] if next_one <= max(arrivals) else [0, 1]
    assert await mirror.lacks([_outline(one) for one in wanted]) == places
    await mirror.apply(wanted)
    assert await mirror.lacks([_outline(one) for one in wanted]) == []


async def test_a_state_that_left_the_window_or_whose_claim_was_left_standing_is_lacking(mirror: Mirror) -> None:
    restaurant, series = builders.new_id(), DAY
    await warmed(mirror, restaurant)
    placed = builders.order(items=0, restaurant_id=restaurant, request_hash="ab" * 32, order_number="")
    change = builders.change(placed)
    assert isinstance(await mirror.claim(ORDER, change, encode(change), None, series, 0), Claimed)
    found = outline(encode(change))
    assert found is not None
    assert await mirror.lacks([found]) == [0]
    reveal = Apply(ORDER, placed, change.standing, bytes(change.data.after), change.time, "stored")
    await mirror.apply([reveal])
    assert await mirror.lacks([found]) == []
    await mirror.trim(restaurant, "order", {placed.id: change.id})
    assert await mirror.lacks([found]) == [0], "only its version is remembered"
    await mirror.apply([reveal])
    await mirror._redis.call("HSET", keys.claim(restaurant, "order", placed.id), "v", 1)
    assert await mirror.lacks([found]) == [0], "a claim whose version is taken is cleared by apply"


async def test_what_one_mirror_lacks_is_not_applied_to_another_that_is_cold(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror, restaurant)
    at = await mirror.log_state()
    assert at is not None
    one = state(1, id_=builders.new_id(), restaurant=restaurant)
    note = LogState(at.epoch, at.offset + 1)
    await mirror._redis.call("DEL", keys.WARM)  # as a replica that was promoted: it has the log state and no stamp
    assert await mirror.apply([one], at=at, note=note, only_warm=True) is None
    assert await mirror.log_state() == at
    assert await mirror.apply([one], at=at, note=note) == []


async def test_a_late_state_of_a_missing_document_is_reported_and_not_written(mirror: Mirror) -> None:
    restaurant, there, missing = (builders.new_id() for _ in range(3))
    await mirror.apply([state(1, id_=there, restaurant=restaurant)])
    late = [state(2, id_=id_, restaurant=restaurant, how="late") for id_ in (missing, there)]
    assert await mirror.apply(late) == [0]
    assert await standing(mirror, restaurant, missing) is None
    assert await standing(mirror, restaurant, there) == late[1].standing


async def test_states_for_another_mirror_than_the_one_that_was_filled_are_refused(mirror: Mirror) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    await mirror.begin_log(LogState("epoch", 7))
    one = state(1, id_=id_, restaurant=restaurant)
    assert await mirror.apply([one], at=LogState("epoch", 8), note=LogState("epoch", 9)) is None
    assert await mirror.apply([one], at=LogState("other", 7), note=LogState("other", 8)) is None
    assert await standing(mirror, restaurant, id_) is None
    assert await mirror.apply([one], at=LogState("epoch", 7), note=LogState("epoch", 8)) == []
    assert await mirror.log_state() == LogState("epoch", 8, lost=True)


async def test_what_postgres_committed_settles_what_stands_and_not_what_came_after(mirror: Mirror) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    first, second = (state(version, id_=id_, restaurant=restaurant) for version in (1, 2))

    async def pending() -> bool:
        _, (document,) = await mirror.read(restaurant, "order", [id_])
        assert document is not None
        return document.pending

    await mirror.apply([first, second])
    await mirror.settle(restaurant, "order", [(id_, first.standing)], failure=b'{"error": "old"}')
    await mirror.settle(restaurant, "order", [(id_, first.standing)])
    assert await pending()
    await mirror.settle(restaurant, "order", [(id_, second.standing)], failure=b'{"error": "x"}')
    assert await mirror.counts(restaurant, "order") == (1, 1)
    await mirror.settle(restaurant, "order", [(id_, second.standing)])
    assert not await pending()
    assert await mirror.counts(restaurant, "order") == (0, 0)


async def test_what_postgres_committed_before_it_was_revealed_is_not_pending(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror, restaurant)
    placed = [builders.order(items=0, restaurant_id=restaurant, order_number="") for _ in range(2)]
    changes = [builders.change(one) for one in placed]
    for change in changes:
        assert isinstance(await mirror.claim(ORDER, change, encode(change), None, DAY, 0), Claimed)
    quick, slow = changes
    another = Standing(1, builders.new_id())  # the other side of a fork
    await mirror.settle(restaurant, "order", [(placed[0].id, quick.standing), (placed[1].id, another)])
    await mirror.apply(
        [
            Apply(ORDER, order, change.standing, bytes(change.data.after), change.time)
            for order, change in zip(placed, changes, strict=True)
        ]
    )
    assert await mirror.pending_ids(restaurant, "order") == [slow.entity_id]


async def warmed(mirror: Mirror, restaurant: str, gap: int = 0) -> None:
    epoch = builders.new_id()
    await mirror.begin_log(LogState(epoch, 0))
    assert not await mirror.is_warm()
    assert not await mirror.warm(LogState(epoch, 1), [], 0)  # not the mirror that was filled
    assert await mirror.warm(LogState(epoch, 0), [(restaurant, DAY)], gap)
    assert await mirror.is_warm()


async def claimed(mirror: Mirror, restaurant: str, series: str | None = DAY, floor: int = 0) -> Any:
    change = builders.change(builders.order(items=0, restaurant_id=restaurant, order_number=""))
    return await mirror.claim(ORDER, change, encode(change), None, series, floor)


async def test_claims_are_taken_on_a_warm_mirror_alone_and_a_restart_makes_it_cold(
    mirror: Mirror, redis: Redis
) -> None:
    restaurant = builders.new_id()
    await warmed(mirror, restaurant)
    assert await claimed(mirror, restaurant) == Claimed("0001")
    await asyncio.to_thread(redis.stop)
    await asyncio.to_thread(redis.start)
    await eventually(lambda: answers(mirror._redis), what="the server again")
    assert await claimed(mirror, restaurant) == Cold()
    await warmed(mirror, restaurant, gap=100)
    assert await claimed(mirror, restaurant) == Claimed("0102")


async def test_a_number_that_was_seen_or_is_below_the_floor_is_not_given(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror, restaurant)
    seen = [
        state(1, id_=builders.new_id(), restaurant=restaurant, order_number=number)
        for number in ("0041", "J1-0900", "", "0007")
    ]
    await mirror.apply(seen)
    assert await claimed(mirror, restaurant) == Claimed("0042")
    assert await claimed(mirror, restaurant, floor=50) == Claimed("0051")
    assert await claimed(mirror, restaurant, series=None) == Claimed("")


async def test_a_number_too_long_to_count_from_does_not_spoil_the_series(mirror: Mirror) -> None:
    """The contract takes any 40 digits; as a counter they would end order numbers, and the warming of every mirror."""
    restaurant = builders.new_id()
    await warmed(mirror, restaurant)
    await mirror.apply([state(1, id_=builders.new_id(), restaurant=restaurant, order_number="9" * 40)])
    assert await claimed(mirror, restaurant) == Claimed("0001")
    await warmed(mirror, restaurant, gap=10)
    assert await claimed(mirror, restaurant) == Claimed("0012")


async def test_the_same_claim_sent_again_is_the_same_claim(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror, restaurant)
    change = builders.change(builders.order(items=0, restaurant_id=restaurant))
    first = [await mirror.claim(ORDER, change, encode(change), None, DAY, 0) for _ in range(3)]
    assert first == [Claimed("0001")] * 3
    assert await claimed(mirror, restaurant) == Claimed("0002")


async def test_a_claim_on_another_base_than_what_stands_learns_what_stands(mirror: Mirror) -> None:
    restaurant, id_ = builders.new_id(), builders.new_id()
    await warmed(mirror, restaurant)
    one = state(2, 5, id_=id_, restaurant=restaurant)
    await mirror.apply([one])
    for base in (None, Standing(1, one.standing.change_id), Standing(2, str(UUID(int=4)))):
        order = structs.replace(one.state, updated_at=one.state.updated_at + timedelta(seconds=1))
        change = builders.change(order, entityversion=(base.version if base else 0) + 1)
        reply = await mirror.claim(ORDER, change, encode(change), base, None, 0)
        assert reply == Stands(one.standing, one.encoded)


async def test_the_log_state_moves_forward_only_so_that_two_writers_do_not_fight(mirror: Mirror) -> None:
    epoch = builders.new_id()
    await mirror.begin_log(LogState(epoch, 5))
    assert await mirror.apply([], at=LogState(epoch, 5), note=LogState(epoch, 9)) == []
    assert await mirror.apply([], at=LogState(epoch, 5), note=LogState(epoch, 7)) == []
    assert await mirror.log_state() == LogState(epoch, 9)
    await mirror.begin_log(LogState(epoch, -1))  # the other one found the same log: it does not begin again
    assert await mirror.log_state() == LogState(epoch, 9)


async def test_numbered_orders_that_the_log_brings_to_a_cold_mirror_say_that_numbers_were_lost(mirror: Mirror) -> None:
    epoch, restaurant = builders.new_id(), builders.new_id()
    await mirror.begin_log(LogState(epoch, 0))
    one = state(1, id_=builders.new_id(), restaurant=restaurant, order_number="0001")
    await mirror.apply([one], at=LogState(epoch, 0), note=LogState(epoch, 1))
    found = await mirror.log_state()
    assert found is not None and found.lost
    assert await mirror.warm(LogState(epoch, 1), [(restaurant, DAY)], 10)
    again = state(1, id_=builders.new_id(), restaurant=restaurant, order_number="0002")
    await mirror.apply([again], at=LogState(epoch, 1), note=LogState(epoch, 2))
    found = await mirror.log_state()
    assert found is not None and not found.lost, "a warm mirror that is told of an order has lost nothing"


async def test_a_keyed_creation_that_left_the_window_is_remembered_without_its_state(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    await warmed(mirror, restaurant)
    placed = builders.order(items=0, restaurant_id=restaurant, request_hash="ab" * 32)
    change = builders.change(placed)
    stored = Apply(ORDER, placed, change.standing, bytes(change.data.after), change.time, "stored")
    await mirror.apply([stored])
    assert await mirror.trim(restaurant, "order", {placed.id: change.id}) == 1
    assert await standing(mirror, restaurant, placed.id) is None
    repeat = builders.change(builders.order(items=0, id=placed.id, restaurant_id=restaurant, order_number=""))
    assert await mirror.claim(ORDER, repeat, encode(repeat), None, DAY, 0) == Stands(change.standing, None)
    await mirror.apply([stored])  # it is read, and comes back
    assert await standing(mirror, restaurant, placed.id) == change.standing


async def test_trimming_leaves_what_changed_since_it_was_looked_at_and_what_is_pending(mirror: Mirror) -> None:
    restaurant = builders.new_id()
    old, changed, waiting = (builders.new_id() for _ in range(3))
    await mirror.apply([state(1, id_=id_, restaurant=restaurant, how="stored") for id_ in (old, changed)])
    await mirror.apply([state(1, id_=waiting, restaurant=restaurant)])
    seen = dict.fromkeys((old, changed, waiting), str(UUID(int=1)))
    await mirror.apply([state(2, 2, id_=changed, restaurant=restaurant, how="stored")])
    assert await mirror.trim(restaurant, "order", seen) == 1
    assert await standing(mirror, restaurant, old) is None
    assert await standing(mirror, restaurant, changed) is not None
    assert await standing(mirror, restaurant, waiting) is not None
    assert set(await mirror.live_ids(restaurant, "order")) == {changed, waiting}


def test_a_link_that_was_reset_answers_every_caller_on_the_loop_of_production() -> None:
    """uvloop has an error of its own for a write to a transport that a reset has closed."""
    import socket
    import struct

    import uvloop

    async def reset_at_once() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sent = writer.get_extra_info("socket")
            writer.write(b"+OK\r\n" * 8)  # whatever the client says first
            await reader.read(1)
            sent.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        link = MirrorConnection(f"redis://127.0.0.1:{port}/0", timeout=0.5)
        for _ in range(5):
            with pytest.raises((MirrorAway, MirrorInDoubt)):
                await asyncio.wait_for(link.call("PING"), 3.0)
        await link.close()
        server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(reset_at_once())


async def test_of_many_calls_to_a_server_that_does_not_answer_one_tries_it_and_none_waits_for_it(redis: Redis) -> None:
    proxy = Proxy(redis.port)
    await proxy.start()
    link = MirrorConnection(f"redis://127.0.0.1:{proxy.port}/0", timeout=20.0)
    try:
        assert await answers(link)
        proxy.set(Mode.REFUSE)
        assert not await answers(link)
        proxy.set(Mode.STALL)

        async def half_open() -> bool:
            return link.available

        await eventually(half_open, what="the breaker to let one through")
        tried = proxy.accepted
        calls = [asyncio.create_task(link.call("PING")) for _ in range(50)]
        done, waiting = await asyncio.wait(calls, timeout=10.0)
        assert not waiting, "the probe itself takes twenty seconds"
        assert {type(call.exception()) for call in done} == {MirrorAway}

        async def arrived() -> bool:
            return proxy.accepted > tried

        await eventually(arrived, what="the one that tries it at the server: the calls wait for it only a moment")
        _, fence = await asyncio.open_connection("127.0.0.1", proxy.port)

        async def behind_all() -> bool:
            return proxy.accepted >= tried + 2

        await eventually(behind_all, what="the fence: connections are accepted in the order in which they are made")
        assert proxy.accepted == tried + 2, "the one that tries it, and the fence"
        fence.transport.abort()
        proxy.set(Mode.FORWARD)

        async def back() -> bool:
            return await answers(link)

        await eventually(back, what="an answer")
        assert await asyncio.gather(*(link.call("PING") for _ in range(50))) == [b"PONG"] * 50
    finally:
        await link.close()
        await proxy.stop()


async def test_what_a_server_that_hung_up_was_not_sent_is_not_in_doubt(redis: Redis) -> None:
    proxy = Proxy(redis.port)
    await proxy.start()
    link = MirrorConnection(f"redis://127.0.0.1:{proxy.port}/0", timeout=5.0)
    try:
        for _ in range(3):
            assert await answers(link)
            connection = link._connection
            proxy.set(Mode.REFUSE)

            async def hung_up(connection: Any = connection) -> bool:
                return bool(connection._reader.at_eof())

            await eventually(hung_up, what="the end of the connection")
            proxy.set(Mode.FORWARD)
            assert await link.call("PING") == b"PONG"
        proxy.set(Mode.REFUSE)
        await eventually(lambda: hung_up(link._connection), what="the end of the connection")
        with pytest.raises(MirrorAway):
            await link.call("PING")
    finally:
        await link.close()
        await proxy.stop()


async def test_a_breaker_that_was_tripped_a_thousand_times_still_answers() -> None:
    link = MirrorConnection("redis://127.0.0.1:9/0", timeout=0.2)
    link._failures = 5_000
    with pytest.raises(MirrorAway):
        await asyncio.wait_for(link.call("PING"), 3.0)
    await link.close()
