"""Replay jobs on real servers: the canary, the rate, and cancelled jobs."""

import operator
from datetime import datetime
from functools import partial
from typing import Any

import msgspec

from shared.entities.contract import Change, Lane
from shared.messaging import topology
from shared.messaging.publisher import NotSent, Publisher
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.replays import (
    cancel_job,
    create_job,
    make_dead_letters,
    make_refused,
    read_dead_letter,
    read_items,
    read_job,
    wait_ended,
)
from tests.rigs.system import eventually


async def test_canary_waits_for_one_then_for_ten_then_sends_the_rest(make_rig: MakeRig) -> None:
    rig = await make_rig()
    made = await make_dead_letters(rig, 30)
    rig.replays.start()
    job = await create_job(rig, canary=True)
    lane = topology.lane_queue(Lane.CRITICAL)
    for waiting, of_one in ((1, {"sent": 1, "waiting": 29}), (10, {"resolved": 1, "sent": 10, "waiting": 19})):
        await eventually(lambda: rig.depth(lane), what="canaries in the lane", until=partial(operator.eq, waiting))

        async def outcomes() -> dict[str, int]:
            return (await read_job(rig, job)).outcomes

        await eventually(outcomes, what="the outcomes of the canaries", until=partial(operator.eq, of_one))
        seen = await read_job(rig, job)
        assert seen.state == "running"
        # The worker sends nothing more in three rounds, because the canaries are still in the lane.
        last = seen.heartbeat_at

        async def heartbeat() -> datetime | None:
            return (await read_job(rig, job)).heartbeat_at

        for _ in range(3):
            last = await eventually(heartbeat, what="a heartbeat of the job", until=partial(operator.ne, last))
        assert await rig.depth(lane) == waiting
        await take_by_hand(rig, made, waiting)
    await rig.writer.start()
    job = await wait_ended(rig, job)
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


async def test_canary_that_dies_again_holds_back_the_others(refusing_rig: Rig) -> None:
    await make_refused(refusing_rig, 25)
    refusing_rig.replays.start()
    job = await wait_ended(refusing_rig, await create_job(refusing_rig, canary=True))
    assert (job.state, job.outcomes) == ("stopped", {"failed": 1, "waiting": 24})
    assert {dead_letter.deaths for dead_letter in await refusing_rig.dead_letters(25)} == {1, 2}


async def test_first_death_of_the_same_cause_stops_a_job_without_canary(refusing_rig: Rig) -> None:
    await make_refused(refusing_rig, 60)
    refusing_rig.replays.start()
    # The rate is low, so that the first death is known before the last dead letter is sent.
    job = await wait_ended(refusing_rig, await create_job(refusing_rig, per_second=5.0))
    assert job.state == "stopped"
    assert 0 < 60 - job.outcomes["waiting"] < 60
    # The outcome of sent items is recorded also after the job has ended.
    await eventually(
        lambda: read_job(refusing_rig, job),
        what="an order without pending or open states",
        until=lambda one: "sent" not in one.outcomes,
    )
    assert {dead_letter.status for dead_letter in await refusing_rig.dead_letters(60)} == {"open"}


async def test_cancelled_job_sends_no_more_and_still_records_the_outcome_of_sent_items(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await make_dead_letters(rig, 20)
    rig.replays.start()
    job = await create_job(rig, canary=True)
    await eventually(lambda: read_job(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await cancel_job(rig, job)
    job = await wait_ended(rig, job)
    assert (job.state, job.outcomes) == ("cancelled", {"sent": 1, "waiting": 19})
    await rig.writer.start()
    job = await eventually(
        lambda: read_job(rig, job), what="a resolved dead letter", until=lambda one: "resolved" in one.outcomes
    )
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
    await make_dead_letters(rig, 3)
    publisher = InterruptedPublisher(
        rig.settings.rabbitmq_url, topology.CHANGES, queues=topology.bound_queues(), timeout=5.0
    )
    await publisher.start(wait=10)
    replays = rig.another_replay_worker(publisher=publisher)
    replays.start()
    try:
        job = await create_job(rig)
        await eventually(
            lambda: read_job(rig, job), what="all items in progress", until=lambda one: one.outcomes.get("sending") == 3
        )
        await cancel_job(rig, job)
        job = await wait_ended(rig, job)
        assert (job.state, job.outcomes) == ("cancelled", {"failed": 3})
        assert {dead_letter.status for dead_letter in await rig.dead_letters(3)} == {"open"}
        publisher.available = True
        await rig.writer.start()
        again = await wait_ended(rig, await create_job(rig))
        assert (again.state, again.outcomes) == ("done", {"resolved": 3})
    finally:
        await replays.stop()
        await publisher.stop()


async def test_dead_letter_that_is_no_longer_open_is_skipped(make_rig: MakeRig) -> None:
    rig = await make_rig()
    made = await make_dead_letters(rig, 3)
    job = await create_job(rig)
    await rig.database.execute(
        "update dead_letters set status = 'discarded', closed_at = now() where change_id = $1", made[1].id
    )
    await rig.writer.start()
    rig.replays.start()
    job = await wait_ended(rig, job)
    assert job.outcomes == {"resolved": 2, "skipped": 1}
    [part] = [one for one in await read_items(rig, job) if one.outcome == "skipped"]
    assert part.detail == "the dead letter is discarded"
    assert (await read_dead_letter(rig, made[1])).status == "discarded"
