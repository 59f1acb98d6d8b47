"""The SQL with which a worker runs a job: a replay, a dry run, a discard or a restore. Each step is committed
on its own, so that another worker can continue a job whose worker died.

    (none) -> sending -> sent -> resolved | failed | skipped
    (none) -> would_write | superseded | would_fail | skipped        in a dry run
    (none) -> discarded | restored | failed | skipped                in a discard or a restore

An item is `sending` before its publish and `sent` after it. If another worker takes over the job in between, it sends
the dead letter again, which is harmless. A dead letter is `replaying` from `sending` on. If it fails again, it becomes
open (`keep` in `failures/dead_letter_store.py`), and `settle` derives the outcome from this, also for ended jobs.
"""

from collections.abc import Sequence

from msgspec import Struct

from shared.postgres.pool import Connection

_CLAIM = """
update replay_jobs set state = 'running', worker = $1, heartbeat_at = now(), started_at = coalesce(started_at, now())
where id = (
    select id from replay_jobs
    where state = 'waiting'
        or state = 'running' and worker is distinct from $1
            and (heartbeat_at is null or heartbeat_at < now() - make_interval(secs => $2))
    order by created_at for update skip locked limit 1
)
returning id::text, kind, per_second, canary, total, actor, why
"""
_RENEW_CLAIM = """
update replay_jobs set heartbeat_at = now() where id = $1 and worker = $2 and state = 'running'
returning cancel_requested
"""
_RELEASE = "update replay_jobs set worker = null, heartbeat_at = null where worker = $1 and state = 'running'"
_END = """
update replay_jobs set state = $3, message = $4, finished_at = now() where id = $1 and worker = $2 and state = 'running'
returning true
"""
# The job does not send these dead letters any more, and nothing else would open them again.
_REOPEN_UNCONFIRMED = """
with freed as (
    update dead_letters l set status = 'open', revision = l.revision + 1
    from replay_job_items p
    where p.job_id = $1 and p.outcome = 'sending' and l.id = p.dead_letter_id and l.status = 'replaying'
    returning l.id
)
update replay_job_items p set outcome = 'failed', same_cause = false, at = now(),
    detail = 'the job ended before the broker confirmed this dead letter'
from freed where p.job_id = $1 and p.dead_letter_id = freed.id and p.outcome = 'sending'
"""
_PROGRESS = """
select count(*) as dead_letters, count(*) filter (where outcome is not null and outcome <> 'sending') as started,
    count(*) filter (where outcome not in ('sending', 'sent')) as settled,
    count(*) filter (where outcome = 'failed') as failed,
    count(*) filter (where outcome in ('discarded', 'restored')) as closed,
    count(*) filter (where same_cause) as same_cause
from replay_job_items where job_id = $1
"""
_NEXT_ITEMS = """
select p.position, p.dead_letter_id::text, p.fingerprint, l.lane, 'mirror' = any(l.sinks) as of_mirror, l.body,
    l.restaurant_id::text, l.change_id::text, l.status, l.revision, l.fingerprint <> p.fingerprint as another_cause
from replay_job_items p join dead_letters l on l.id = p.dead_letter_id
where p.job_id = $1 and (p.outcome is null or p.outcome = 'sending')
order by p.position limit $2
"""
_MARK_SENDING = """
with mine as (
    update dead_letters l set status = 'replaying', revision = l.revision + 1
    from replay_job_items p
    where p.job_id = $1 and p.position = any($2::int[]) and l.id = p.dead_letter_id
        and (l.status = 'open' and p.outcome is null or l.status = 'replaying' and p.outcome = 'sending')
    returning p.position
)
update replay_job_items set outcome = 'sending', at = now()
where job_id = $1 and position in (select position from mine)
returning position
"""
_MARK_SENT = """
update replay_job_items set outcome = 'sent', at = now()
where job_id = $1 and position = any($2::int[]) and outcome = 'sending'
"""
_STORE_OUTCOME = """
update replay_job_items set outcome = $3, detail = $4, same_cause = $5, at = now()
where job_id = $1 and position = $2 and (outcome is null or outcome = 'sending' and $3 <> 'skipped')
"""
_WRITTEN = "select true from changes where restaurant_id = $1 and change_id = $2"

_ANY_UNDER_WAY = "select exists (select from replay_job_items where outcome in ('sending', 'sent'))"
_TRY_LOCK = "select pg_try_advisory_xact_lock(hashtext('ticketrail.replays.settle'))"

# A change that is in `changes` counts as written, even if it arrived there by another copy of the message.
_RESOLVE = """
with written as (
    update dead_letters l set status = 'resolved', closed_at = now(), revision = l.revision + 1
    where l.status = 'replaying' and l.lane is not null
        and exists (select from replay_job_items p where p.dead_letter_id = l.id and p.outcome = 'sent')
        and exists (
            select from changes c where c.restaurant_id = l.restaurant_id and c.change_id = l.change_id
        )
    returning l.id
)
select count(*) from written
"""
_OUTCOMES = """
update replay_job_items p
set outcome = case l.status when 'open' then 'failed' when 'resolved' then 'resolved' else 'skipped' end,
    same_cause = case l.status when 'open' then l.fingerprint = p.fingerprint end,
    detail = case l.status when 'open' then l.reason || ': ' || l.error
        when 'discarded' then 'discarded in the meantime' end,
    at = now()
from dead_letters l
where p.outcome in ('sending', 'sent') and l.id = p.dead_letter_id and l.status <> 'replaying'
"""
# A dead letter needs at most $1 seconds through its lane and all its retry queues. It is lost if it has no outcome
# although a heartbeat that was sent more than $1 seconds after it has come out of its lane.
_LOST = """
with gone as (
    update dead_letters l set status = 'open', revision = l.revision + 1
    from replay_job_items p, heartbeats f
    where p.outcome = 'sent' and l.id = p.dead_letter_id and l.status = 'replaying' and f.lane = l.lane
        and f.sent_at > p.at + make_interval(secs => $1)
        and not exists (
            select from retries r where r.restaurant_id = l.restaurant_id and r.change_id = l.change_id
        )
    returning l.id
)
update replay_job_items p set outcome = 'failed', same_cause = false, at = now(),
    detail = 'it did not come out of its lane, although later messages did'
from gone where p.dead_letter_id = gone.id and p.outcome = 'sent'
"""
_MARK_FAILED = """
update dead_letters set status = 'open', revision = revision + 1, deaths = deaths + 1, last_failed_at = now(),
    reason = $2, error = $3, place = $4, fingerprint = $5,
    attempts = (attempts::jsonb || jsonb_build_array(
        jsonb_build_object('at', now(), 'reason', $2::text, 'error', $3::text, 'place', $4::text)))::json
where id = $1 and status = 'replaying'
"""
_MARK_RESOLVED = """
update dead_letters set status = 'resolved', closed_at = now(), revision = revision + 1
where id = $1 and status = 'replaying'
"""


class Running(Struct, frozen=True, kw_only=True):
    """A replay job that this worker runs."""

    id: str
    kind: str
    per_second: float
    canary: bool
    total: int
    actor: str
    why: str | None


class Progress(Struct, frozen=True, kw_only=True):
    dead_letters: int
    """The number of dead letters in the job, without those that the retention has removed."""
    started: int
    """The number of items that are sent or settled."""
    settled: int
    failed: int
    closed: int
    """The number of items whose dead letter the job has discarded or restored."""
    same_cause: int
    """The number of items that failed again with the same fingerprint."""


class ToReplay(Struct, frozen=True, kw_only=True):
    position: int
    dead_letter_id: str
    fingerprint: str
    """The fingerprint of the dead letter when the job was made."""
    lane: str | None
    of_mirror: bool
    """The mirror writer could not take the message."""
    body: bytes
    restaurant_id: str | None
    change_id: str | None
    status: str
    revision: int
    another_cause: bool
    """The dead letter has failed again since the job was made, with another fingerprint."""


async def claim(connection: Connection, worker: str, *, silent_seconds: float) -> Running | None:
    """Claims the oldest job that waits, or whose worker has been silent for `silent_seconds`. Returns None if there is
    no such job."""
    row = await connection.fetchrow(_CLAIM, worker, silent_seconds)
    return None if row is None else Running(**row)


async def renew_claim(connection: Connection, job: str, worker: str) -> bool | None:
    """Renews the claim on a job. Returns whether an operator has cancelled the job; None if another worker has it
    now."""
    cancel_requested: bool | None = await connection.fetchval(_RENEW_CLAIM, job, worker)
    return cancel_requested


async def release(connection: Connection, worker: str) -> None:
    """Releases the jobs of this worker at shutdown, so that another one can take them at once."""
    await connection.execute(_RELEASE, worker)


async def end(connection: Connection, job: str, worker: str, state: str, message: str | None) -> None:
    """Ends a job. Dead letters whose publish was not confirmed become open again."""
    async with connection.transaction():
        if await connection.fetchval(_END, job, worker, state, message):
            await connection.execute(_REOPEN_UNCONFIRMED, job)


async def progress(connection: Connection, job: str) -> Progress:
    row = await connection.fetchrow(_PROGRESS, job)
    assert row is not None
    return Progress(**row)


async def next_items(connection: Connection, job: str, limit: int) -> list[ToReplay]:
    """Returns the next items that were not sent, in order."""
    return [ToReplay(**row) for row in await connection.fetch(_NEXT_ITEMS, job, limit)]


async def mark_sending(connection: Connection, job: str, positions: Sequence[int]) -> set[int]:
    """Marks items as sending and their dead letters as replaying. Returns the positions of those that were open."""
    return {row[0] for row in await connection.fetch(_MARK_SENDING, job, list(positions))}


async def mark_sent(connection: Connection, job: str, positions: Sequence[int]) -> None:
    """Marks items as sent, after the broker has confirmed them."""
    await connection.execute(_MARK_SENT, job, list(positions))


async def store_outcome(
    connection: Connection,
    job: str,
    position: int,
    outcome: str,
    detail: str | None = None,
    *,
    same_cause: bool | None = None,
) -> None:
    """Stores the outcome of an item that was not sent."""
    await connection.execute(_STORE_OUTCOME, job, position, outcome, detail, same_cause)


async def is_written(connection: Connection, restaurant: str | None, change: str | None) -> bool:
    """Returns whether PostgreSQL has the change."""
    return bool(restaurant and change and await connection.fetchval(_WRITTEN, restaurant, change))


async def settle(connection: Connection, *, lost_seconds: float) -> None:
    """Stores the outcomes of all dead letters that were sent, for all jobs. `lost_seconds`: the longest time that a
    change needs through an empty lane and all its retry queues."""
    if not await connection.fetchval(_ANY_UNDER_WAY):
        return
    async with connection.transaction():
        if not await connection.fetchval(_TRY_LOCK):
            return  # another worker settles now
        await connection.execute(_RESOLVE)
        await connection.execute(_OUTCOMES)
        await connection.execute(_LOST, lost_seconds)


async def mark_failed(
    connection: Connection, dead_letter: str, reason: str, error: str, place: str, fingerprint: str
) -> None:
    """Marks a dead letter as open, after it failed again without going through a queue."""
    await connection.execute(_MARK_FAILED, dead_letter, reason, error, place, fingerprint)


async def mark_resolved(connection: Connection, dead_letter: str) -> None:
    """Marks a dead letter as resolved, after it was handled without going through a queue."""
    await connection.execute(_MARK_RESOLVED, dead_letter)
