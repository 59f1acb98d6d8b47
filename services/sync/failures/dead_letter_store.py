"""Stores dead letters in the table `dead_letters`.

Guarantee: `keep` stores all dead letters of a call or none, and storing a dead letter twice changes nothing.
`dead_letters/store.py` reads them.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from operator import attrgetter
from typing import Any

import msgspec
from msgspec import Struct

from services.sync.failures import retry_store
from shared.entities.contract import Time
from shared.postgres.blocks import in_blocks
from shared.postgres.pool import Connection

_MAX_ATTEMPTS = 100
_KEEP_TIMEOUT_SECONDS = 30.0  # bodies can have many megabytes


class Attempt(Struct, frozen=True):
    """One failed attempt to write a change, in the format of the header `ticketrail-attempts`."""

    at: Time
    reason: str
    error: str
    place: str


class NewDeadLetter(Struct, frozen=True, kw_only=True):
    """One dead letter, parsed from a dead message (services/sync/failures/parsing.py)."""

    digest: bytes
    """SHA-256 of the body. It identifies the dead letter through all of its deaths, in both sinks."""
    queue: str
    lane: str | None
    """The lane of the dead-letter queue; None for the queue of the mirror writer. After a rewind the mirror writer
    reads a change again, so a second arrival in its queue does not count as a death."""
    sinks: tuple[str, ...]
    """The sink that could not take the message: `postgres` or `mirror`. If both could not, the table has one dead
    letter with both."""
    restaurant_id: str | None
    change_id: str | None
    entity: str | None
    entity_id: str | None
    version: int | None
    type: str | None
    source: str | None
    terminal_id: str | None
    trace_id: str | None
    mixed: bool = False
    """True if the dead letter names two restaurants. Neither restaurant may see it, because it has content of both."""
    reason: str
    error: str
    place: str
    fingerprint: str
    attempts: tuple[Attempt, ...]
    """The failed attempts, at least one, oldest first."""
    headers: dict[str, Any]
    body: bytes
    replay_of: str | None = None
    """The id of the dead letter whose replay failed and produced this one."""


_NEW: Sequence[tuple[str, str, Callable[[NewDeadLetter], Any]]] = (
    *((name, "text", attrgetter(name)) for name in ("queue", "lane", "entity", "type", "source", "terminal_id")),
    *((name, "text", attrgetter(name)) for name in ("trace_id", "reason", "error", "place", "fingerprint")),
    *((name, "uuid", attrgetter(name)) for name in ("restaurant_id", "change_id", "entity_id")),
    *((name, "bytea", attrgetter(name)) for name in ("digest", "body")),
    ("version", "int4", attrgetter("version")),
    ("mixed", "bool", attrgetter("mixed")),
    ("sinks", "text", lambda dead_letter: dead_letter.sinks[0]),
    ("attempts", "json", lambda dead_letter: _json(dead_letter.attempts)),
    ("headers", "json", lambda dead_letter: _json(dead_letter.headers)),
    ("first_failed_at", "timestamptz", lambda dead_letter: dead_letter.attempts[0].at),
    ("last_failed_at", "timestamptz", lambda dead_letter: dead_letter.attempts[-1].at),
)
_NAMES = ", ".join(name for name, _, _ in _NEW)
_VALUES = ", ".join("array[sinks]" if name == "sinks" else name for name, _, _ in _NEW)
_KEEP = (
    f"insert into dead_letters ({_NAMES}) select {_VALUES} from unnest("  # noqa: S608
    + ", ".join(f"${number}::{type_}[]" for number, (_, type_, _) in enumerate(_NEW, 1))
    + f") as new ({_NAMES}) on conflict (digest) do nothing returning digest"
)
_KNOWN = """
select id::text, attempts::text, last_failed_at, status, lane, sinks from dead_letters where digest = $1 for update
"""
_OTHER_SINK = """
update dead_letters set sinks = array(select distinct unnest(sinks || $2::text[]) order by 1 desc), attempts = $3::json
where id = $1
"""
_DIED_AGAIN = """
update dead_letters
set attempts = $2::json, deaths = deaths + $10, revision = revision + 1, last_failed_at = $3, reason = $4, error = $5,
    place = $6, fingerprint = $7, headers = $8::json, status = $9, closed_at = null, queue = $11, lane = $12
where id = $1
"""
# A dead letter of the mirror writer alone has no lane.
_OPEN = """
select change_id::text, body from dead_letters
where status in ('open', 'replaying') and lane is not null and not mixed and change_id is not null
order by version
"""


async def open_bodies(connection: Connection) -> AsyncGenerator[list[tuple[str, bytes]], None]:
    """Yields (change id, body) of the open dead letters that PostgreSQL has refused, in blocks of bounded size. A body
    may have other changes too, and the change in it may be unreadable."""
    async with aclosing(in_blocks(connection, _OPEN, column="body")) as blocks:
        async for rows in blocks:
            yield [(row["change_id"], row["body"]) for row in rows]


async def keep(connection: Connection, dead_letters: Sequence[NewDeadLetter]) -> list[NewDeadLetter]:
    """Stores all dead letters or none, in a transaction of its own. Returns those whose death was not stored yet.

    If a dead letter is stored already, it has died again: `keep` appends its attempts, opens it again, and increments
    its deaths and its revision. A message that was delivered twice changes nothing, because its failure is stored
    already. If the other sink stored it, the dead letter gets both sinks. This does not count as a further death,
    because both read the same message. Its queue, lane and failure are then those of PostgreSQL, because a replay goes
    through the lane. The same transaction deletes the changes from `retries`."""
    first: dict[bytes, NewDeadLetter] = {}
    for dead_letter in dead_letters:
        first.setdefault(dead_letter.digest, dead_letter)
    fresh = [first[digest] for digest in sorted(first)]  # all collectors use this order, so that they cannot deadlock
    async with connection.transaction():
        arrays = ([value(dead_letter) for dead_letter in fresh] for _, _, value in _NEW)
        rows = await connection.fetch(_KEEP, *arrays, timeout=_KEEP_TIMEOUT_SECONDS)
        new = {row[0] for row in rows}
        known = [
            dead_letter
            for dead_letter in dead_letters
            if dead_letter.digest not in new or dead_letter is not first[dead_letter.digest]
        ]
        new_deaths = [dead_letter for dead_letter in fresh if dead_letter.digest in new]
        new_deaths += [
            dead_letter
            for dead_letter in sorted(known, key=attrgetter("digest"))
            if await _died_again(connection, dead_letter)
        ]
        retried = [
            (dead_letter.restaurant_id, dead_letter.change_id)
            for dead_letter in dead_letters
            if len(dead_letter.attempts) > 1 and dead_letter.restaurant_id and dead_letter.change_id
        ]
        if retried:
            await retry_store.forget(connection, retried)
    return new_deaths


async def _died_again(connection: Connection, dead_letter: NewDeadLetter) -> bool:
    known = await connection.fetchrow(_KNOWN, dead_letter.digest)
    if known is None:
        return False
    before = msgspec.json.decode(known["attempts"], type=list[Attempt])
    attempts = sorted(
        [*before, *(attempt for attempt in dead_letter.attempts if attempt not in before)], key=attrgetter("at")
    )
    if other_sink := not set(dead_letter.sinks) <= set(known["sinks"]):
        bounded_attempts = _json(bounded(attempts, _MAX_ATTEMPTS))
        await connection.execute(_OTHER_SINK, known["id"], list(dead_letter.sinks), bounded_attempts)
    if dead_letter.lane is None:
        return False
    if dead_letter.attempts[-1].at in {attempt.at for attempt in before} and not other_sink:
        return False
    # If another copy of the change died, the replay still runs.
    still_replaying = known["status"] == "replaying" and dead_letter.replay_of != known["id"]
    await connection.execute(
        _DIED_AGAIN,
        known["id"],
        _json(bounded(attempts, _MAX_ATTEMPTS)),
        max(known["last_failed_at"], dead_letter.attempts[-1].at),
        dead_letter.reason,
        dead_letter.error,
        dead_letter.place,
        dead_letter.fingerprint,
        _json(dead_letter.headers),
        "replaying" if still_replaying else "open",
        0 if other_sink else 1,
        dead_letter.queue,
        dead_letter.lane,
    )
    return not other_sink


def bounded(attempts: list[Attempt], max_attempts: int) -> list[Attempt]:
    """Returns at most `max_attempts` attempts: the first one and the latest ones."""
    return attempts if len(attempts) <= max_attempts else [attempts[0], *attempts[1 - max_attempts :]]


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
