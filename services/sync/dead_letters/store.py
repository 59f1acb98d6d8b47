"""Reads dead letters: a list, groups, or one with all its columns.

A dead letter is open, replaying (it goes through its lane again), resolved (its change is written or was replaced by an
edit) or discarded. Every operator action and every death increments its `revision`. An action names the revision that
the operator saw. If another action came first, the action is refused with Conflict `dead_letter_changed`.

`actions.py` has the SQL of actions, `replay_jobs.py` and `replay_sql.py` that of replays, and
`failures/dead_letter_store.py` stores dead letters.

For operators a connection has the ops role. For the admins of a restaurant it has the api role, inside
`Postgres.tenant`, and row-level security shows only the dead letters of this restaurant.
"""

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
from msgspec import Struct

from services.sync.failures.dead_letter_store import Attempt
from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

STATUSES = ("open", "replaying", "resolved", "discarded")
_TREND_HOURS = 24
_LIKE = re.compile(r"[\\%_]")
_ESCAPED = r"\\\g<0>"
_MAX_TEXT_BYTES = 262_144
"""The maximum size of a body that a text search reads. Larger bodies would make the search slow."""


class DeadLetter(Struct, frozen=True, kw_only=True):
    id: str
    queue: str
    lane: str | None
    sinks: tuple[str, ...]
    """The sinks that could not take the message: `postgres`, `mirror`."""
    restaurant_id: str | None
    change_id: str | None
    entity: str | None
    entity_id: str | None
    version: int | None
    type: str | None
    source: str | None
    terminal_id: str | None
    trace_id: str | None
    reason: str
    error: str
    place: str
    fingerprint: str
    deaths: int
    first_failed_at: datetime
    last_failed_at: datetime
    status: str
    revision: int
    replaced_by: str | None
    """The change that an edit or a discard committed in place of the dead letter."""
    why: str | None
    kept_at: datetime
    closed_at: datetime | None
    body_bytes: int


class FullDeadLetter(DeadLetter, frozen=True, kw_only=True):
    attempts: tuple[Attempt, ...]
    headers: dict[str, Any]
    body: bytes
    """The body exactly as it was received."""


class DeadLetterEdit(Struct, frozen=True, kw_only=True):
    id: str
    at: datetime
    actor: str
    why: str | None
    event: dict[str, Any]
    difference: list[dict[str, Any]]
    change_id: str


class DeadLetterGroup(Struct, frozen=True, kw_only=True):
    """Dead letters with the same cause."""

    fingerprint: str
    reason: str
    place: str
    count: int
    open: int
    queues: tuple[str, ...]
    first_failed_at: datetime
    last_failed_at: datetime
    sample_id: str
    sample_error: str
    """The error of the newest dead letter."""
    trend: tuple[int, ...]
    """The number of last failures in each of the past 24 hours, oldest hour first."""


class DeadLetterQuery(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Selects dead letters. A field that is not set does not limit the selection. Ids must be UUIDs as text."""

    ids: tuple[str, ...] = ()
    queue: str | None = None
    fingerprint: str | None = None
    reason: str | None = None
    entity: str | None = None
    entity_id: str | None = None
    change_id: str | None = None
    restaurant_id: str | None = None
    failed_from: datetime | None = None
    failed_to: datetime | None = None
    """`failed_from` and `failed_to` limit the time of the last failure."""
    statuses: tuple[str, ...] = ()
    text: str | None = None
    """The text to search for. The search ignores case in the error, the place and the ids, but not in the body."""


Cursor = tuple[datetime, str]
"""(last_failed_at, id) of the last dead letter of the previous page."""

_COLUMNS = (
    "id::text, queue, lane, sinks, restaurant_id::text, change_id::text, entity, entity_id::text, version, type,"
    " source, terminal_id, trace_id, reason, error, place, fingerprint, deaths, first_failed_at, last_failed_at,"
    " status, revision, replaced_by::text, why, kept_at, closed_at, octet_length(body) as body_bytes"
)
_WHOLE = f"select {_COLUMNS}, attempts::text, headers::text, body from dead_letters where id = $1"  # noqa: S608
_SAMPLES = "select id, reason, place, error from dead_letters where id = any($1)"
_BETWEEN = """
select id::text, concat_ws(' ', status || ',', coalesce(entity, 'unreadable'), 'v' || version, left(error, 60))
from dead_letters where id between $1 and $2 order by id limit $3
"""
_EDITS = """
select id::text, at, actor, why, event::text, difference::text, change_id::text
from dead_letter_edits where dead_letter_id = $1 order by at, id
"""


async def count_open(connection: Connection) -> int:
    """Counts dead letters that are open or replaying."""
    found: int = await connection.fetchval("select count(*) from dead_letters where status in ('open', 'replaying')")
    return found


def conditions(query: DeadLetterQuery, arguments: list[Any]) -> str:
    """Returns the SQL condition on `dead_letters l` for the query, and appends its values to `arguments`."""
    found = ["true"]

    def where(condition: str, *values: Any) -> None:
        places = range(len(arguments) + 1, len(arguments) + 1 + len(values))
        arguments.extend(values)
        found.append(condition.format(*(f"${place}" for place in places)))

    for name in ("queue", "fingerprint", "reason", "entity", "entity_id", "change_id", "restaurant_id"):
        if (value := getattr(query, name)) is not None:
            where(f"l.{name} = {{0}}", value)
    if query.ids:
        where("l.id = any({0}::uuid[])", list(query.ids))
    if query.statuses:
        where("l.status = any({0}::text[])", list(query.statuses))
    if query.failed_from is not None:
        where("l.last_failed_at >= {0}", query.failed_from)
    if query.failed_to is not None:
        where("l.last_failed_at <= {0}", query.failed_to)
    if query.text:
        where(
            "(concat_ws(' ', l.error, l.reason, l.place, l.type, l.source, l.terminal_id, l.trace_id, l.change_id,"
            " l.entity_id) ilike {0}"
            f" or (octet_length(l.body) <= {_MAX_TEXT_BYTES} and position(convert_to({{1}}, 'UTF8') in l.body) > 0))",
            f"%{_LIKE.sub(_ESCAPED, query.text)}%",
            query.text,
        )
    return " and ".join(found)


async def page(
    connection: Connection, query: DeadLetterQuery, *, before: Cursor | None = None, limit: int = 50
) -> list[DeadLetter]:
    """Returns dead letters, newest failure first. To learn whether another page follows, ask for one row more than the
    page shows."""
    arguments: list[Any] = []
    where = conditions(query, arguments)
    if before is not None:
        arguments += before
        where += f" and (l.last_failed_at, l.id) < (${len(arguments) - 1}, ${len(arguments)}::uuid)"
    rows = await connection.fetch(
        f"select {_COLUMNS} from dead_letters l where {where}"  # noqa: S608
        f" order by l.last_failed_at desc, l.id desc limit {int(limit)}",
        *arguments,
    )
    return [DeadLetter(**{**row, "sinks": tuple(row["sinks"])}) for row in rows]


async def count(connection: Connection, query: DeadLetterQuery) -> int:
    arguments: list[Any] = []
    where = conditions(query, arguments)
    found: int = await connection.fetchval(f"select count(*) from dead_letters l where {where}", *arguments)  # noqa: S608
    return found


async def groups(connection: Connection, query: DeadLetterQuery, *, limit: int = 100) -> list[DeadLetterGroup]:
    """Returns the dead letters grouped by fingerprint, largest group first."""
    arguments: list[Any] = []
    where = conditions(query, arguments)
    rows = await connection.fetch(
        "select l.fingerprint, count(*) as count, count(*) filter (where l.status in ('open', 'replaying')) as open,"  # noqa: S608
        " array_agg(distinct l.queue) as queues, min(l.first_failed_at) as first_failed_at,"
        " max(l.last_failed_at) as last_failed_at,"
        " (array_agg(l.id order by l.last_failed_at desc, l.id desc))[1] as sample"
        f" from dead_letters l where {where} group by 1 order by 2 desc, 1 limit {int(limit)}",
        *arguments,
    )
    arguments.append([row["fingerprint"] for row in rows])
    hours = await connection.fetch(
        "select l.fingerprint, floor(extract(epoch from now() - l.last_failed_at) / 3600)::int, count(*)::int"  # noqa: S608
        f" from dead_letters l where {where} and l.fingerprint = any(${len(arguments)}::text[])"
        f" and l.last_failed_at > now() - interval '{_TREND_HOURS} hours' group by 1, 2",
        *arguments,
    )
    samples = await connection.fetch(_SAMPLES, [row["sample"] for row in rows])
    trends = {row["fingerprint"]: [0] * _TREND_HOURS for row in rows}
    for fingerprint, ago, n in hours:
        # A clock may be ahead of the database: a failure in the future counts for the current hour.
        trends[fingerprint][_TREND_HOURS - 1 - max(ago, 0)] += n
    sampled = {row["id"]: row for row in samples}
    return [
        DeadLetterGroup(
            fingerprint=row["fingerprint"],
            reason=sample["reason"],
            place=sample["place"],
            count=row["count"],
            open=row["open"],
            queues=tuple(row["queues"]),
            first_failed_at=row["first_failed_at"],
            last_failed_at=row["last_failed_at"],
            sample_id=str(row["sample"]),
            sample_error=sample["error"],
            trend=tuple(trends[row["fingerprint"]]),
        )
        for row in rows
        if (sample := sampled.get(row["sample"])) is not None
    ]


async def one(connection: Connection, id_: str) -> FullDeadLetter | None:
    row = await connection.fetchrow(_WHOLE, id_)
    return None if row is None else _whole(row)


async def ids_between(connection: Connection, first: UUID, last: UUID, limit: int) -> list[tuple[str, str]]:
    """Returns (id, short description) of the dead letters whose ids are from `first` to `last`, in order."""
    return [tuple(row) for row in await connection.fetch(_BETWEEN, first, last, limit)]


async def edits(connection: Connection, id_: str) -> list[DeadLetterEdit]:
    """Returns the edits of a dead letter, oldest first. The api role may not read edits."""
    return [
        DeadLetterEdit(**{**row, "event": _read(row["event"]), "difference": _read(row["difference"])})
        for row in await connection.fetch(_EDITS, id_)
    ]


def _whole(row: "asyncpg.Record") -> FullDeadLetter:
    attempts = msgspec.json.decode(row["attempts"], type=tuple[Attempt, ...])
    read = {"attempts": attempts, "headers": _read(row["headers"]), "sinks": tuple(row["sinks"])}
    return FullDeadLetter(**{**row, **read})


def _read(text: str) -> Any:
    return msgspec.json.decode(text)
