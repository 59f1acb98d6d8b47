"""Replays and dry runs of dead letters as rows, so that they survive the worker that runs them.

API and CLI only make and cancel jobs (`plan`, `make`, `cancel`) and read them; replays.py runs them, with
the statements in `replay_steps.py`.

    waiting -> running -> done | cancelled | stopped (by itself: what it replayed died of the same again)

Which letters a job is about is settled when it is made: those that are open then and match.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from services.sync import audit
from services.sync.dead_letters.store import DeadLetterQuery, conditions
from shared.entities.contract import Lane
from shared.errors import Conflict, NotFound
from shared.messaging.topology import lane_queue
from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

MIRROR = "mirror"
"""Where letters of the mirror writer are replayed to: straight into the mirror."""

_PLAN = (
    "select l.lane, l.fingerprint, count(*)::int8, array_agg(l.id::text) filter (where l.id = any({ids}::uuid[]))"
    " from dead_letters l where {where} and l.status = 'open' group by 1, 2"
)
_ANY = "select exists(select from dead_letters where id = any($1::uuid[]))"
_MAKE = """
insert into replay_jobs (kind, wanted, actor, why, per_second, canary) values ($1, $2::json, $3, $4, $5, $6)
returning id::text
"""
# The oldest first: they have waited longest, and their successors are built on them.
_CHOOSE = """
insert into replay_job_items (job_id, position, letter_id, fingerprint)
select {job}::uuid, row_number() over (order by l.first_failed_at, l.id), l.id, l.fingerprint
from dead_letters l where {where} and l.status = 'open'
"""
_TOTAL = "update replay_jobs set total = $2 where id = $1"
_EMPTY = "update replay_jobs set state = 'done', message = 'no open letter matches', finished_at = now() where id = $1"
_COLUMNS = (
    "j.id::text, j.kind, j.state, j.wanted::text, j.actor, j.why, j.per_second, j.canary, j.total, j.cancel_asked,"
    " j.message, j.created_at, j.started_at, j.beat_at, j.finished_at"
)
_OUTCOMES = """
select job_id::text, coalesce(outcome, 'waiting') as outcome, count(*)::int8 as n
from replay_job_items where job_id = any($1::uuid[]) group by 1, 2
"""
_LOCK = "select state from replay_jobs where id = $1 for update"
_CANCEL_WAITING = """
update replay_jobs
set cancel_asked = true, state = 'cancelled', message = 'cancelled before it began', finished_at = now()
where id = $1
"""
_CANCEL = "update replay_jobs set cancel_asked = true where id = $1"
_LETTERS = """
select position, letter_id::text, outcome, again, detail, at
from replay_job_items
where job_id = $1 and position > $2
    and (cardinality($3::text[]) = 0 or coalesce(outcome, 'waiting') = any($3::text[]))
order by position limit $4
"""
_OF_LETTER = f"""
select {_COLUMNS}, p.position, p.letter_id::text, p.outcome, p.again, p.detail, p.at
from replay_job_items p join replay_jobs j on j.id = p.job_id
where p.letter_id = $1 order by j.created_at desc, j.id desc limit $2
"""  # noqa: S608


class ReplayPlan(Struct, frozen=True, kw_only=True):
    """What a job would be about, now."""

    total: int
    queues: dict[str, int]
    """Where a replay would go -> how many: the queue of the lane, or MIRROR."""
    fingerprints: dict[str, int]
    absent: tuple[str, ...] = ()
    """Those that were named and are not there, not open, or not among what the filter finds."""


class ReplayJob(Struct, frozen=True, kw_only=True):
    id: str
    kind: str
    """replay or dry_run"""
    state: str
    wanted: dict[str, Any]
    actor: str
    why: str | None
    per_second: float
    canary: bool
    total: int
    outcomes: dict[str, int]
    """How many of its letters have come to what; those of which there are none are left out. `waiting`, `sending`,
    `sent`, `resolved`, `failed`, `skipped`; of a dry run `waiting`, `would_write`, `superseded`, `would_fail`."""
    cancel_asked: bool
    message: str | None
    """Why it ended, for people."""
    created_at: datetime
    started_at: datetime | None
    beat_at: datetime | None
    finished_at: datetime | None

    @property
    def ended(self) -> bool:
        return self.state in ("done", "cancelled", "stopped")


class ReplayItem(Struct, frozen=True, kw_only=True):
    position: int
    letter_id: str
    outcome: str | None
    again: bool | None
    """It failed of the same as before."""
    detail: str | None
    at: datetime | None


async def plan(connection: Connection, wanted: DeadLetterQuery) -> ReplayPlan:
    """Of the open letters that match. Where letters are named and none of them is one: raises NotFound, or Conflict
    (`letter_not_open`) when there is at least one of them."""
    arguments: list[Any] = [list(wanted.ids)]
    rows = await connection.fetch(_PLAN.format(ids="$1", where=conditions(wanted, arguments)), *arguments)
    queues: dict[str, int] = {}
    fingerprints: dict[str, int] = {}
    named: set[str] = set()
    for lane, fingerprint, n, ids in rows:
        queue = MIRROR if lane is None else lane_queue(Lane(lane))
        queues[queue] = queues.get(queue, 0) + n
        fingerprints[fingerprint] = fingerprints.get(fingerprint, 0) + n
        named.update(ids or ())
    if wanted.ids and not named:
        if not await connection.fetchval(_ANY, list(wanted.ids)):
            raise NotFound("no such dead letter")
        raise Conflict("none of these letters is open and matches", code="letter_not_open")
    absent = tuple(id_ for id_ in dict.fromkeys(wanted.ids) if id_ not in named)
    return ReplayPlan(total=sum(queues.values()), queues=queues, fingerprints=fingerprints, absent=absent)


async def make(
    connection: Connection,
    wanted: DeadLetterQuery,
    *,
    kind: str,
    actor: str,
    role: str,
    why: str | None = None,
    per_second: float = 50.0,
    canary: bool = True,
) -> ReplayJob:
    """A job for the worker, with its audit, in a transaction of its own. With no letter that matches it is done at
    once. `kind`: replay or dry_run."""
    encoded = msgspec.json.encode(wanted).decode()
    async with connection.transaction():
        id_: str = await connection.fetchval(_MAKE, kind, encoded, actor, why, per_second, canary)
        arguments: list[Any] = [id_]
        where = conditions(wanted, arguments)
        status = await connection.execute(_CHOOSE.format(job="$1", where=where), *arguments)
        total = int(status.rpartition(" ")[2])
        await connection.execute(_TOTAL, id_, total)
        if total == 0:
            await connection.execute(_EMPTY, id_)
        await audit.record(
            connection,
            actor=actor,
            role=role,
            action=f"dead_letters.{kind}",
            target=f"job/{id_}",
            restaurant_id=wanted.restaurant_id,
            why=why,
            details={"wanted": wanted, "letters": total, "per_second": per_second, "canary": canary},
        )
    return await _known(connection, id_)


async def cancel(connection: Connection, id_: str, *, actor: str, role: str, why: str | None = None) -> ReplayJob:
    """Nothing more of it is sent; what was sent takes its course. With its audit, in a transaction of its own. Raises
    NotFound, Conflict (`job_ended`)."""
    async with connection.transaction():
        state = await connection.fetchval(_LOCK, id_)
        if state is None:
            raise NotFound("no such job")
        if state not in ("waiting", "running"):
            raise Conflict(f"this job is {state}", code="job_ended", state=state)
        await connection.execute(_CANCEL_WAITING if state == "waiting" else _CANCEL, id_)
        await audit.record(
            connection, actor=actor, role=role, action="dead_letters.cancel", target=f"job/{id_}", why=why
        )
    return await _known(connection, id_)


async def one(connection: Connection, id_: str) -> ReplayJob | None:
    query = f"select {_COLUMNS} from replay_jobs j where j.id = $1"  # noqa: S608
    found = await _jobs(connection, await connection.fetch(query, id_))
    return found[0] if found else None


async def recent(
    connection: Connection, *, limit: int = 50, before: tuple[datetime, str] | None = None
) -> list[ReplayJob]:
    """The newest first; `before`: (created_at, id) of the last one of the page before."""
    where = "(j.created_at, j.id) < ($2, $3::uuid)" if before else "true"
    rows = await connection.fetch(
        f"select {_COLUMNS} from replay_jobs j where {where} order by j.created_at desc, j.id desc limit $1",  # noqa: S608
        limit,
        *(before or ()),
    )
    return await _jobs(connection, rows)


async def letters(
    connection: Connection, id_: str, *, outcomes: Sequence[str] = (), after: int = 0, limit: int = 200
) -> list[ReplayItem]:
    """Of a job, in order, from the position behind `after` on."""
    rows = await connection.fetch(_LETTERS, id_, after, list(outcomes), limit)
    return [ReplayItem(**row) for row in rows]


async def of_letter(connection: Connection, letter_id: str, *, limit: int = 20) -> list[tuple[ReplayJob, ReplayItem]]:
    """The jobs that a letter was part of, the newest first."""
    rows = await connection.fetch(_OF_LETTER, letter_id, limit)
    parts = [ReplayItem(**{name: row[name] for name in ReplayItem.__struct_fields__}) for row in rows]
    return list(zip(await _jobs(connection, rows), parts, strict=True))


async def _known(connection: Connection, id_: str) -> ReplayJob:
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
            **{**{name: row[name] for name in fields}, "wanted": msgspec.json.decode(row["wanted"])},
            outcomes=outcomes[row["id"]],
        )
        for row in rows
    ]
