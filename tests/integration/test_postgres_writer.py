"""The PostgreSQL writer on real servers: a settled change is in the tables, in a retry queue or dead-lettered."""

import asyncio
from typing import Any

import asyncpg
import pytest

from shared.entities.contract import Change, Lane, encode
from shared.entities.order import OrderStatus
from shared.messaging import topology
from shared.messaging.publisher import InDoubt, NotSent
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, menu_item, message, order, payment
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

# -- writes --------------------------------------------------------------------------------------------------------


async def test_change_reaches_its_table_its_items_and_the_table_of_changes(rig: Rig) -> None:
    made = change(order(items=3, payments=(payment(amount=700),), customer_name="Ünal 🍜"), traceparent="00-ab-cd-01")
    await rig.publish(made)
    await rig.written(made)
    row = await rig.database.fetchrow("select * from orders")
    assert (str(row["id"]), row["version"], str(row["change_id"])) == (made.entity_id, 1, made.id)
    assert row["customer_name"] == "Ünal 🍜"
    assert [
        line["position"] for line in await rig.database.fetch("select position from order_items order by position")
    ] == [1, 2, 3]
    assert await rig.database.fetchval("select amount from payments") == 700
    kept = await rig.database.fetchrow("select *, data::text as text from changes")
    assert kept["text"] == f'{{"before":{bytes(made.data.before).decode()},"after":{bytes(made.data.after).decode()}}}'
    assert (kept["entity"], kept["lane"], kept["traceparent"]) == ("order", "critical", "00-ab-cd-01")
    assert kept["accepted_at"] == made.time
    await rig.all_acknowledged()


async def test_messages_that_wait_before_the_start_are_all_written(make_rig: MakeRig) -> None:
    """The writer reads by iterator. A handler of FastStream would drop messages that arrive before FastStream marks the
    subscriber as running."""
    rig = await make_rig(lane_prefetch=500)
    made = [change(order(items=1)) for _ in range(400)]
    await asyncio.gather(*(rig.publish(one) for one in made))
    await rig.writer.start()
    await rig.written(*made)
    await rig.all_acknowledged()


async def test_repeated_message_changes_nothing(rig: Rig) -> None:
    made = change(order(items=2, payments=(payment(),)))
    await rig.publish(made, made)
    await rig.publish(made)
    await rig.all_acknowledged()
    assert [await rig.count(table) for table in ("orders", "order_items", "payments", "changes", "conflicts")] == [
        1, 2, 1, 1, 0,
    ]  # fmt: skip


async def test_versions_in_reverse_order_leave_the_newest(rig: Rig) -> None:
    first = change(order(items=1))
    second = change(order(id=first.entity_id, items=4, status=OrderStatus.RECEIVED), base=first)
    third = change(order(id=first.entity_id, items=2, status=OrderStatus.PREPARING), base=second)
    for one in (third, second, first):
        await rig.publish(one)
        await rig.written(one)
    assert tuple(await rig.database.fetchrow("select version, status from orders")) == (3, "preparing")
    assert await rig.count("order_items") == 2
    assert await rig.count("conflicts") == 0


async def test_two_versions_of_one_order_in_one_batch_leave_the_newer(rig: Rig) -> None:
    first = change(order(items=5))
    second = change(order(id=first.entity_id, items=2, notes="second"), base=first)
    await rig.publish(second, first)
    await rig.written(first, second)
    assert tuple(await rig.database.fetchrow("select version, notes from orders")) == (2, "second")
    assert await rig.count("order_items") == 2


async def test_every_lane_is_consumed(rig: Rig) -> None:
    critical, normal, background = change(order()), change(menu_item()), change(order())
    await rig.publish(critical)
    await rig.publish(normal, lane=Lane.NORMAL)
    await rig.publish(background, lane=Lane.BACKGROUND)
    await rig.written(critical, normal, background)
    assert await rig.count("menu_items") == 1
    lanes = await rig.database.fetch("select lane from changes order by lane")
    assert [row["lane"] for row in lanes] == ["background", "critical", "normal"]


async def test_event_that_names_an_order_of_another_tenant_does_not_touch_that_tenant(rig: Rig) -> None:
    theirs = change(order(restaurant_id=OTHER_RESTAURANT, notes="theirs", payments=(payment(),)))
    await rig.publish(theirs)
    await rig.written(theirs)
    state = order(id=theirs.entity_id, restaurant_id=RESTAURANT, notes="ours", items=1)
    ours = change(state, entityversion=9, basechangeid=theirs.id)
    await rig.publish(ours)
    await rig.written(ours)
    rows = await rig.database.fetch("select restaurant_id::text as restaurant, version, notes from orders")
    assert {tuple(row) for row in rows} == {(OTHER_RESTAURANT, 1, "theirs"), (RESTAURANT, 9, "ours")}
    items = await rig.database.fetch("select restaurant_id::text as r, count(*) as n from order_items group by 1")
    assert {tuple(row) for row in items} == {(OTHER_RESTAURANT, 3), (RESTAURANT, 1)}
    assert await rig.count("conflicts") == 0


# -- poison --------------------------------------------------------------------------------------------------------


async def test_poison_change_does_not_hold_back_its_batch(rig: Rig) -> None:
    made = [change(order(items=1)) for _ in range(200)]
    poison = encode(made[100]).replace(b'"status":"pending"', b'"status":"hungry"')
    await rig.publish(*made[:100], poison, *made[101:])
    await rig.written(*made[:100], *made[101:])
    [dead] = await rig.dead_letters(1)
    assert dead.body == b"[" + poison + b"]"
    assert dead.headers["ticketrail-reason"] == "contract_broken"
    assert "hungry" in str(dead.headers["ticketrail-error"])
    assert dead.headers["ticketrail-change-id"] == made[100].id
    assert dead.headers["ticketrail-restaurant"] == RESTAURANT
    assert (dead.headers["ticketrail-lane"], dead.headers["ticketrail-attempt"]) == ("critical", 1)
    await rig.all_acknowledged()
    assert await rig.count("changes") == 199


def _wrong_tenant() -> bytes:
    return encode(change(order(restaurant_id=OTHER_RESTAURANT), restaurantid=RESTAURANT))


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (_wrong_tenant(), "wrong_tenant"),
        (encode(change(order(), type="ticketrail.order.created.v2")), "unsupported_version"),
        (encode(change(order(), type="ticketrail.spaceship.created.v1")), "unknown_type"),
        (encode(change(order(), type="com.example.thing")), "unknown_type"),
        (encode(change(order())).replace(b'"before":{}', b'"before":"\xff"'), "undecodable"),
        (encode(change(order())).replace(b'"before":{}', rb'"before":{"x":"\u0000"}'), "contract_broken"),
    ],
)
async def test_poison_is_dead_lettered_unchanged_with_its_reason(rig: Rig, event: bytes, reason: str) -> None:
    await rig.publish(event)
    [dead] = await rig.dead_letters(1)
    assert (dead.body, dead.headers["ticketrail-reason"]) == (b"[" + event + b"]", reason)
    await rig.metric_becomes(f'ticketrail_dead_total{{reason="{reason}"}}', 1)
    assert await rig.count("changes") == 0


@pytest.mark.parametrize("body", [b"garbage \xff", b'{"not": "a batch"}', b"", b"[" * 50_000 + b"]" * 50_000])
async def test_message_that_is_not_a_batch_is_dead_lettered_unchanged(rig: Rig, body: bytes) -> None:
    made = change(order())
    await rig.publisher.publish(Lane.CRITICAL.value, body)
    await rig.publish(made)
    await rig.written(made)
    [dead] = await rig.dead_letters(1)
    assert (dead.body, dead.headers["ticketrail-reason"]) == (body, "undecodable")


async def test_change_that_postgres_refuses_is_poison_and_the_rest_of_its_batch_is_written(rig: Rig) -> None:
    await rig.as_owner("alter table orders add check (notes is distinct from 'forbidden')")
    made = [change(order(items=1)) for _ in range(20)]
    refused = change(order(notes="forbidden"))
    await rig.publish(*made[:10], refused, *made[10:])
    await rig.written(*made)
    [dead] = await rig.dead_letters(1)
    assert dead.headers["ticketrail-reason"] == "refused_by_postgres"
    assert dead.headers["ticketrail-attempt"] == 1
    assert dead.body == message(refused)


async def test_dead_letter_is_stored_in_the_transaction_of_its_batch(rig: Rig) -> None:
    await rig.as_owner(
        """
        create table transactions (id xid8);
        grant insert, select on transactions to ticketrail_writer;
        create function note() returns trigger language plpgsql as $$
        begin
            insert into transactions values (pg_current_xact_id());
            return new;
        end $$;
        create trigger note after insert on orders for each row execute function note();
        create trigger note after insert on dead_letters for each row execute function note();
        """
    )
    good, bad = [change(order(items=1)) for _ in range(5)], b'{"not": "a change"}'
    await rig.publish(*good, bad)
    await rig.written(*good)
    [dead] = await rig.dead_letters(1)
    assert dead.body == message(bad)
    assert await rig.count("transactions") == 6
    assert await rig.database.fetchval("select count(distinct id) from transactions") == 1
    assert await rig.depth(topology.dead_queue(Lane.CRITICAL)) == 0


# -- transient failures --------------------------------------------------------------------------------------------


async def fail_transiently(rig: Rig, times: int) -> None:
    """Makes the write of an order with notes 'unlucky' fail `times` times with a serialization failure. A sequence
    counts the failures, because it survives the rollback."""
    await rig.as_owner(
        f"""
        create sequence failures;
        grant usage, select on failures to ticketrail_writer;
        create function fail() returns trigger language plpgsql as $$
        begin
            if new.notes = 'unlucky' then  -- not joined by `and`: null does not stop nextval
                if nextval('failures') <= {times} then
                    raise exception 'try again' using errcode = 'serialization_failure';
                end if;
            end if;
            return new;
        end $$;
        create trigger fail before insert or update on orders for each row execute function fail();
        """
    )


async def test_transient_failure_is_retried_alone_through_the_retry_ladder_and_succeeds(rig: Rig) -> None:
    await fail_transiently(rig, 3)  # the write fails in its batch, alone, and once more from the first retry queue
    made = [change(order(items=1)) for _ in range(10)]
    unlucky = change(order(notes="unlucky"))
    await rig.publish(*made, unlucky)
    await rig.written(*made, unlucky)
    await rig.all_acknowledged()
    assert await rig.database.fetchval("select last_value from failures") == 4
    assert rig.writer.state()["failed"] == 2  # one change has burned two attempts
    assert [rig.counted(f'ticketrail_retries_total{{attempt="{attempt}"}}') for attempt in (1, 2, 3)] == [1, 1, 0]
    assert rig.counted("ticketrail_batch_changes_sum") >= 11
    assert rig.counted("ticketrail_postgres_lag_seconds_count") >= 11
    assert await rig.depth(topology.dead_queue(Lane.CRITICAL)) == 0


async def test_failure_that_passes_at_the_second_try_burns_no_attempt(rig: Rig) -> None:
    await fail_transiently(rig, 1)
    made = [change(order()), change(order(notes="unlucky"))]
    await rig.publish(*made)
    await rig.written(*made)
    assert rig.writer.state()["failed"] == 0


async def test_change_at_the_end_of_the_ladder_is_dead_lettered(rig: Rig) -> None:
    await fail_transiently(rig, 100)
    unlucky = change(order(notes="unlucky"))
    await rig.publish(unlucky)
    [dead] = await rig.dead_letters(1)
    assert dead.body == message(unlucky)
    assert dead.headers["ticketrail-attempt"] == 3  # the first attempt and one from each retry queue
    assert "try again" in str(dead.headers["ticketrail-error"])
    assert str(dead.headers["ticketrail-first-failed-at"]) < str(dead.headers["ticketrail-failed-at"])


async def test_change_behind_a_lock_is_retried_while_others_are_written(make_rig: MakeRig) -> None:
    rig = await make_rig(database_timeout_seconds=1.0, retry_steps_ms=(300, 300, 300, 300, 300, 300, 300, 300))
    await rig.writer.start()
    first = change(order())
    await rig.publish(first)
    await rig.written(first)
    locker = await asyncpg.connect(rig.settings.database_url)
    holding = locker.transaction()
    await holding.start()
    # Simulates a transaction that holds a lock for longer than `database_timeout_seconds`.
    await locker.execute("lock table menu_items in access exclusive mode")
    stuck = change(menu_item())
    others = [change(order(items=1)) for _ in range(5)]
    await rig.publish(*others[:2], stuck, *others[2:])
    await rig.written(*others)
    await rig.failed(1)
    await holding.rollback()
    await locker.close()
    await rig.written(stuck)
    assert await rig.depth(topology.dead_queue(Lane.CRITICAL)) == 0


async def test_batch_is_held_without_failures_when_everything_times_out(make_rig: MakeRig) -> None:
    rig = await make_rig(database_timeout_seconds=1.5)
    await rig.writer.start()
    locker = await asyncpg.connect(rig.settings.database_url)
    async with locker.transaction():
        await locker.execute("lock table orders in access exclusive mode")
        made = [change(order(items=1)) for _ in range(20)]
        await rig.publish(*made)

        async def holding() -> Any:
            return rig.writer.state()["holding_since"]

        await eventually(holding, what="a held batch")
    await locker.close()
    await rig.written(*made)
    await rig.all_acknowledged()
    assert rig.writer.state()["failed"] == 0


# -- PostgreSQL unavailable ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage", ["stop", "kill", "freeze"])
async def test_unavailable_postgres_loses_nothing_burns_no_attempt_and_dead_letters_nothing(
    make_rig: MakeRig, servers: Servers, outage: str
) -> None:
    rig = await make_rig(database_timeout_seconds=3.0)
    await rig.writer.start()
    made: list[Change] = []
    loading = True

    async def load() -> None:
        while loading:
            several = [change(order(items=1)) for _ in range(5)]
            await rig.publish(*several)
            made.extend(several)
            await asyncio.sleep(0.01)

    task = asyncio.create_task(load())
    await eventually(lambda: rig.count("changes"), what="some written changes")
    await rig.database.close()

    async def holding() -> Any:
        return rig.writer.state()["holding_since"]

    await asyncio.to_thread(getattr(servers.postgres, outage))
    try:
        await eventually(holding, what="a held batch")
        before = len(made)
        await eventually(lambda: asyncio.sleep(0, len(made)), what="continued load", until=lambda n: n > before + 200)
    finally:
        await asyncio.to_thread(servers.postgres.thaw if outage == "freeze" else servers.postgres.start)
    loading = False
    await task
    rig.database = await asyncpg.connect(rig.settings.database_writer_url)
    await rig.written(*made, within=90)
    await rig.all_acknowledged()
    assert rig.writer.state()["failed"] == 0
    assert rig.writer.state()["holding_since"] is None
    assert await rig.depth(topology.dead_queue(Lane.CRITICAL)) == 0


async def test_long_outage_releases_the_messages_and_consumes_them_again(make_rig: MakeRig, servers: Servers) -> None:
    rig = await make_rig(database_timeout_seconds=3.0, sink_hold_seconds=0.5)
    await rig.writer.start()
    await rig.database.close()
    rig.database = None
    await asyncio.to_thread(servers.postgres.stop)
    try:
        made = [change(order(items=1)) for _ in range(10)]
        await rig.publish(*made)
        lane = topology.lane_queue(Lane.CRITICAL)
        # The messages are ready in the queue again, and no consumer holds them.
        await eventually(lambda: rig.depth(lane), what="the messages back in the queue", within=30)

        async def consumers() -> int:
            return int(rig.writer.state()["consumers"]["critical"])

        await eventually(consumers, what="a queue without consumers", within=30, until=lambda n: n < 2)
    finally:
        await asyncio.to_thread(servers.postgres.start)
    rig.database = await asyncpg.connect(rig.settings.database_writer_url)
    await rig.written(*made, within=90)
    await eventually(consumers, what="a queue with consumers again", until=lambda n: n == 2)
    assert rig.writer.state()["failed"] == 0


# -- RabbitMQ unavailable, start and stop --------------------------------------------------------------------------


async def test_lost_connection_is_renewed_and_nothing_is_lost(rig: Rig, servers: Servers) -> None:
    made = [change(order(items=1)) for _ in range(50)]
    await rig.publish(*made[:25])
    await rig.written(*made[:25])
    await asyncio.to_thread(servers.rabbitmq.stop)
    await asyncio.to_thread(servers.rabbitmq.start)

    async def published() -> bool:
        """Publishes. A second copy after a publish in doubt changes nothing."""
        try:
            await rig.publish(*made[25:])
        except (NotSent, InDoubt):
            return False
        return True

    await eventually(published, what="a confirm of the broker that has started again")
    await rig.written(*made, within=90)
    await rig.drained()
    # Acknowledgements must work on the new channel.
    await rig.publish(made[0])
    await rig.all_acknowledged()


async def test_stop_finishes_messages_that_were_taken(rig: Rig) -> None:
    made = [change(order(items=1)) for _ in range(300)]
    for start in range(0, 300, 10):
        await rig.publish(*made[start : start + 10])
    await rig.writer.stop()
    written = await rig.count("changes")

    # Messages without an acknowledgement return to the queue a moment after the channel closes.
    async def left() -> int:
        return await rig.depth(topology.lane_queue(Lane.CRITICAL))

    await eventually(
        left, what=f"the rest of 300, {written} of which are written", until=lambda n: written + n * 10 == 300
    )
    await rig.writer.stop()


async def test_writer_may_be_stopped_without_a_start(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.writer.stop()
    await rig.heartbeats.stop()
