"""Replays and dry runs on real servers: what a job sends, its outcomes, and how another worker takes a job over."""

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg
import msgspec
import pytest

from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.replay_jobs import ReplayItem, ReplayJob
from services.sync.dead_letters.replay_worker import Replays
from services.sync.dead_letters.store import DeadLetterQuery, FullDeadLetter
from shared.entities.contract import Change, Lane, now
from shared.entities.order import ENTITY, OrderStatus
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.messaging import topology
from shared.messaging.log import LogReader
from shared.messaging.publisher import NotSent, Publisher
from shared.mirror.mirror import Apply
from tests.rigs.builders import RESTAURANT, change, menu_item, message, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

NO_FORBIDDEN = "alter table orders add constraint no_forbidden check (notes is distinct from 'forbidden')"
ALLOW = "alter table orders drop constraint no_forbidden"


@pytest.fixture
async def kept(rig: Rig) -> Rig:
    """A writer, a dead-letter collector, and a database that refuses orders with the notes 'forbidden'."""
    rig.collector.start()
    await rig.as_owner(NO_FORBIDDEN)
    return rig


async def dead(rig: Rig, count: int) -> list[Change]:
    """Makes `count` orders that the database refuses; returns them, the oldest dead letter first."""
    made = [change(order(items=1, notes="forbidden")) for _ in range(count)]
    await rig.publish(*made)
    order_of = [dead_letter.change_id for dead_letter in await rig.dead_letters(count)]
    return sorted(made, key=lambda one: order_of.index(one.id))


async def ask(rig: Rig, kind: str = "replay", **settings: Any) -> ReplayJob:
    """Creates a job as an operator does; by default at full speed, without canary, for every dead letter."""
    chosen: dict[str, Any] = {"per_second": 10_000.0, "canary": False, **settings}
    query = chosen.pop("query", DeadLetterQuery())
    ops = await asyncpg.connect(rig.settings.database_ops_url)
    job = await replay_jobs.make(ops, query, kind=kind, actor="nadia", role="operator", **chosen)  # type: ignore[arg-type]
    await ops.close()
    return job


async def cancel(rig: Rig, job: ReplayJob) -> None:
    ops = await asyncpg.connect(rig.settings.database_ops_url)
    await replay_jobs.cancel(ops, job.id, actor="nadia", role="operator")  # type: ignore[arg-type]
    await ops.close()


async def read_job(rig: Rig, job: ReplayJob) -> ReplayJob:
    found = await replay_jobs.one(rig.database, job.id)
    assert found is not None
    return found


async def ended(rig: Rig, job: ReplayJob, *, within: float = 30.0) -> ReplayJob:
    return await eventually(
        lambda: read_job(rig, job), what="the job's end", within=within, until=lambda one: one.ended
    )


async def outcomes(rig: Rig, job: ReplayJob) -> Sequence[ReplayItem]:
    return await replay_jobs.items(rig.database, job.id)


async def dead_letter_of(rig: Rig, made: Change) -> FullDeadLetter:
    [found] = await dead_letter_store.page(rig.database, DeadLetterQuery(change_id=made.id))
    whole = await dead_letter_store.one(rig.database, found.id)
    assert whole is not None
    return whole


# -- outcomes of a replay ------------------------------------------------------------------------------------------


async def test_written_replay_resolves_its_dead_letter_and_the_mirror_shows_synced(kept: Rig) -> None:
    [made] = await reveal_and_kill(kept)
    await kept.as_owner(ALLOW)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes, job.total) == ("done", {"resolved": 1}, 1)
    dead_letter = await dead_letter_of(kept, made)
    assert (dead_letter.status, dead_letter.deaths, dead_letter.revision) == ("resolved", 1, 3)
    assert dead_letter.closed_at is not None
    assert await kept.count("orders") == 1

    async def synced() -> bool:
        _, [found] = await kept.mirror.read(RESTAURANT, "order", [made.entity_id])
        return found is not None and not found.pending and not found.failure

    await eventually(synced, what="synced in the mirror")


async def reveal_and_kill(rig: Rig) -> list[Change]:
    made = change(order(items=1, notes="forbidden"))
    await rig.mirror.apply([Apply(ENTITY, ENTITY.decode(made), made.head, bytes(made.data.after), made.time)])
    await rig.publish(made)
    await rig.dead_letters(1)

    async def failed() -> bool:
        _, [found] = await rig.mirror.read(RESTAURANT, "order", [made.entity_id])
        return found is not None and bool(found.failure)

    await eventually(failed, what="failed in the mirror")
    return [made]


async def test_replay_goes_only_through_its_lane_and_is_not_logged_twice(kept: Rig) -> None:
    [made] = await dead(kept, 1)
    await kept.as_owner(ALLOW)
    kept.replays.start()
    await ended(kept, await ask(kept))
    logged = 0
    async for batch in LogReader(kept.settings.rabbitmq_url, name="test", idle_seconds=5.0).read("first"):
        logged += sum(made.id.encode() in entry.body for entry in batch.entries)
        if batch.caught_up:
            break
    assert logged == 1


async def test_replay_that_dies_again_is_the_same_dead_letter_and_stops_its_job(kept: Rig) -> None:
    [made] = await dead(kept, 1)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    assert job.message is not None and "again with the same cause" in job.message
    [part] = await outcomes(kept, job)
    assert part.same_cause is True
    assert part.detail is not None and part.detail.startswith("refused_by_postgres: CheckViolationError")
    dead_letter = await dead_letter_of(kept, made)
    assert (dead_letter.status, dead_letter.deaths, len(dead_letter.attempts)) == ("open", 2, 2)
    assert dead_letter.headers["ticketrail-replay"] == dead_letter.id
    assert dead_letter.headers["ticketrail-attempt"] == 1, "the replay starts at the first attempt"


async def test_replay_that_dies_of_another_cause_does_not_stop_the_others(kept: Rig) -> None:
    made = await dead(kept, 3)
    await kept.as_owner(ALLOW)
    await kept.as_owner(f"alter table orders add constraint other check (id <> '{made[0].entity_id}')")
    # The new failure has another fingerprint, as if a release had failed at another place before.
    await kept.database.execute("update dead_letters set fingerprint = 'another'")
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes) == ("done", {"resolved": 2, "failed": 1})
    [failed] = [one for one in await outcomes(kept, job) if one.outcome == "failed"]
    assert (failed.position, failed.same_cause) == (1, False)


async def test_job_waits_for_a_replay_on_the_retry_ladder(kept: Rig) -> None:
    [made] = await dead(kept, 1)
    await kept.as_owner(ALLOW)
    await kept.as_owner(
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
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert job.outcomes == {"resolved": 1}
    assert kept.counted('ticketrail_retries_total{attempt="1"}') == 1
    assert (await dead_letter_of(kept, made)).status == "resolved"


async def test_change_that_was_written_in_the_meantime_is_not_sent_again(kept: Rig) -> None:
    [made] = await dead(kept, 1)
    await kept.as_owner(ALLOW)
    await kept.publish(made)  # another copy, for example from a journal
    await kept.written(made)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    [part] = await outcomes(kept, job)
    assert (part.outcome, part.detail) == ("resolved", "the change was already written")


async def test_event_with_the_id_of_a_written_change_is_not_mistaken_for_that_change(kept: Rig) -> None:
    good = change(order())
    await kept.publish(good, msgspec.json.encode(good).replace(b'"total":', b'"total":-'))
    await kept.written(good)
    await kept.dead_letters(1)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    assert (await dead_letter_of(kept, good)).status == "open"


async def test_undecodable_dead_letter_dies_again_and_its_job_fails(kept: Rig) -> None:
    await kept.publisher.publish(Lane.CRITICAL.value, b"\xffgarbage")
    await kept.dead_letters(1)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    [dead_letter] = await kept.dead_letters(1)
    assert (dead_letter.status, dead_letter.deaths, dead_letter.body) == ("open", 2, b"\xffgarbage")


async def test_dead_letter_of_a_signal_is_resolved_by_a_replay(make_rig: MakeRig) -> None:
    rig = await make_rig()
    heartbeat = Signal(id=change(order()).id, type=HEARTBEAT, time=now(), lane="critical", epoch="x")
    await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), encode_signal(heartbeat))
    rig.collector.start()
    await rig.dead_letters(1)
    rig.replays.start()
    job = await ended(rig, await ask(rig))
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
    job = await ended(rig, await ask(rig))
    assert job.outcomes == {"resolved": 2}
    _, found = await rig.mirror.read(RESTAURANT, "order", [lost.entity_id, late.entity_id])
    assert [one is not None and one.pending for one in found] == [True, False], "PostgreSQL has the second one"
    assert {dead_letter.status for dead_letter in await rig.dead_letters(2)} == {"resolved"}

    await rig.publisher.publish_to_queue(topology.MIRROR_DEAD, message(broken))
    await rig.dead_letters(3)
    for deaths in (2, 3):
        job = await ended(rig, await ask(rig))
        assert job.outcomes == {"failed": 1}
        [dead_letter] = [one for one in await rig.dead_letters(3) if one.status == "open"]
        assert (dead_letter.reason, dead_letter.deaths, len(dead_letter.attempts)) == (
            "negative_amount",
            deaths,
            deaths,
        )
    assert job.state == "stopped", "the second death has the same cause"


async def test_lost_replay_fails_once_its_lane_is_known_to_be_empty(make_rig: MakeRig) -> None:
    rig = await make_rig()
    [made] = await dead_by_hand(rig, 1)
    replays = rig.another_replay_worker(slack_seconds=0.2)
    replays.start()
    job = await ask(rig)
    await eventually(lambda: read_job(rig, job), what="sent", until=lambda one: one.outcomes == {"sent": 1})
    async with rig.channel() as channel:
        await (await channel.get_queue(topology.lane_queue(Lane.CRITICAL))).purge()
    await rig.writer.start()
    await rig.heartbeats.start()
    job = await ended(rig, job)
    await replays.stop()
    assert job.outcomes == {"failed": 1}
    [part] = await outcomes(rig, job)
    assert part.detail is not None and "did not come out of its lane" in part.detail
    assert (await dead_letter_of(rig, made)).status == "open"


async def dead_by_hand(rig: Rig, count: int) -> list[Change]:
    """Makes `count` dead letters of good changes, without a writer; returns the changes."""
    rig.collector.start()
    made = [change(order(items=1)) for _ in range(count)]
    for one in made:
        await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), message(one))
    await rig.dead_letters(count)
    return made


# -- canary, rate, cancel ------------------------------------------------------------------------------------------


async def test_canary_waits_for_one_then_for_ten_then_sends_the_rest(make_rig: MakeRig) -> None:
    rig = await make_rig()
    made = await dead_by_hand(rig, 30)
    rig.replays.start()
    job = await ask(rig, canary=True)
    lane = topology.lane_queue(Lane.CRITICAL)
    for waiting, of_one in ((1, {"sent": 1, "waiting": 29}), (10, {"resolved": 1, "sent": 10, "waiting": 19})):
        await eventually(lambda: rig.depth(lane), what="canaries", until=lambda n, waiting=waiting: n == waiting)  # type: ignore[misc]
        seen = await eventually(
            lambda: read_job(rig, job),
            what="the outcomes noted",
            until=lambda one, of_one=of_one: one.outcomes == of_one,  # type: ignore[misc]
        )
        assert seen.state == "running"
        # The worker sends nothing more in three rounds, because the canaries are still in the lane.
        beats = seen.heartbeat_at
        for _ in range(3):
            seen = await eventually(
                lambda: read_job(rig, job),
                what="a beat",
                until=lambda one, beats=beats: one.heartbeat_at != beats,  # type: ignore[misc]
            )
            beats = seen.heartbeat_at
        assert await rig.depth(lane) == waiting
        await take_by_hand(rig, made, waiting)
    await rig.writer.start()
    job = await ended(rig, job)
    assert (job.state, job.outcomes) == ("done", {"resolved": 30})


async def take_by_hand(rig: Rig, made: list[Change], count: int) -> None:
    """Takes `count` messages as the writer does: writes each change, then acknowledges it."""
    ids = {one.id: one for one in made}
    async with rig.channel() as channel:
        queue = await channel.get_queue(topology.lane_queue(Lane.CRITICAL))
        for _ in range(count):
            taken = await queue.get(timeout=5)
            [event] = msgspec.json.decode(taken.body)
            one = ids[event["id"]]
            await rig.database.execute(
                "insert into changes (restaurant_id, change_id, entity, entity_id, version, type, source, lane,"
                " accepted_at, data) values ($1, $2, 'order', $3, 1, $4, 'orders', 'critical', $5, '{}')",
                one.restaurantid,
                one.id,
                one.entity_id,
                one.type,
                one.time,
            )
            await taken.ack()


async def test_canary_that_dies_again_holds_back_the_others(kept: Rig) -> None:
    await dead(kept, 25)
    kept.replays.start()
    job = await ended(kept, await ask(kept, canary=True))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1, "waiting": 24})
    assert {dead_letter.deaths for dead_letter in await kept.dead_letters(25)} == {1, 2}


async def test_first_death_of_the_same_cause_stops_a_job_without_canary(kept: Rig) -> None:
    await dead(kept, 60)
    kept.replays.start()
    # Slow enough that the first death is known before the last dead letter is sent.
    job = await ended(kept, await ask(kept, per_second=5.0))
    assert job.state == "stopped"
    assert 0 < 60 - job.outcomes["waiting"] < 60
    # The outcome of sent items is recorded also after the job has ended.
    await eventually(lambda: read_job(kept, job), what="settled", until=lambda one: "sent" not in one.outcomes)
    assert {dead_letter.status for dead_letter in await kept.dead_letters(60)} == {"open"}


async def test_cancelled_job_sends_no_more_and_still_records_the_outcome_of_sent_items(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await dead_by_hand(rig, 20)
    rig.replays.start()
    job = await ask(rig, canary=True)
    await eventually(lambda: read_job(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await cancel(rig, job)
    job = await ended(rig, job)
    assert (job.state, job.outcomes) == ("cancelled", {"sent": 1, "waiting": 19})
    await rig.writer.start()
    job = await eventually(lambda: read_job(rig, job), what="resolved", until=lambda one: "resolved" in one.outcomes)
    assert job.outcomes == {"resolved": 1, "waiting": 19}
    assert sorted({dead_letter.status for dead_letter in await rig.dead_letters(20)}) == ["open", "resolved"]


class InterruptedPublisher(Publisher):
    """Reaches no queue until the test makes it available."""

    available = False

    async def publish_to_queue(self, *args: Any, **options: Any) -> None:
        if not self.available:
            raise NotSent("no connection to the broker")
        await super().publish_to_queue(*args, **options)


async def test_job_cancelled_while_the_broker_is_unavailable_leaves_its_dead_letters_open(make_rig: MakeRig) -> None:
    rig: Rig = await make_rig()
    await dead_by_hand(rig, 3)
    publisher = InterruptedPublisher(
        rig.settings.rabbitmq_url, topology.CHANGES, queues=topology.bound_queues(), timeout=5.0
    )
    await publisher.start(wait=10)
    replays = rig.another_replay_worker(publisher=publisher)
    replays.start()
    try:
        job = await ask(rig)
        await eventually(
            lambda: read_job(rig, job), what="all items in progress", until=lambda one: one.outcomes.get("sending") == 3
        )
        await cancel(rig, job)
        job = await ended(rig, job)
        assert (job.state, job.outcomes) == ("cancelled", {"failed": 3})
        assert {dead_letter.status for dead_letter in await rig.dead_letters(3)} == {"open"}
        publisher.available = True
        await rig.writer.start()
        again = await ended(rig, await ask(rig))
        assert (again.state, again.outcomes) == ("done", {"resolved": 3})
    finally:
        await replays.stop()
        await publisher.stop()


async def test_dead_letter_that_is_no_longer_open_is_skipped(make_rig: MakeRig) -> None:
    rig = await make_rig()
    made = await dead_by_hand(rig, 3)
    job = await ask(rig)
    await rig.database.execute(
        "update dead_letters set status = 'discarded', closed_at = now() where change_id = $1", made[1].id
    )
    await rig.writer.start()
    rig.replays.start()
    job = await ended(rig, job)
    assert job.outcomes == {"resolved": 2, "skipped": 1}
    [part] = [one for one in await outcomes(rig, job) if one.outcome == "skipped"]
    assert part.detail == "the dead letter is discarded"
    assert (await dead_letter_of(rig, made[1])).status == "discarded"


# -- workers that stop or die --------------------------------------------------------------------------------------


async def test_next_worker_continues_the_job_of_a_stopped_worker(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await dead_by_hand(rig, 12)
    first = rig.another_replay_worker(silent_seconds=3600.0)
    first.start()
    job = await ask(rig, canary=True)
    await eventually(lambda: read_job(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await first.stop()
    assert (await read_job(rig, job)).state == "running"
    second = rig.another_replay_worker(silent_seconds=3600.0)
    second.start()
    await rig.writer.start()
    job = await ended(rig, job)
    await second.stop()
    assert (job.state, job.outcomes) == ("done", {"resolved": 12})


async def test_job_of_a_dead_worker_is_taken_over_and_its_unfinished_items_are_sent_again(make_rig: MakeRig) -> None:
    rig = await make_rig()
    made = await dead_by_hand(rig, 5)
    job = await ask(rig)
    # The state a minute after kill -9: one item was about to be sent, and it is in doubt.
    await rig.database.execute(
        "update replay_jobs set state = 'running', worker = gen_random_uuid(),"
        " heartbeat_at = now() - interval '1 minute'"
        " where id = $1",
        job.id,
    )
    await rig.database.execute(
        "update dead_letters set status = 'replaying' where id in"
        " (select dead_letter_id from replay_job_items where position = 1)"
    )
    await rig.database.execute("update replay_job_items set outcome = 'sending', at = now() where position = 1")
    await rig.writer.start()
    rig.replays.start()
    job = await ended(rig, job)
    assert (job.state, job.outcomes) == ("done", {"resolved": 5})
    await rig.written(*made)


async def test_frozen_worker_leaves_a_job_that_another_worker_took_over(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await dead_by_hand(rig, 12)
    rig.replays.start()
    job = await ask(rig, canary=True)
    await eventually(lambda: read_job(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await rig.database.execute(
        "update replay_jobs set worker = gen_random_uuid(), heartbeat_at = now() + interval '1 hour' where id = $1",
        job.id,
    )
    await rig.writer.start()
    settled = await eventually(
        lambda: read_job(rig, job), what="the canary resolved", until=lambda one: one.outcomes.get("resolved") == 1
    )
    await eventually(lambda: asyncio.sleep(0, rig.replays.running_jobs), what="the job left", until=lambda n: n == 0)
    assert settled.outcomes == {"resolved": 1, "waiting": 11}
    assert (await read_job(rig, job)).state == "running"


async def test_two_workers_share_the_jobs_and_run_each_once(kept: Rig) -> None:
    made = await dead(kept, 20)
    await kept.as_owner(ALLOW)
    jobs = [await ask(kept, query=DeadLetterQuery(change_id=one.id)) for one in made]
    second: Replays = kept.another_replay_worker()
    kept.replays.start()
    second.start()
    for job in jobs:
        assert (await ended(kept, job)).outcomes == {"resolved": 1}
    await second.stop()
    assert {dead_letter.revision for dead_letter in await kept.dead_letters(20)} == {3}, (
        "each is replayed once and resolved once"
    )


async def test_job_waits_while_the_backends_are_unavailable(make_rig: MakeRig, servers: Servers) -> None:
    rig = await make_rig(database_timeout_seconds=1.0)
    made = await dead_by_hand(rig, 15)
    rig.replays.start()
    job = await ask(rig, canary=True)
    await eventually(lambda: read_job(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await rig.database.close()
    rig.database = None
    await asyncio.to_thread(servers.postgres.kill)
    await asyncio.to_thread(servers.rabbitmq.stop)
    await asyncio.to_thread(servers.postgres.start)
    rig.database = await asyncpg.connect(rig.settings.database_writer_url)
    await asyncio.to_thread(servers.rabbitmq.start)
    await rig.writer.start()
    job = await ended(rig, job, within=60)
    assert (job.state, job.outcomes) == ("done", {"resolved": 15})
    await rig.written(*made)


async def test_replay_worker_that_was_never_started_can_be_stopped_twice(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.replays.stop()
    await rig.replays.stop()


# -- dry runs ------------------------------------------------------------------------------------------------------


async def test_dry_run_reports_outcomes_and_leaves_no_trace(kept: Rig) -> None:
    first = change(order(items=1))
    newer = change(
        order(id=first.entity_id, items=1, status=OrderStatus.RECEIVED), entityversion=3, basechangeid=first.id
    )
    await kept.publish(first)
    await kept.written(first)
    await kept.publish(newer)
    await kept.written(newer)
    would_write, refused = change(order(items=2)), change(order(items=1, notes="forbidden"))
    superseded = change(order(id=first.entity_id, items=4), entityversion=2, basechangeid=first.id)
    forked = change(order(id=first.entity_id, items=5, notes="fork"), entityversion=4, basechangeid=first.id)
    broken = msgspec.json.encode(change(menu_item())).replace(b'"price":', b'"price":-')
    changes = {"would_write": would_write, "refused": refused, "superseded": superseded, "fork": forked}
    for one in (*changes.values(), broken, first):
        await kept.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), message(one))  # type: ignore[arg-type]
    await kept.publisher.publish_to_queue(topology.MIRROR_DEAD, message(would_write))
    await kept.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), b"garbage")
    await kept.dead_letters(8)
    before = await tables(kept)
    kept.replays.start()
    job = await ended(kept, await ask(kept, "dry_run", canary=True))
    assert (job.state, job.outcomes) == ("done", {"would_write": 3, "superseded": 2, "would_fail": 3})
    assert await tables(kept) == before
    results: dict[tuple[str | None, str | None], tuple[str | None, str | None]] = {}
    for part in await outcomes(kept, job):
        dead_letter = await dead_letter_store.one(kept.database, part.dead_letter_id)
        assert dead_letter is not None
        assert (dead_letter.status, dead_letter.revision) == ("open", 1)
        results[dead_letter.change_id, dead_letter.lane] = (part.outcome, part.detail)
    assert results[would_write.id, "critical"] == ("would_write", "version 1")
    assert results[would_write.id, None] == ("would_write", "version 1, into the mirror")
    assert results[superseded.id, "critical"][0] == "superseded"
    assert "the head is version 3" in str(results[superseded.id, "critical"][1])
    assert results[forked.id, "critical"] == ("would_write", "version 4, and opens a conflict")
    assert results[first.id, "critical"] == ("superseded", "the change is already written")
    assert "no_forbidden" in str(results[refused.id, "critical"][1])
    assert "negative_amount" in str([detail for _, detail in results.values()])
    assert str(results[None, "critical"][1]).startswith("undecodable")


async def tables(rig: Rig) -> list[Any]:
    names = ("orders", "order_items", "payments", "menu_items", "changes", "conflicts", "retries")
    return [await rig.database.fetch(f"select * from {name} order by 1, 2, 3") for name in names]
