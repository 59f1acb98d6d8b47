"""Dead letters that a test replays, and replay jobs as an operator creates them."""

from collections.abc import Sequence
from typing import Any

import asyncpg

from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.replay_jobs import ReplayItem, ReplayJob
from services.sync.dead_letters.store import DeadLetterQuery, FullDeadLetter
from shared.entities.contract import Change, Lane
from shared.messaging import topology
from tests.rigs.builders import change, message, order
from tests.rigs.postgres_writer import Rig
from tests.rigs.system import eventually

REFUSE_FORBIDDEN_NOTES = "alter table orders add constraint no_forbidden check (notes is distinct from 'forbidden')"


ALLOW_FORBIDDEN_NOTES = "alter table orders drop constraint no_forbidden"


async def make_refused(rig: Rig, count: int) -> list[Change]:
    """Makes `count` orders that the database refuses; returns them, the oldest dead letter first."""
    made = [change(order(items=1, notes="forbidden")) for _ in range(count)]
    await rig.publish(*made)
    order_of = [dead_letter.change_id for dead_letter in await rig.dead_letters(count)]
    return sorted(made, key=lambda one: order_of.index(one.id))


async def create_job(rig: Rig, kind: str = "replay", **settings: Any) -> ReplayJob:
    """Creates a job as an operator does; by default at full speed, without canary, for every dead letter."""
    chosen: dict[str, Any] = {"per_second": 10_000.0, "canary": False, **settings}
    query = chosen.pop("query", DeadLetterQuery())
    ops = await asyncpg.connect(rig.settings.database_ops_url)
    job = await replay_jobs.make(ops, query, kind=kind, actor="nadia", role="operator", **chosen)
    await ops.close()
    return job


async def cancel_job(rig: Rig, job: ReplayJob) -> None:
    ops = await asyncpg.connect(rig.settings.database_ops_url)
    await replay_jobs.cancel(ops, job.id, actor="nadia", role="operator")
    await ops.close()


async def read_job(rig: Rig, job: ReplayJob) -> ReplayJob:
    found = await replay_jobs.one(rig.database, job.id)
    assert found is not None
    return found


async def wait_ended(rig: Rig, job: ReplayJob, *, within: float = 30.0) -> ReplayJob:
    return await eventually(
        lambda: read_job(rig, job), what="the end of the job", within=within, until=lambda one: one.ended
    )


async def read_items(rig: Rig, job: ReplayJob) -> Sequence[ReplayItem]:
    return await replay_jobs.items(rig.database, job.id)


async def read_dead_letter(rig: Rig, made: Change) -> FullDeadLetter:
    [found] = await dead_letter_store.page(rig.database, DeadLetterQuery(change_id=made.id))
    whole = await dead_letter_store.one(rig.database, found.id)
    assert whole is not None
    return whole


async def make_dead_letters(rig: Rig, count: int) -> list[Change]:
    """Makes `count` dead letters of good changes, without a writer; returns the changes."""
    rig.collector.start()
    made = [change(order(items=1)) for _ in range(count)]
    for one in made:
        await rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), message(one))
    await rig.dead_letters(count)
    return made
