"""The dead-letter collector on real servers: each dead letter is in `dead_letters` once, unchanged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import asyncpg
import pytest

from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.collector import DeadLetterCollector
from services.sync.failures import retry_store
from services.sync.failures.classification import Failure, FailureKind
from services.sync.failures.retry_ladder import FailedChange, headers_for
from shared.entities.contract import MAX_EVENT_BYTES, Change, Lane, encode, now
from shared.messaging import topology
from shared.postgres.pool import Connection, Postgres
from shared.rail.assemble import publisher_of
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, menu_item, message, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NEGATIVE = (b'"total":', b'"total":-')


@pytest.fixture
async def kept(rig: Rig) -> Rig:
    rig.collector.start()
    return rig


def poison(**fields: Any) -> bytes:
    return encode(change(order(items=1), **fields)).replace(*NEGATIVE)


# -- bad input -----------------------------------------------------------------------------------------------------

BAD = {
    "undecodable": b"this is not JSON",
    "unsupported_specversion": message(change(order(), specversion="0.3")),
    "unknown_type": message(change(order(), type="ticketrail.order.eaten.v1")),
    "unsupported_version": message(change(order(), type="ticketrail.order.created.v2")),
    "missing_tenant": message(encode(change(order())).replace(b'"restaurantid"', b'"restaurant"')),
    "wrong_tenant": message(change(order(restaurant_id=OTHER_RESTAURANT), restaurantid=RESTAURANT)),
    "negative_amount": message(poison()),
}


def too_large() -> bytes:
    return message(encode(change(order())).replace(b'"before":{}', b'"before":{"x":"' + b"y" * 10_000_000 + b'"}'))


async def test_each_kind_of_bad_input_is_kept_with_a_fingerprint_of_its_own(kept: Rig) -> None:
    bad = {**BAD, "too_large": too_large()}
    assert len(bad["too_large"]) > MAX_EVENT_BYTES
    good = change(order())
    # A message of 10 MB goes to two queues, so its confirm takes longer.
    settings = kept.settings.model_copy(update={"publish_timeout_seconds": 30.0})
    patient = publisher_of(settings)
    await patient.start(wait=10)
    for body in bad.values():
        await patient.publish(Lane.CRITICAL.value, body)
    await patient.stop()
    await kept.publish(good)
    found = {one.reason: one for one in await kept.dead_letters(len(bad))}
    assert set(found) == set(bad)
    assert len({one.fingerprint for one in found.values()}) == len(bad)
    for reason, body in bad.items():
        assert found[reason].body == body
        assert found[reason].place.startswith("shared.entities."), found[reason].place
    groups = {
        group.reason: group
        for group in await dead_letter_store.groups(kept.database, dead_letter_store.DeadLetterQuery())
    }
    assert {reason: group.count for reason, group in groups.items()} == dict.fromkeys(bad, 1)
    assert ">= 0" in groups["negative_amount"].sample_error
    await kept.written(good)
    await kept.all_acknowledged()
    assert await kept.count("changes") == 1


async def test_good_changes_among_bad_ones_are_all_written(kept: Rig) -> None:
    good = [change(order(items=1)) for _ in range(400)]
    bad = [poison() for _ in range(400)]
    for start in range(0, 400, 4):
        mixed = [one for pair in zip(good[start : start + 2], bad[start : start + 2], strict=True) for one in pair]
        await kept.publish(*mixed)
        await kept.publish(*good[start + 2 : start + 4])
        for one in bad[start + 2 : start + 4]:
            await kept.publish(one)
    await kept.written(*good, within=60)
    dead_letters = await kept.dead_letters(400, within=60, reason="negative_amount")
    assert {one.body for one in dead_letters} == {message(one) for one in bad}
    assert len({one.fingerprint for one in dead_letters}) == 1
    await kept.all_acknowledged()
    await kept.metric_becomes('ticketrail_dead_letters_kept_total{reason="negative_amount"}', 400)


async def test_refused_dead_letters_go_through_the_dead_queue_and_their_batch_is_written(kept: Rig) -> None:
    # The collector tries a dead letter again without the refused fields. The writer does not.
    await kept.as_owner("alter table dead_letters add check (type is distinct from 'ticketrail.order.created.v1')")
    good, bad, unrefused = change(menu_item()), [poison() for _ in range(9)], b"not JSON"
    await kept.publisher.publish(Lane.CRITICAL.value, unrefused)
    await kept.publish(*bad, good)
    await kept.written(good)
    dead_letters = await kept.dead_letters(10, within=60)
    assert {dead_letter.body for dead_letter in dead_letters} == {unrefused, *(message(one) for one in bad)}
    refused = [dead_letter for dead_letter in dead_letters if dead_letter.body != unrefused]
    assert all(dead_letter.type is None and dead_letter.headers == {} for dead_letter in refused)
    await kept.all_acknowledged()


async def test_many_changes_that_die_on_the_retry_ladder_keep_all_their_attempts(kept: Rig) -> None:
    await fail_forever(kept)
    unlucky = [change(order(items=1, notes="unlucky")) for _ in range(12)]
    await asyncio.gather(*(kept.publish(one) for one in unlucky))
    dead_letters = await kept.dead_letters(12, within=60)
    for dead_letter in dead_letters:
        assert (dead_letter.reason, dead_letter.deaths) == ("transient", 1)
        assert [one.reason for one in dead_letter.attempts] == ["transient"] * 3

    # The row of the last retry may be inserted after the dead letter is stored. retry_store.sweep then removes the row.
    async def on_ladder() -> int:
        return await kept.count("retries")

    await eventually(on_ladder, what="an empty table of retries", until=lambda count: count == 0)
    await kept.all_acknowledged()


async def test_poison_message_with_foreign_headers_is_kept(kept: Rig) -> None:
    strange: dict[str, int | str] = {"event": "x", "queue": "y", "level": "z", "big": "x" * 100_000}
    await kept.publisher.publish(Lane.CRITICAL.value, b"garbage", headers=strange)
    [dead_letter] = await kept.dead_letters(1)
    assert (dead_letter.headers["event"], dead_letter.headers["queue"]) == ("x", "y")
    await kept.all_acknowledged()
    assert kept.writer.state()["failed"] == 1


# -- content of a dead letter --------------------------------------------------------------------------------------


async def test_dead_letter_shows_its_tenant_its_change_the_failure_and_the_time(kept: Rig) -> None:
    made = change(order(), source="terminal/T-7", traceparent=TRACE)
    broken = encode(made).replace(*NEGATIVE)
    await kept.publish(broken)
    [dead_letter] = await kept.dead_letters(1)
    assert (dead_letter.queue, dead_letter.lane) == (topology.dead_queue(Lane.CRITICAL), "critical")
    assert (dead_letter.change_id, dead_letter.entity, dead_letter.entity_id) == (made.id, "order", made.entity_id)
    assert (dead_letter.restaurant_id, dead_letter.version) == (RESTAURANT, 1)
    assert (dead_letter.terminal_id, dead_letter.trace_id) == ("T-7", TRACE.split("-")[1])
    assert (dead_letter.reason, dead_letter.place) == ("negative_amount", "shared.entities.entity:decode")
    assert (dead_letter.status, dead_letter.deaths, dead_letter.revision) == ("open", 1, 1)
    assert [one.reason for one in dead_letter.attempts] == ["negative_amount"]
    assert dead_letter.first_failed_at == dead_letter.last_failed_at == dead_letter.attempts[0].at
    assert dead_letter.headers["ticketrail-change-id"] == made.id
    assert dead_letter.body == message(broken)
    assert await kept.depth(topology.dead_queue(Lane.CRITICAL)) == 0


async def test_dead_letter_lists_every_attempt_of_the_retry_ladder(kept: Rig) -> None:
    await fail_forever(kept)
    unlucky = change(order(notes="unlucky"))
    await kept.publish(unlucky)
    [dead_letter] = await kept.dead_letters(1)
    # The attempts are the first one and one from each of the two retry queues.
    assert [one.reason for one in dead_letter.attempts] == ["transient"] * 3
    assert all("try again" in one.error and "write" in one.place for one in dead_letter.attempts)
    assert (
        dead_letter.first_failed_at
        == dead_letter.attempts[0].at
        < dead_letter.attempts[1].at
        < dead_letter.last_failed_at
    )


async def fail_forever(rig: Rig) -> None:
    """Makes every write of an order with the notes 'unlucky' fail with a serialization failure."""
    await rig.as_owner(
        """
        create function fail() returns trigger language plpgsql as $$
        begin
            if new.notes = 'unlucky' then
                raise exception 'try again' using errcode = 'serialization_failure';
            end if;
            return new;
        end $$;
        create trigger fail before insert or update on orders for each row execute function fail();
        """
    )


@pytest.mark.parametrize(
    "body", [b"", b"\x00\xff\xfe \x80 not UTF-8", b"[" * 50_000, b'[{"id":"\\u0000"}]', b'[{"id":"\\ud800"}]', b"[]"]
)
async def test_dead_letter_of_any_content_is_kept_byte_for_byte(make_rig: MakeRig, body: bytes) -> None:
    rig = await make_rig()
    rig.collector.start()
    await rig.publisher.publish_to_queue(topology.dead_queue(Lane.NORMAL), body)
    [dead_letter] = await rig.dead_letters(1)
    assert dead_letter.body == body
    assert await rig.depth(topology.dead_queue(Lane.NORMAL)) == 0


async def test_large_dead_letters_are_kept_one_at_a_time(make_rig: MakeRig) -> None:
    rig = await make_rig()
    bodies = [bytes([number]) * 10_000_000 for number in range(1, 5)]
    for body in bodies:
        await rig.publisher.publish_to_queue(topology.dead_queue(Lane.NORMAL), body, timeout=30)
    rig.collector.start()
    dead_letters = await rig.dead_letters(4, within=60)
    assert sorted(dead_letter.body for dead_letter in dead_letters) == bodies


async def test_field_that_postgres_refuses_is_left_out_and_the_body_is_kept(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.as_owner("alter table dead_letters add check (type is distinct from 'ticketrail.menu_item.created.v1')")
    strange, good = change(menu_item()), change(order())
    for one in (strange, good):
        await rig.publisher.publish_to_queue(topology.dead_queue(Lane.NORMAL), message(one))
    rig.collector.start()
    dead_letters = {dead_letter.change_id: dead_letter for dead_letter in await rig.dead_letters(2)}
    assert (dead_letters[strange.id].type, dead_letters[strange.id].body) == (None, message(strange))
    assert dead_letters[good.id].type == good.type


async def test_batch_over_the_delivery_limit_becomes_one_dead_letter_per_change(make_rig: MakeRig) -> None:
    rig = await make_rig()
    several = [change(order(items=1)) for _ in range(3)]
    await rig.publish(*several)
    async with rig.channel() as channel:
        queue = await channel.get_queue(topology.lane_queue(Lane.CRITICAL))
        for _ in range(topology.DELIVERY_LIMIT + 1):
            taken = await eventually(lambda: queue.get(fail=False), what="a repeated delivery")
            await taken.nack(requeue=True)
    rig.collector.start()
    dead_letters = await rig.dead_letters(3)
    assert {dead_letter.change_id for dead_letter in dead_letters} == {one.id for one in several}
    for dead_letter in dead_letters:
        assert (dead_letter.reason, dead_letter.place) == ("delivery_limit", "broker")
        assert "delivery_limit in sync.postgres.critical.v1" in dead_letter.error


# -- repeated deliveries and deaths --------------------------------------------------------------------------------


async def test_dead_letter_that_is_delivered_twice_counts_one_death(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.writer.start()
    await rig.publish(poison())
    [dead] = await rig.dead_letters(1)
    headers = {name: value for name, value in dead.headers.items() if isinstance(value, str | int)}
    for _ in range(3):
        await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), dead.body, headers=headers)
    await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), b"the last one")
    rig.collector.start()
    await rig.metric_becomes('ticketrail_dead_letters_kept_total{reason="delivery_limit"}', 1)
    [dead_letter] = await rig.dead_letters(1, reason="negative_amount")
    assert (dead_letter.deaths, dead_letter.revision, len(dead_letter.attempts)) == (1, 1, 1)
    assert rig.counted('ticketrail_dead_letters_kept_total{reason="negative_amount"}') == 1


@pytest.mark.parametrize("status", ["open", "discarded", "resolved"])
async def test_change_that_dies_again_is_the_same_dead_letter_and_opens_it_again(kept: Rig, status: str) -> None:
    broken = poison()
    await kept.publish(broken)
    [first] = await kept.dead_letters(1)
    closed = "now()" if status != "open" else "null"
    await kept.database.execute(f"update dead_letters set status = $1, closed_at = {closed}", status)
    await kept.publish(broken)
    [dead_letter] = await eventually(
        lambda: kept.dead_letters(1), what="another death of the change", until=lambda found: found[0].deaths == 2
    )
    assert (dead_letter.id, dead_letter.status, dead_letter.revision, dead_letter.closed_at) == (
        first.id,
        "open",
        2,
        None,
    )
    assert len(dead_letter.attempts) == 2
    assert dead_letter.first_failed_at == first.first_failed_at < dead_letter.last_failed_at


async def test_another_copy_that_dies_during_a_replay_does_not_end_the_replay(kept: Rig) -> None:
    broken = poison()
    await kept.publish(broken)
    [first] = await kept.dead_letters(1)
    await kept.database.execute("update dead_letters set status = 'replaying'")
    await kept.publish(broken)
    [dead_letter] = await eventually(
        lambda: kept.dead_letters(1), what="another death of the change", until=lambda found: found[0].deaths == 2
    )
    assert dead_letter.status == "replaying"
    await kept.publisher.publish_to_queue(
        topology.lane_queue(Lane.CRITICAL), message(broken), headers={"ticketrail-replay": first.id}
    )
    [dead_letter] = await eventually(
        lambda: kept.dead_letters(1), what="another death of the change", until=lambda found: found[0].deaths == 3
    )
    assert dead_letter.status == "open"


async def test_dead_letter_of_the_mirror_that_is_read_again_counts_one_death(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.collector.start()
    broken = message(poison())
    for at in ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"):
        headers: dict[str, int | str] = {"ticketrail-reason": "negative_amount", "ticketrail-failed-at": at}
        await rig.publisher.publish_to_queue(topology.MIRROR_DEAD, broken, headers=headers)
    await eventually(lambda: rig.depth(topology.MIRROR_DEAD), what="an empty dead-letter queue", until=lambda n: n == 0)
    [dead_letter] = await rig.dead_letters(1)
    assert (dead_letter.lane, dead_letter.deaths, dead_letter.revision) == (None, 1, 1)


@pytest.mark.parametrize("first", ["postgres", "mirror"])
async def test_message_that_both_sinks_refuse_has_one_dead_letter_with_one_death(make_rig: MakeRig, first: str) -> None:
    rig = await make_rig()
    rig.collector.start()
    broken = message(poison())
    queues = {"postgres": topology.dead_queue(Lane.CRITICAL), "mirror": topology.MIRROR_DEAD}
    for sink in (first, *queues.keys() - {first}):
        headers: dict[str, int | str] = {
            "ticketrail-reason": f"refused_by_{sink}",
            "ticketrail-failed-at": now().isoformat(),
        }
        await rig.publisher.publish_to_queue(queues[sink], broken, headers=headers)
        await rig.dead_letters(1)
    [dead_letter] = await eventually(
        lambda: rig.dead_letters(1), what="both sinks", until=lambda found: len(found[0].sinks) == 2
    )
    assert dead_letter.sinks == ("postgres", "mirror")
    assert (dead_letter.queue, dead_letter.lane, dead_letter.deaths) == (queues["postgres"], "critical", 1)
    assert dead_letter.reason == "refused_by_postgres"
    assert {attempt.reason for attempt in dead_letter.attempts} == {"refused_by_postgres", "refused_by_mirror"}


async def test_late_copy_of_the_mirror_does_not_open_a_discarded_dead_letter(kept: Rig) -> None:
    broken = poison()
    await kept.publish(broken)
    await kept.dead_letters(1)
    await kept.database.execute("update dead_letters set status = 'discarded', closed_at = now()")
    await kept.publisher.publish_to_queue(topology.MIRROR_DEAD, message(broken))
    [dead_letter] = await eventually(
        lambda: kept.dead_letters(1), what="the other sink", until=lambda found: "mirror" in found[0].sinks
    )
    assert (dead_letter.status, dead_letter.deaths) == ("discarded", 1)


async def test_two_collectors_share_the_dead_letters_and_keep_each_once(make_rig: MakeRig) -> None:
    rig = await make_rig()
    bad = [poison() for _ in range(100)]
    # Sends them to the dead-letter queue, because the writer would store them directly.
    for one in bad:
        await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), message(one))
    second = DeadLetterCollector(rig.settings, rig.postgres, rig.counts)
    rig.collector.start()
    second.start()
    dead_letters = await rig.dead_letters(100)
    await second.stop()
    assert {dead_letter.body for dead_letter in dead_letters} == {message(one) for one in bad}
    assert all(dead_letter.deaths == 1 for dead_letter in dead_letters)


# -- backends unavailable ------------------------------------------------------------------------------------------


class PoolOf:
    """Passes each request for a connection to a pool that the test can replace."""

    def __init__(self, pool: Postgres) -> None:
        self.pool = pool

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        return self.pool.connection()


@asynccontextmanager
async def collecting(rig: Rig, pools: PoolOf) -> AsyncIterator[DeadLetterCollector]:
    collector = DeadLetterCollector(
        rig.settings,
        cast(Postgres, pools),
        rig.counts,
        check_consumers_delay_seconds=0.3,
        renew_delay_seconds=3.0,
    )
    collector.start()
    try:
        yield collector
    finally:
        await collector.stop()
        await pools.pool.close()


@pytest.mark.parametrize("way", ["kill", "freeze"])
async def test_dead_letters_wait_in_the_broker_while_postgres_is_unavailable_and_burn_no_deliveries(
    make_rig: MakeRig, servers: Servers, way: str
) -> None:
    rig = await make_rig(database_timeout_seconds=1.0)
    dead = topology.dead_queue(Lane.CRITICAL)
    pools = PoolOf(rig.postgres)
    async with collecting(rig, pools) as collector:
        await rig.publisher.publish_to_queue(dead, message(poison()))
        await rig.dead_letters(1)
        await rig.database.close()
        rig.database = None
        await asyncio.to_thread(getattr(servers.postgres, way))
        try:
            for _ in range(5):
                await rig.publisher.publish_to_queue(dead, message(poison()))

            async def detached() -> bool:
                return not collector.attached and await rig.depth(dead) == 5

            await eventually(detached, what="the collector detached", within=30)
            # PostgreSQL may be slow after its return; with a short timeout that would cause a second delivery.
            patient = rig.settings.model_copy(update={"database_timeout_seconds": 15.0})
            pools.pool = Postgres(patient.database_writer_url, patient)
        finally:
            await asyncio.to_thread(servers.postgres.thaw if way == "freeze" else servers.postgres.start)
        rig.database = await asyncpg.connect(rig.settings.database_writer_url)
        dead_letters = await rig.dead_letters(6, within=30)
    assert len(dead_letters) == 6
    assert all(dead_letter.headers.get("x-delivery-count", 0) <= 1 for dead_letter in dead_letters)


async def test_dead_queue_is_drained_after_a_broker_restart_and_after_the_queue_is_recreated(
    make_rig: MakeRig, servers: Servers
) -> None:
    rig = await make_rig()
    rig.collector.start()
    dead = topology.dead_queue(Lane.CRITICAL)
    await rig.publisher.publish_to_queue(dead, b"first")
    await rig.dead_letters(1)
    await asyncio.to_thread(servers.rabbitmq.stop)
    await asyncio.to_thread(servers.rabbitmq.start)
    await asyncio.wait_for(rig.publisher.wait_connected(), 30)
    await rig.publisher.publish_to_queue(dead, b"second")
    await rig.dead_letters(2, within=30)
    async with rig.channel() as channel:
        await channel.queue_delete(dead)
        [queue] = [one for one in topology.queues(rig.settings) if one.name == dead]
        await channel.declare_queue(dead, durable=True, arguments=queue.arguments)
    await rig.publisher.publish_to_queue(dead, b"third")
    assert [dead_letter.body for dead_letter in await rig.dead_letters(3, within=30)] == [b"first", b"second", b"third"]


async def test_collector_can_be_stopped_at_any_moment(make_rig: MakeRig) -> None:
    """The client library turns a cancellation during the handshake into an error of its own."""
    rig = await make_rig()
    for step in range(60):
        collector = DeadLetterCollector(
            rig.settings,
            rig.postgres,
            rig.counts,
            check_consumers_delay_seconds=0.01,
            renew_delay_seconds=0.2,
        )
        collector.start()
        await asyncio.sleep(step * 0.003)
        await asyncio.wait_for(collector.stop(), 8)


async def test_collector_that_was_never_started_can_be_stopped_twice(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.collector.stop()
    await rig.collector.stop()


# -- the retry ladder, as the ledger sees it -----------------------------------------------------------------------


async def test_change_on_the_retry_ladder_has_a_retry_row_until_it_is_written(make_rig: MakeRig) -> None:
    # The retry queues are slow, so that the test sees the row of the first attempt.
    rig = await make_rig(retry_steps_ms=(300, 1_000, *[3_000] * 6))
    await fail_forever(rig)
    await rig.writer.start()
    unlucky = change(order(notes="unlucky"))
    await rig.publish(unlucky)

    async def row() -> Any:
        return await rig.database.fetchrow(
            "select change_id::text, restaurant_id::text, entity, entity_id::text, lane, attempt, reason from retries"
        )

    seen = await eventually(row, what="a retry row")
    assert tuple(seen)[:5] == (unlucky.id, RESTAURANT, "order", unlucky.entity_id, "critical")
    assert seen["reason"] == "transient"
    await eventually(row, what="the second attempt", until=lambda found: found and found["attempt"] >= 2)
    await rig.as_owner("drop trigger fail on orders")
    await rig.written(unlucky)
    assert await row() is None, "the row stayed after the change was committed"


async def test_retry_row_is_removed_when_the_dead_letter_is_kept(kept: Rig) -> None:
    await fail_forever(kept)
    made = change(order(notes="unlucky"))
    # The test notes the retry, because the writer may note the last one after the dead letter is kept.
    await retry_store.note(kept.database, [retry_of(made, attempt=2)])
    assert await kept.count("retries") == 1
    failure = Failure(FailureKind.TRANSIENT, "transient", "?")
    headers = headers_for(FailedChange(message(made), {topology.ATTEMPT: 1}, failure, made.time, made), "critical")
    await kept.publisher.publish_to_queue(topology.lane_queue(Lane.CRITICAL), message(made), headers=headers)
    await kept.dead_letters(1)
    assert await kept.count("retries") == 0


def retry_of(made: Change, *, attempt: int) -> retry_store.Retry:
    """A row for the table `retries`."""
    return retry_store.Retry(
        restaurant_id=RESTAURANT, change_id=made.id, lane="critical", entity="order", entity_id=made.entity_id,
        attempt=attempt, reason="transient", error="?", failed_at=made.time,
    )  # fmt: skip


async def test_change_that_is_written_before_its_retry_is_noted_gets_no_retry_row(rig: Rig) -> None:
    made = change(order())
    await rig.publish(made)
    await rig.written(made)
    await retry_store.note(rig.database, [retry_of(made, attempt=1)])
    assert await rig.count("retries") == 0
    # The sweep removes a row that was inserted between the two transactions.
    await rig.database.execute(
        "insert into retries (restaurant_id, change_id, lane, entity, entity_id, attempt, reason, error, failed_at)"
        " values ($1, $2, 'critical', 'order', $3, 1, 'transient', '?', now())",
        RESTAURANT,
        made.id,
        made.entity_id,
    )
    assert await retry_store.sweep(rig.database) == 1
