"""Replays and dry runs on real servers: what is sent, what comes of it, and who goes on when a worker dies."""

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg
import msgspec
import pytest

from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.replay_jobs import ReplayItem, ReplayJob
from services.sync.dead_letters.replays import Replays
from services.sync.dead_letters.store import DeadLetterQuery, FullDeadLetter
from shared.entities.contract import Change, Lane, now
from shared.entities.order import ENTITY, OrderStatus
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.messaging import topology
from shared.messaging.log import LogReader
from shared.messaging.publisher import NotSent
from shared.mirror.mirror import Apply
from tests.rigs.builders import RESTAURANT, change, menu_item, message, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

NO_FORBIDDEN = "alter table orders add constraint no_forbidden check (notes is distinct from 'forbidden')"
ALLOW = "alter table orders drop constraint no_forbidden"


@pytest.fixture
async def kept(rig: Rig) -> Rig:
    """A writer, a keeper, and a database that refuses orders with the notes 'forbidden'."""
    rig.keeper.start()
    await rig.as_owner(NO_FORBIDDEN)
    return rig


async def dead(rig: Rig, count: int) -> list[Change]:
    """So many orders that the database has refused, the oldest letter first."""
    made = [change(order(items=1, notes="forbidden")) for _ in range(count)]
    await rig.publish(*made)
    order_of = [letter.change_id for letter in await rig.letters(count)]
    return sorted(made, key=lambda one: order_of.index(one.id))


async def ask(rig: Rig, kind: str = "replay", **settings: Any) -> ReplayJob:
    """As an operator does; by default as fast as it goes, and all of it."""
    chosen: dict[str, Any] = {"per_second": 10_000.0, "canary": False, **settings}
    wanted = chosen.pop("wanted", DeadLetterQuery())
    ops = await asyncpg.connect(rig.settings.database_ops_url)
    job = await replay_jobs.make(ops, wanted, kind=kind, actor="nadia", role="operator", **chosen)  # type: ignore[arg-type]
    await ops.close()
    return job


async def cancel(rig: Rig, job: ReplayJob) -> None:
    ops = await asyncpg.connect(rig.settings.database_ops_url)
    await replay_jobs.cancel(ops, job.id, actor="nadia", role="operator")  # type: ignore[arg-type]
    await ops.close()


async def now_of(rig: Rig, job: ReplayJob) -> ReplayJob:
    found = await replay_jobs.one(rig.database, job.id)
    assert found is not None
    return found


async def ended(rig: Rig, job: ReplayJob, *, within: float = 30.0) -> ReplayJob:
    return await eventually(lambda: now_of(rig, job), what="the job's end", within=within, until=lambda one: one.ended)


async def outcomes(rig: Rig, job: ReplayJob) -> Sequence[ReplayItem]:
    return await replay_jobs.items(rig.database, job.id)


async def letter_of(rig: Rig, made: Change) -> FullDeadLetter:
    [found] = await dead_letter_store.page(rig.database, DeadLetterQuery(change_id=made.id))
    whole = await dead_letter_store.one(rig.database, found.id)
    assert whole is not None
    return whole


# -- what comes of a replay ----------------------------------------------------------------------------------------


async def test_a_replay_that_is_written_resolves_its_letter_and_the_mirror_says_synced(kept: Rig) -> None:
    [made] = await reveal_and_kill(kept)
    await kept.as_owner(ALLOW)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes, job.total) == ("done", {"resolved": 1}, 1)
    letter = await letter_of(kept, made)
    assert (letter.status, letter.deaths, letter.revision) == ("resolved", 1, 3)
    assert letter.closed_at is not None
    assert await kept.count("orders") == 1

    async def synced() -> bool:
        _, [found] = await kept.mirror.read(RESTAURANT, "order", [made.entity_id])
        return found is not None and not found.pending and not found.failure

    await eventually(synced, what="synced in the mirror")


async def reveal_and_kill(rig: Rig) -> list[Change]:
    made = change(order(items=1, notes="forbidden"))
    await rig.mirror.apply([Apply(ENTITY, ENTITY.decode(made), made.head, bytes(made.data.after), made.time)])
    await rig.publish(made)
    await rig.letters(1)

    async def failed() -> bool:
        _, [found] = await rig.mirror.read(RESTAURANT, "order", [made.entity_id])
        return found is not None and bool(found.failure)

    await eventually(failed, what="failed in the mirror")
    return [made]


async def test_a_replay_goes_through_its_lane_alone_and_the_log_does_not_have_it_twice(kept: Rig) -> None:
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


async def test_a_replay_that_dies_again_is_the_same_letter_and_stops_its_job(kept: Rig) -> None:
    [made] = await dead(kept, 1)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    assert job.message is not None and "with the same cause again" in job.message
    [part] = await outcomes(kept, job)
    assert part.again is True
    assert part.detail is not None and part.detail.startswith("refused_by_postgres: CheckViolationError")
    letter = await letter_of(kept, made)
    assert (letter.status, letter.deaths, len(letter.attempts)) == ("open", 2, 2)
    assert letter.headers["ticketrail-replay"] == letter.id
    assert letter.headers["ticketrail-attempt"] == 1, "it had the whole ladder before it"


async def test_a_replay_that_dies_of_something_else_does_not_stop_the_others(kept: Rig) -> None:
    made = await dead(kept, 3)
    await kept.as_owner(ALLOW)
    await kept.as_owner(f"alter table orders add constraint other check (id <> '{made[0].entity_id}')")
    # Of another fingerprint than before: the first one had died of the notes, in a version with another place.
    await kept.database.execute("update dead_letters set fingerprint = 'another'")
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes) == ("done", {"resolved": 2, "failed": 1})
    [failed] = [one for one in await outcomes(kept, job) if one.outcome == "failed"]
    assert (failed.position, failed.again) == (1, False)


async def test_a_replay_climbs_the_ladder_and_is_waited_for(kept: Rig) -> None:
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
    assert (await letter_of(kept, made)).status == "resolved"


async def test_what_was_written_meanwhile_is_not_sent_again(kept: Rig) -> None:
    [made] = await dead(kept, 1)
    await kept.as_owner(ALLOW)
    await kept.publish(made)  # another copy, out of a journal for instance
    await kept.written(made)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    [part] = await outcomes(kept, job)
    assert (part.outcome, part.detail) == ("resolved", "it was already written")


async def test_an_event_with_the_id_of_another_that_was_written_is_not_taken_for_it(kept: Rig) -> None:
    good = change(order())
    await kept.publish(good, msgspec.json.encode(good).replace(b'"total":', b'"total":-'))
    await kept.written(good)
    await kept.letters(1)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    assert (await letter_of(kept, good)).status == "open"


async def test_an_undecodable_letter_dies_again_and_says_so(kept: Rig) -> None:
    await kept.publisher.publish(Lane.CRITICAL.value, b"\xffgarbage")
    await kept.letters(1)
    kept.replays.start()
    job = await ended(kept, await ask(kept))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1})
    [letter] = await kept.letters(1)
    assert (letter.status, letter.deaths, letter.body) == ("open", 2, b"\xffgarbage")


async def test_a_signal_that_died_is_laid_to_rest(make_rig: MakeRig) -> None:
    rig = await make_rig()
    heartbeat = Signal(id=change(order()).id, type=HEARTBEAT, time=now(), lane="critical", epoch="x")
    await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), encode_signal(heartbeat))
    rig.keeper.start()
    await rig.letters(1)
    rig.replays.start()
    job = await ended(rig, await ask(rig))
    assert job.outcomes == {"resolved": 1}


async def test_letters_of_the_mirror_are_applied_to_the_mirror(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.writer.start()
    rig.keeper.start()
    lost, late = change(order()), change(order())
    await rig.publish(late)
    await rig.written(late)
    late = msgspec.structs.replace(late, time=late.time.replace(year=late.time.year - 1))
    for one in (lost, late):
        await rig.publisher.publish_to_queue(topology.MIRROR_DEAD, message(one))
    broken = msgspec.json.encode(change(order())).replace(b'"total":', b'"total":-')
    await rig.letters(2)
    rig.replays.start()
    job = await ended(rig, await ask(rig))
    assert job.outcomes == {"resolved": 2}
    _, found = await rig.mirror.read(RESTAURANT, "order", [lost.entity_id, late.entity_id])
    assert [one is not None and one.pending for one in found] == [True, False], "PostgreSQL has the second one"
    assert {letter.status for letter in await rig.letters(2)} == {"resolved"}

    await rig.publisher.publish_to_queue(topology.MIRROR_DEAD, message(broken))
    await rig.letters(3)
    for deaths in (2, 3):
        job = await ended(rig, await ask(rig))
        assert job.outcomes == {"failed": 1}
        [letter] = [one for one in await rig.letters(3) if one.status == "open"]
        assert (letter.reason, letter.deaths, len(letter.attempts)) == ("negative_amount", deaths, deaths)
    assert job.state == "stopped", "the second time it died of the same"


async def test_a_replay_that_is_lost_on_the_way_fails_when_its_lane_is_known_to_be_empty(make_rig: MakeRig) -> None:
    rig = await make_rig()
    [made] = await dead_by_hand(rig, 1)
    replays = rig.another_worker(slack_seconds=0.2)
    replays.start()
    job = await ask(rig)
    await eventually(lambda: now_of(rig, job), what="sent", until=lambda one: one.outcomes == {"sent": 1})
    async with rig.channel() as channel:
        await (await channel.get_queue(topology.lane_queue(Lane.CRITICAL))).purge()
    await rig.writer.start()
    await rig.heartbeats.start()
    job = await ended(rig, job)
    await replays.stop()
    assert job.outcomes == {"failed": 1}
    [part] = await outcomes(rig, job)
    assert part.detail is not None and "no outcome was seen" in part.detail
    assert (await letter_of(rig, made)).status == "open"


async def dead_by_hand(rig: Rig, count: int) -> list[Change]:
    """Without a writer: letters of good changes."""
    rig.keeper.start()
    made = [change(order(items=1)) for _ in range(count)]
    for one in made:
        await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), message(one))
    await rig.letters(count)
    return made


# -- canary, rate, cancel ------------------------------------------------------------------------------------------


async def test_a_canary_waits_for_one_then_for_ten_then_sends_the_rest(make_rig: MakeRig) -> None:
    rig = await make_rig()
    made = await dead_by_hand(rig, 30)
    rig.replays.start()
    job = await ask(rig, canary=True)
    lane = topology.lane_queue(Lane.CRITICAL)
    for waiting, of_one in ((1, {"sent": 1, "waiting": 29}), (10, {"resolved": 1, "sent": 10, "waiting": 19})):
        await eventually(lambda: rig.depth(lane), what="canaries", until=lambda n, waiting=waiting: n == waiting)  # type: ignore[misc]
        seen = await eventually(
            lambda: now_of(rig, job),
            what="noted",
            until=lambda one, of_one=of_one: one.outcomes == of_one,  # type: ignore[misc]
        )
        assert seen.state == "running"
        # Nothing more comes, however often the worker looks: what it waits for has not come out of the lane.
        beats = seen.beat_at
        for _ in range(3):
            seen = await eventually(
                lambda: now_of(rig, job),
                what="a beat",
                until=lambda one, beats=beats: one.beat_at != beats,  # type: ignore[misc]
            )
            beats = seen.beat_at
        assert await rig.depth(lane) == waiting
        await take_by_hand(rig, made, waiting)
    await rig.writer.start()
    job = await ended(rig, job)
    assert (job.state, job.outcomes) == ("done", {"resolved": 30})


async def take_by_hand(rig: Rig, made: list[Change], count: int) -> None:
    """As the writer would: written, then acknowledged."""
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


async def test_a_canary_that_dies_again_keeps_the_others_back(kept: Rig) -> None:
    await dead(kept, 25)
    kept.replays.start()
    job = await ended(kept, await ask(kept, canary=True))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1, "waiting": 24})
    assert {letter.deaths for letter in await kept.letters(25)} == {1, 2}


async def test_without_a_canary_the_first_that_dies_of_the_same_stops_the_rest(kept: Rig) -> None:
    await dead(kept, 60)
    kept.replays.start()
    job = await ended(kept, await ask(kept, per_second=5.0))  # slow enough for the verdict to come before the end
    assert job.state == "stopped"
    assert 0 < 60 - job.outcomes["waiting"] < 60
    # What had been sent takes its course, also after the end.
    await eventually(lambda: now_of(kept, job), what="settled", until=lambda one: "sent" not in one.outcomes)
    assert {letter.status for letter in await kept.letters(60)} == {"open"}


async def test_a_job_that_is_cancelled_sends_nothing_more_and_what_was_sent_takes_its_course(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await dead_by_hand(rig, 20)
    rig.replays.start()
    job = await ask(rig, canary=True)
    await eventually(lambda: now_of(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await cancel(rig, job)
    job = await ended(rig, job)
    assert (job.state, job.outcomes) == ("cancelled", {"sent": 1, "waiting": 19})
    await rig.writer.start()
    job = await eventually(lambda: now_of(rig, job), what="resolved", until=lambda one: "resolved" in one.outcomes)
    assert job.outcomes == {"resolved": 1, "waiting": 19}
    assert sorted({letter.status for letter in await rig.letters(20)}) == ["open", "resolved"]


async def test_a_job_that_is_cancelled_while_the_broker_is_away_leaves_its_letters_open(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await make_rig()
    await dead_by_hand(rig, 3)

    async def away(*_: Any, **__: Any) -> None:
        raise NotSent("no connection to the broker")

    monkeypatch.setattr(rig.replays._publisher, "publish_to_queue", away)
    rig.replays.start()
    job = await ask(rig)
    await eventually(lambda: now_of(rig, job), what="begun", until=lambda one: one.outcomes.get("sending") == 3)
    await cancel(rig, job)
    job = await ended(rig, job)
    assert (job.state, job.outcomes) == ("cancelled", {"failed": 3})
    assert {letter.status for letter in await rig.letters(3)} == {"open"}
    monkeypatch.undo()
    await rig.writer.start()
    again = await ended(rig, await ask(rig))
    assert (again.state, again.outcomes) == ("done", {"resolved": 3})


async def test_what_is_not_open_any_more_is_skipped(make_rig: MakeRig) -> None:
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
    assert part.detail == "it is discarded"
    assert (await letter_of(rig, made[1])).status == "discarded"


# -- workers that come and go --------------------------------------------------------------------------------------


async def test_a_job_goes_on_in_the_next_worker_when_its_own_stops(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await dead_by_hand(rig, 12)
    first = rig.another_worker(silent_seconds=3600.0)
    first.start()
    job = await ask(rig, canary=True)
    await eventually(lambda: now_of(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await first.stop()
    assert (await now_of(rig, job)).state == "running"
    second = rig.another_worker(silent_seconds=3600.0)
    second.start()
    await rig.writer.start()
    job = await ended(rig, job)
    await second.stop()
    assert (job.state, job.outcomes) == ("done", {"resolved": 12})


async def test_a_job_of_a_worker_that_died_is_taken_over_and_what_it_had_begun_is_sent_again(make_rig: MakeRig) -> None:
    rig = await make_rig()
    made = await dead_by_hand(rig, 5)
    job = await ask(rig)
    # As kill -9 leaves it, a while later: one letter was to be sent, and nobody knows whether it was.
    await rig.database.execute(
        "update replay_jobs set state = 'running', worker = gen_random_uuid(), beat_at = now() - interval '1 minute'"
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


async def test_a_worker_that_was_frozen_and_lost_its_job_leaves_it_alone(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await dead_by_hand(rig, 12)
    rig.replays.start()
    job = await ask(rig, canary=True)
    await eventually(lambda: now_of(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await rig.database.execute(
        "update replay_jobs set worker = gen_random_uuid(), beat_at = now() + interval '1 hour' where id = $1", job.id
    )
    await rig.writer.start()
    settled = await eventually(
        lambda: now_of(rig, job), what="the canary's end", until=lambda one: one.outcomes.get("resolved") == 1
    )
    await eventually(lambda: asyncio.sleep(0, len(rig.replays._jobs)), what="left it", until=lambda n: n == 0)
    assert settled.outcomes == {"resolved": 1, "waiting": 11}
    assert (await now_of(rig, job)).state == "running"


async def test_two_workers_share_the_jobs_and_run_each_once(kept: Rig) -> None:
    made = await dead(kept, 20)
    await kept.as_owner(ALLOW)
    jobs = [await ask(kept, wanted=DeadLetterQuery(change_id=one.id)) for one in made]
    second: Replays = kept.another_worker()
    kept.replays.start()
    second.start()
    for job in jobs:
        assert (await ended(kept, job)).outcomes == {"resolved": 1}
    await second.stop()
    assert {letter.revision for letter in await kept.letters(20)} == {3}, "replaying once, resolved once"


async def test_while_the_backends_are_away_a_job_waits(make_rig: MakeRig, servers: Servers) -> None:
    rig = await make_rig(database_timeout_seconds=1.0)
    made = await dead_by_hand(rig, 15)
    rig.replays.start()
    job = await ask(rig, canary=True)
    await eventually(lambda: now_of(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
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


async def test_replays_that_were_never_started_can_be_stopped_twice(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.replays.stop()
    await rig.replays.stop()


# -- dry runs ------------------------------------------------------------------------------------------------------


async def test_a_dry_run_says_what_would_happen_and_nothing_of_it_stays(kept: Rig) -> None:
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
    letters = {"would_write": would_write, "refused": refused, "superseded": superseded, "fork": forked}
    for one in (*letters.values(), broken, first):
        await kept.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), message(one))  # type: ignore[arg-type]
    await kept.publisher.publish_to_queue(topology.MIRROR_DEAD, message(would_write))
    await kept.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), b"garbage")
    await kept.letters(8)
    before = await tables(kept)
    kept.replays.start()
    job = await ended(kept, await ask(kept, "dry_run", canary=True))
    assert (job.state, job.outcomes) == ("done", {"would_write": 3, "superseded": 2, "would_fail": 3})
    assert await tables(kept) == before
    said: dict[tuple[str | None, str | None], tuple[str | None, str | None]] = {}
    for part in await outcomes(kept, job):
        letter = await dead_letter_store.one(kept.database, part.dead_letter_id)
        assert letter is not None
        assert (letter.status, letter.revision) == ("open", 1)
        said[letter.change_id, letter.lane] = (part.outcome, part.detail)
    assert said[would_write.id, "critical"] == ("would_write", "version 1")
    assert said[would_write.id, None] == ("would_write", "version 1, into the mirror")
    assert said[superseded.id, "critical"][0] == "superseded"
    assert "the head is version 3" in str(said[superseded.id, "critical"][1])
    assert said[forked.id, "critical"] == ("would_write", "version 4, and opens a conflict")
    assert said[first.id, "critical"] == ("superseded", "it is already written")
    assert "no_forbidden" in str(said[refused.id, "critical"][1])
    assert "negative_amount" in str([detail for _, detail in said.values()])
    assert str(said[None, "critical"][1]).startswith("undecodable")


async def tables(rig: Rig) -> list[Any]:
    names = ("orders", "order_items", "payments", "menu_items", "changes", "conflicts", "retries")
    return [await rig.database.fetch(f"select * from {name} order by 1, 2, 3") for name in names]
