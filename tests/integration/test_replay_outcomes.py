"""Replays on real servers: the queue that a replayed change goes through, and the outcome of each dead letter."""

import msgspec

from shared.entities.contract import Change, Lane, now
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.messaging import topology
from shared.messaging.log import LogReader
from shared.mirror.stored_heads import FeedNote
from shared.postgres.feed import find_end
from tests.rigs.builders import RESTAURANT, change, message, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.rail.changes import applied
from tests.rigs.replays import (
    ALLOW_FORBIDDEN_NOTES,
    REFUSE_FORBIDDEN_NOTES,
    create_job,
    make_dead_letters,
    make_refused,
    read_dead_letter,
    read_items,
    read_job,
    wait_ended,
)
from tests.rigs.servers import Servers
from tests.rigs.system import eventually


async def test_written_replay_resolves_its_dead_letter_and_the_mirror_shows_synced(
    make_rig: MakeRig, servers: Servers
) -> None:
    # The mirror is one of its own, because it keeps the position of one feed.
    rig: Rig = await make_rig(redis_url=servers.extra_redis().url)
    await rig.as_owner(REFUSE_FORBIDDEN_NOTES)
    await rig.writer.start()
    rig.collector.start()
    end = await find_end(rig.database)
    await rig.mirror.settle([], note=FeedNote(end.xid, end.encode()))
    rig.feed_loop.start()
    made = await reveal_and_kill(rig)
    await rig.as_owner(ALLOW_FORBIDDEN_NOTES)
    rig.replays.start()
    job = await wait_ended(rig, await create_job(rig))
    assert (job.state, job.outcomes, job.total) == ("done", {"resolved": 1}, 1)
    dead_letter = await read_dead_letter(rig, made)
    assert (dead_letter.status, dead_letter.deaths, dead_letter.revision) == ("resolved", 1, 3)
    assert dead_letter.closed_at is not None
    assert await rig.count("orders") == 1

    async def synced() -> bool:
        _, [found] = await rig.mirror.read(RESTAURANT, "order", [made.entity_id])
        return found is not None and not found.pending and not found.failure

    await eventually(synced, what="the state `synced` in the mirror")


async def reveal_and_kill(rig: Rig) -> Change:
    made = change(order(items=1, notes="forbidden"))
    await rig.mirror.apply([applied(made)])
    await rig.publish(made)
    await rig.dead_letters(1)

    async def failed() -> bool:
        _, [found] = await rig.mirror.read(RESTAURANT, "order", [made.entity_id])
        return found is not None and bool(found.failure)

    await eventually(failed, what="the failure in the mirror")
    return made


async def test_replay_goes_only_through_its_lane_and_is_not_logged_twice(refusing_rig: Rig) -> None:
    [made] = await make_refused(refusing_rig, 1)
    await refusing_rig.as_owner(ALLOW_FORBIDDEN_NOTES)
    refusing_rig.replays.start()
    await wait_ended(refusing_rig, await create_job(refusing_rig))
    logged = 0
    async for batch in LogReader(refusing_rig.settings.rabbitmq_url, name="test", idle_seconds=5.0).read("first"):
        logged += sum(made.id.encode() in entry.body for entry in batch.entries)
        if batch.caught_up:
            break
    assert logged == 1


async def test_replay_that_dies_again_is_the_same_dead_letter_and_stops_its_job(refusing_rig: Rig) -> None:
    [made] = await make_refused(refusing_rig, 1)
    refusing_rig.replays.start()
    job = await wait_ended(refusing_rig, await create_job(refusing_rig))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    assert job.message is not None and "again with the same cause" in job.message
    [part] = await read_items(refusing_rig, job)
    assert part.same_cause is True
    assert part.detail is not None and part.detail.startswith("refused_by_postgres: CheckViolationError")
    dead_letter = await read_dead_letter(refusing_rig, made)
    assert (dead_letter.status, dead_letter.deaths, len(dead_letter.attempts)) == ("open", 2, 2)
    assert dead_letter.headers["ticketrail-replay"] == dead_letter.id
    assert dead_letter.headers["ticketrail-attempt"] == 1, "the replay did not start at the first attempt"


async def test_replay_that_dies_of_another_cause_does_not_stop_the_others(refusing_rig: Rig) -> None:
    made = await make_refused(refusing_rig, 3)
    await refusing_rig.as_owner(ALLOW_FORBIDDEN_NOTES)
    await refusing_rig.as_owner(f"alter table orders add constraint other check (id <> '{made[0].entity_id}')")
    # Changes the stored fingerprints, so that the new failure has another one, as after a release that moved the code.
    await refusing_rig.database.execute("update dead_letters set fingerprint = 'another'")
    refusing_rig.replays.start()
    job = await wait_ended(refusing_rig, await create_job(refusing_rig))
    assert (job.state, job.outcomes) == ("done", {"resolved": 2, "failed": 1})
    [failed] = [one for one in await read_items(refusing_rig, job) if one.outcome == "failed"]
    assert (failed.position, failed.same_cause) == (1, False)


async def test_job_waits_for_a_replay_on_the_retry_ladder(refusing_rig: Rig) -> None:
    [made] = await make_refused(refusing_rig, 1)
    await refusing_rig.as_owner(ALLOW_FORBIDDEN_NOTES)
    await refusing_rig.as_owner(
        """
        create sequence failures;
        grant usage, select on failures to ticketrail_writer;
        create function fail() returns trigger language plpgsql as $$
        begin
            if nextval('failures') <= 2 then
                raise exception 'try again' using errcode = 'serialization_failure';
            end if;
            return new;
        end $$;
        create trigger fail before insert or update on orders for each row execute function fail();
        """
    )
    refusing_rig.replays.start()
    job = await wait_ended(refusing_rig, await create_job(refusing_rig))
    assert job.outcomes == {"resolved": 1}
    assert refusing_rig.counted('ticketrail_retries_total{attempt="1"}') == 1
    assert (await read_dead_letter(refusing_rig, made)).status == "resolved"


async def test_change_that_was_written_in_the_meantime_is_not_sent_again(refusing_rig: Rig) -> None:
    [made] = await make_refused(refusing_rig, 1)
    await refusing_rig.as_owner(ALLOW_FORBIDDEN_NOTES)
    await refusing_rig.publish(made)  # PostgreSQL has written another copy, for example from a journal
    await refusing_rig.written(made)
    refusing_rig.replays.start()
    job = await wait_ended(refusing_rig, await create_job(refusing_rig))
    [part] = await read_items(refusing_rig, job)
    assert (part.outcome, part.detail) == ("resolved", "the change was already written")


async def test_event_with_the_id_of_a_written_change_is_not_mistaken_for_that_change(refusing_rig: Rig) -> None:
    good = change(order())
    await refusing_rig.publish(good, msgspec.json.encode(good).replace(b'"total":', b'"total":-'))
    await refusing_rig.written(good)
    await refusing_rig.dead_letters(1)
    refusing_rig.replays.start()
    job = await wait_ended(refusing_rig, await create_job(refusing_rig))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    assert (await read_dead_letter(refusing_rig, good)).status == "open"


async def test_undecodable_dead_letter_dies_again_and_its_job_fails(refusing_rig: Rig) -> None:
    await refusing_rig.publisher.publish(Lane.CRITICAL.value, b"\xffgarbage")
    await refusing_rig.dead_letters(1)
    refusing_rig.replays.start()
    job = await wait_ended(refusing_rig, await create_job(refusing_rig))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    [dead_letter] = await refusing_rig.dead_letters(1)
    assert (dead_letter.status, dead_letter.deaths, dead_letter.body) == ("open", 2, b"\xffgarbage")


async def test_dead_letter_of_a_signal_is_resolved_by_a_replay(make_rig: MakeRig) -> None:
    rig = await make_rig()
    heartbeat = Signal(id=change(order()).id, type=HEARTBEAT, time=now(), lane="critical")
    await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), encode_signal(heartbeat))
    rig.collector.start()
    await rig.dead_letters(1)
    rig.replays.start()
    job = await wait_ended(rig, await create_job(rig))
    assert job.outcomes == {"resolved": 1}


async def test_dead_letters_of_the_mirror_are_applied_to_the_mirror(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.writer.start()
    rig.collector.start()
    lost, late = change(order()), change(order())
    await rig.publish(late)
    await rig.written(late)
    late = msgspec.structs.replace(late, time=late.time.replace(year=late.time.year - 1))
    for one in (lost, late):
        await rig.publisher.publish_to_queue(topology.MIRROR_DEAD, message(one))
    broken = msgspec.json.encode(change(order())).replace(b'"total":', b'"total":-')
    await rig.dead_letters(2)
    rig.replays.start()
    job = await wait_ended(rig, await create_job(rig))
    assert job.outcomes == {"resolved": 2}
    _, found = await rig.mirror.read(RESTAURANT, "order", [lost.entity_id, late.entity_id])
    assert [one is not None and one.pending for one in found] == [True, False], (
        "the wrong orders are pending: PostgreSQL has the second one"
    )
    assert {dead_letter.status for dead_letter in await rig.dead_letters(2)} == {"resolved"}

    await rig.publisher.publish_to_queue(topology.MIRROR_DEAD, message(broken))
    await rig.dead_letters(3)
    for deaths in (2, 3):
        job = await wait_ended(rig, await create_job(rig))
        assert job.outcomes == {"failed": 1}
        [dead_letter] = [one for one in await rig.dead_letters(3) if one.status == "open"]
        assert (dead_letter.reason, dead_letter.deaths, len(dead_letter.attempts)) == (
            "negative_amount",
            deaths,
            deaths,
        )
    assert job.state == "stopped", "the job did not stop at a second death with the same cause"


async def test_replay_of_a_dead_letter_of_both_sinks_goes_through_its_lane_and_to_the_mirror(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.writer.start()
    rig.collector.start()
    made = change(order())
    for queue in (topology.dead_queue(Lane.CRITICAL), topology.MIRROR_DEAD):
        await rig.publisher.publish_to_queue(queue, message(made))
    await eventually(
        lambda: rig.dead_letters(1), what="both sinks", until=lambda found: found[0].sinks == ("postgres", "mirror")
    )
    rig.replays.start()
    job = await wait_ended(rig, await create_job(rig))
    assert (job.total, job.outcomes) == (1, {"resolved": 1})
    await rig.written(made)
    _, [found] = await rig.mirror.read(RESTAURANT, "order", [made.entity_id])
    assert found is not None


async def test_lost_replay_fails_once_its_lane_is_known_to_be_empty(make_rig: MakeRig) -> None:
    rig = await make_rig()
    [made] = await make_dead_letters(rig, 1)
    replays = rig.another_replay_worker(slack_seconds=0.2)
    replays.start()
    job = await create_job(rig)
    await eventually(lambda: read_job(rig, job), what="a sent item", until=lambda one: one.outcomes == {"sent": 1})
    async with rig.channel() as channel:
        await (await channel.get_queue(topology.lane_queue(Lane.CRITICAL))).purge()
    await rig.writer.start()
    await rig.heartbeats.start()
    job = await wait_ended(rig, job)
    await replays.stop()
    assert job.outcomes == {"failed": 1}
    [part] = await read_items(rig, job)
    assert part.detail is not None and "did not come out of its lane" in part.detail
    assert (await read_dead_letter(rig, made)).status == "open"
