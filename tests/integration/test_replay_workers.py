"""Replay workers on real servers: a job continues when its worker stops, dies or freezes."""

import asyncio

import asyncpg
import pytest

from services.sync.dead_letters.replay_worker import Replays
from services.sync.dead_letters.store import DeadLetterQuery
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.replays import (
    ALLOW_FORBIDDEN_NOTES,
    create_job,
    make_dead_letters,
    make_refused,
    read_job,
    wait_ended,
)
from tests.rigs.servers import Servers
from tests.rigs.system import eventually


async def test_next_worker_continues_the_job_of_a_stopped_worker(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await make_dead_letters(rig, 12)
    first = rig.another_replay_worker(silent_seconds=3600.0)
    first.start()
    job = await create_job(rig, canary=True)
    await eventually(lambda: read_job(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await first.stop()
    assert (await read_job(rig, job)).state == "running"
    second = rig.another_replay_worker(silent_seconds=3600.0)
    second.start()
    await rig.writer.start()
    job = await wait_ended(rig, job)
    await second.stop()
    assert (job.state, job.outcomes) == ("done", {"resolved": 12})


async def test_job_of_a_dead_worker_is_taken_over_and_its_unfinished_items_are_sent_again(make_rig: MakeRig) -> None:
    rig = await make_rig()
    made = await make_dead_letters(rig, 5)
    job = await create_job(rig)
    # The state a minute after a kill -9: the worker was about to send one item, which is in doubt.
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
    job = await wait_ended(rig, job)
    assert (job.state, job.outcomes) == ("done", {"resolved": 5})
    await rig.written(*made)


async def test_frozen_worker_leaves_a_job_that_another_worker_took_over(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await make_dead_letters(rig, 12)
    rig.replays.start()
    job = await create_job(rig, canary=True)
    await eventually(lambda: read_job(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await rig.database.execute(
        "update replay_jobs set worker = gen_random_uuid(), heartbeat_at = now() + interval '1 hour' where id = $1",
        job.id,
    )
    await rig.writer.start()
    settled = await eventually(
        lambda: read_job(rig, job), what="a resolved canary", until=lambda one: one.outcomes.get("resolved") == 1
    )
    await eventually(
        lambda: asyncio.sleep(0, rig.replays.running_jobs), what="a worker without the job", until=lambda n: n == 0
    )
    assert settled.outcomes == {"resolved": 1, "waiting": 11}
    assert (await read_job(rig, job)).state == "running"


async def test_two_workers_share_the_jobs_and_run_each_once(refusing_rig: Rig) -> None:
    made = await make_refused(refusing_rig, 20)
    await refusing_rig.as_owner(ALLOW_FORBIDDEN_NOTES)
    jobs = [await create_job(refusing_rig, query=DeadLetterQuery(change_id=one.id)) for one in made]
    second: Replays = refusing_rig.another_replay_worker()
    refusing_rig.replays.start()
    second.start()
    for job in jobs:
        assert (await wait_ended(refusing_rig, job)).outcomes == {"resolved": 1}
    await second.stop()
    assert {dead_letter.revision for dead_letter in await refusing_rig.dead_letters(20)} == {3}, (
        "a dead letter was replayed or resolved twice"
    )


@pytest.mark.slow  # the backends are away for seconds, one after the other
async def test_job_waits_while_the_backends_are_unavailable(make_rig: MakeRig, servers: Servers) -> None:
    rig = await make_rig(database_timeout_seconds=1.0)
    made = await make_dead_letters(rig, 15)
    rig.replays.start()
    job = await create_job(rig, canary=True)
    await eventually(lambda: read_job(rig, job), what="the canary", until=lambda one: one.outcomes.get("sent") == 1)
    await rig.database.close()
    rig.database = None
    await asyncio.to_thread(servers.postgres.kill)
    await asyncio.to_thread(servers.rabbitmq.stop)
    await asyncio.to_thread(servers.postgres.start)
    rig.database = await asyncpg.connect(rig.settings.database_writer_url)
    await asyncio.to_thread(servers.rabbitmq.start)
    await rig.writer.start()
    job = await wait_ended(rig, job, within=60)
    assert (job.state, job.outcomes) == ("done", {"resolved": 15})
    await rig.written(*made)


async def test_replay_worker_that_was_never_started_can_be_stopped_twice(make_rig: MakeRig) -> None:
    rig = await make_rig()
    await rig.replays.stop()
    await rig.replays.stop()
