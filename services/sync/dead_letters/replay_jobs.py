"""Makes, reads and cancels jobs: replays, dry runs, discards and restores of many dead letters. Each job is a row, so
that it survives the worker that runs it.

The API and the command line use this module. `replay_worker.py` runs the jobs, with the statements in `replay_sql.py`.

    waiting -> running -> done | cancelled | stopped (by itself: a dead letter failed again with the same cause)

A job takes the dead letters that are open and match the query at the moment when the job is made. The undo of a discard
is a job that restores the dead letters that the discard has closed.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
from msgspec import Struct

from services.sync import audit
from services.sync.dead_letters.store import DeadLetterQuery, conditions
from shared.entities.contract import Lane
from shared.errors import Conflict, InvalidInput, NotFound
from shared.messaging.topology import lane_queue
from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

MIRROR = "mirror"
"""The target of dead letters of the mirror writer. A replay applies them to the mirror without a queue."""

_PLAN = (
    "select l.lane, l.fingerprint, count(*)::int8, array_agg(l.id::text) filter (where l.id = any({ids}::uuid[]))"
    " from dead_letters l where {where} and l.status = 'open' group by 1, 2"
)
_ANY = "select exists(select from dead_letters where id = any($1::uuid[]))"
_MAKE = """
insert into replay_jobs (kind, selection, actor, why, per_second, canary) values ($1, $2::json, $3, $4, $5, $6)
returning id::text
"""
# The oldest dead letter comes first, because later changes are built on it.
_CHOOSE = """
insert into replay_job_items (job_id, position, dead_letter_id, fingerprint)
select {job}::uuid, row_number() over (order by l.first_failed_at, l.id), l.id, l.fingerprint
from dead_letters l where {where} and l.status = 'open'
"""
_TOTAL = "update replay_jobs set total = $2 where id = $1"
_EMPTY = "update replay_jobs set state = 'done', message = $2, finished_at = now() where id = $1"
_UNDO = """
insert into replay_jobs (kind, selection, actor, why, per_second, canary, undo_of)
values ('restore', '{}', $1, $2, $3, false, $4) returning id::text
"""
_CHOOSE_DISCARDED = """
insert into replay_job_items (job_id, position, dead_letter_id, fingerprint)
select $1::uuid, row_number() over (order by p.position), l.id, l.fingerprint
from replay_job_items p join dead_letters l on l.id = p.dead_letter_id
where p.job_id = $2 and p.outcome = 'discarded' and l.status = 'discarded'
"""
_COLUMNS = (
    "j.id::text, j.kind, j.state, j.selection::text, j.actor, j.why, j.per_second, j.canary, j.total,"
    " j.cancel_requested, j.undo_of::text, j.message, j.created_at, j.started_at, j.heartbeat_at, j.finished_at"
)
_OUTCOMES = """
select job_id::text, coalesce(outcome, 'waiting') as outcome, count(*)::int8 as n
from replay_job_items where job_id = any($1::uuid[]) group by 1, 2
"""
_BETWEEN = """
select id::text, concat_ws(' ', kind || ',', state || ',', total, 'dead letters by', actor)
from replay_jobs where id between $1 and $2 order by id limit $3
"""
_LOCK = "select kind, state, per_second from replay_jobs where id = $1 for update"
_CANCEL_WAITING = """
update replay_jobs
set cancel_requested = true, state = 'cancelled', message = 'cancelled before it started', finished_at = now()
where id = $1
"""
_CANCEL = "update replay_jobs set cancel_requested = true where id = $1"
_ITEMS = """
select position, dead_letter_id::text, outcome, same_cause, detail, at
from replay_job_items
where job_id = $1 and position > $2
    and (cardinality($3::text[]) = 0 or coalesce(outcome, 'waiting') = any($3::text[]))
order by position limit $4
"""
_OF_DEAD_LETTER = f"""
select {_COLUMNS}, p.position, p.dead_letter_id::text, p.outcome, p.same_cause, p.detail, p.at
from replay_job_items p join replay_jobs j on j.id = p.job_id
where p.dead_letter_id = $1 order by j.created_at desc, j.id desc limit $2
"""  # noqa: S608


class ReplayPlan(Struct, frozen=True, kw_only=True):
    """The dead letters that a job would take if it were made now."""

    total: int
    queues: dict[str, int]
    """Target (the queue of a lane, or MIRROR) -> number of dead letters."""
    fingerprints: dict[str, int]
    absent: tuple[str, ...] = ()
    """Requested ids of dead letters that do not exist, are not open or do not match the filter."""


class ReplayJob(Struct, frozen=True, kw_only=True):
    id: str
    kind: str
    """`replay`, `dry_run`, `discard` or `restore`."""
    state: str
    selection: dict[str, Any]
    actor: str
    why: str | None
    per_second: float
    canary: bool
    total: int
    outcomes: dict[str, int]
    """Outcome -> number of items, without zeros. A replay has `waiting`, `sending`, `sent`, `resolved`, `failed` and
    `skipped`; a dry run has `waiting`, `would_write`, `superseded` and `would_fail`; a discard has `waiting`,
    `discarded`, `failed` and `skipped`, and a restore `waiting`, `restored` and `skipped`."""
    cancel_requested: bool
    undo_of: str | None
    """The discard whose dead letters this job restores."""
    message: str | None
    """The reason why the job ended, as a sentence for people; None before the end."""
    created_at: datetime
    started_at: datetime | None
    heartbeat_at: datetime | None
    finished_at: datetime | None

    @property
    def ended(self) -> bool:
        return self.state in ("done", "cancelled", "stopped")


class ReplayItem(Struct, frozen=True, kw_only=True):
    position: int
    dead_letter_id: str
    outcome: str | None
    same_cause: bool | None
    """True if the dead letter failed again with the same fingerprint; None if it did not fail."""
    detail: str | None
    at: datetime | None


async def plan(connection: Connection, query: DeadLetterQuery) -> ReplayPlan:
    """Counts the open dead letters that match. If the query has ids and none of them is open, raises NotFound if none
    exists, and Conflict (`dead_letter_not_open`) otherwise."""
    arguments: list[Any] = [list(query.ids)]
    rows = await connection.fetch(_PLAN.format(ids="$1", where=conditions(query, arguments)), *arguments)
    queues: dict[str, int] = {}
    fingerprints: dict[str, int] = {}
    named: set[str] = set()
    for lane, fingerprint, n, ids in rows:
        queue = MIRROR if lane is None else lane_queue(Lane(lane))
        queues[queue] = queues.get(queue, 0) + n
        fingerprints[fingerprint] = fingerprints.get(fingerprint, 0) + n
        named.update(ids or ())
    if query.ids and not named:
        if not await connection.fetchval(_ANY, list(query.ids)):
            raise NotFound("no such dead letter")
        raise Conflict("none of these dead letters is open and matches the filter", code="dead_letter_not_open")
    absent = tuple(id_ for id_ in dict.fromkeys(query.ids) if id_ not in named)
    return ReplayPlan(total=sum(queues.values()), queues=queues, fingerprints=fingerprints, absent=absent)


async def make(
    connection: Connection,
    query: DeadLetterQuery,
    *,
    kind: str,
    actor: str,
    role: str,
    why: str | None = None,
    per_second: float = 50.0,
    canary: bool = True,
) -> ReplayJob:
    """Makes a job for the worker and its audit row, in one transaction. A job without dead letters is done at once.

    `kind`: replay, dry_run or discard; a discard needs `why`. `per_second`: the maximum number of dead letters per
    second."""
    if kind == "discard" and not (why or "").strip():
        raise InvalidInput("must not be empty", field="why")
    encoded = msgspec.json.encode(query).decode()
    async with connection.transaction():
        id_: str = await connection.fetchval(_MAKE, kind, encoded, actor, why, per_second, canary)
        arguments: list[Any] = [id_]
        where = conditions(query, arguments)
        status = await connection.execute(_CHOOSE.format(job="$1", where=where), *arguments)
        total = int(status.rpartition(" ")[2])
        await _set_total(connection, id_, total, "no open dead letter matches")
        await audit.record(
            connection,
            actor=actor,
            role=role,
            action=f"dead_letters.{kind}",
            target=f"job/{id_}",
            restaurant_id=query.restaurant_id,
            why=why,
            details={"selection": query, "dead_letters": total, "per_second": per_second, "canary": canary},
        )
    return await _existing(connection, id_)


async def undo(connection: Connection, id_: str, *, actor: str, role: str, why: str | None = None) -> ReplayJob:
    """Makes a job that restores the dead letters that a discard has closed and that are still discarded, with an audit
    row in the same transaction. Changes that reverted something stay.

    Raises NotFound, and Conflict: `job_not_discard`, or `job_running` if the discard has not ended."""
    async with connection.transaction():
        discard = await connection.fetchrow(_LOCK, id_)
        if discard is None:
            raise NotFound("no such job")
        if discard["kind"] != "discard":
            raise Conflict(f"only a discard can be undone; this job is a {discard['kind']}", code="job_not_discard")
        if discard["state"] in ("waiting", "running"):
            raise Conflict("this discard has not ended; cancel it first", code="job_running", state=discard["state"])
        new: str = await connection.fetchval(_UNDO, actor, why, discard["per_second"], id_)
        total = int((await connection.execute(_CHOOSE_DISCARDED, new, id_)).rpartition(" ")[2])
        await _set_total(connection, new, total, "none of its dead letters is discarded any more")
        await audit.record(
            connection,
            actor=actor,
            role=role,
            action="dead_letters.restore",
            target=f"job/{new}",
            why=why,
            details={"undo_of": id_, "dead_letters": total},
        )
    return await _existing(connection, new)


async def _set_total(connection: Connection, id_: str, total: int, if_none: str) -> None:
    await connection.execute(_TOTAL, id_, total)
    if total == 0:
        await connection.execute(_EMPTY, id_, if_none)


async def cancel(connection: Connection, id_: str, *, actor: str, role: str, why: str | None = None) -> ReplayJob:
    """Cancels a job, with an audit row in the same transaction. The job takes no further dead letter; those that are
    already sent continue, and those that are already discarded stay so.

    Raises NotFound, and Conflict (`job_ended`) if the job has ended."""
    async with connection.transaction():
        found = await connection.fetchrow(_LOCK, id_)
        if found is None:
            raise NotFound("no such job")
        state = found["state"]
        if state not in ("waiting", "running"):
            raise Conflict(f"this job is {state}", code="job_ended", state=state)
        await connection.execute(_CANCEL_WAITING if state == "waiting" else _CANCEL, id_)
        await audit.record(
            connection, actor=actor, role=role, action="dead_letters.cancel", target=f"job/{id_}", why=why
        )
    return await _existing(connection, id_)


async def one(connection: Connection, id_: str) -> ReplayJob | None:
    query = f"select {_COLUMNS} from replay_jobs j where j.id = $1"  # noqa: S608
    found = await _jobs(connection, await connection.fetch(query, id_))
    return found[0] if found else None


async def recent(
    connection: Connection, *, limit: int = 50, before: tuple[datetime, str] | None = None
) -> list[ReplayJob]:
    """Returns jobs, newest first. `before`: (created_at, id) of the last job of the previous page."""
    where = "(j.created_at, j.id) < ($2, $3::uuid)" if before else "true"
    rows = await connection.fetch(
        f"select {_COLUMNS} from replay_jobs j where {where} order by j.created_at desc, j.id desc limit $1",  # noqa: S608
        limit,
        *(before or ()),
    )
    return await _jobs(connection, rows)


async def items(
    connection: Connection, id_: str, *, outcomes: Sequence[str] = (), after: int = 0, limit: int = 200
) -> list[ReplayItem]:
    """Returns the items of a job in order, from the position after `after`."""
    rows = await connection.fetch(_ITEMS, id_, after, list(outcomes), limit)
    return [ReplayItem(**row) for row in rows]


async def of_dead_letter(
    connection: Connection, dead_letter_id: str, *, limit: int = 20
) -> list[tuple[ReplayJob, ReplayItem]]:
    """Returns the jobs that a dead letter was part of, newest first, each with the item of the dead letter."""
    rows = await connection.fetch(_OF_DEAD_LETTER, dead_letter_id, limit)
    parts = [ReplayItem(**{name: row[name] for name in ReplayItem.__struct_fields__}) for row in rows]
    return list(zip(await _jobs(connection, rows), parts, strict=True))


async def ids_between(connection: Connection, first: UUID, last: UUID, limit: int) -> list[tuple[str, str]]:
    """Returns (id, short description) of the jobs whose ids are from `first` to `last`, in order."""
    return [tuple(row) for row in await connection.fetch(_BETWEEN, first, last, limit)]


async def _existing(connection: Connection, id_: str) -> ReplayJob:
    job = await one(connection, id_)
    assert job is not None
    return job


async def _jobs(connection: Connection, rows: "Iterable[asyncpg.Record]") -> list[ReplayJob]:
    rows = list(rows)
    outcomes: dict[str, dict[str, int]] = {row["id"]: {} for row in rows}
    for job, outcome, n in await connection.fetch(_OUTCOMES, list(outcomes)):
        outcomes[job][outcome] = n
    fields = [name for name in ReplayJob.__struct_fields__ if name != "outcomes"]
    return [
        ReplayJob(
            **{**{name: row[name] for name in fields}, "selection": msgspec.json.decode(row["selection"])},
            outcomes=outcomes[row["id"]],
        )
        for row in rows
    ]
