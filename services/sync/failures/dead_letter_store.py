"""Stores changes that no retry can write in the table `dead_letters`.

Guarantee: `keep` stores all dead letters of a call or none, and storing a dead letter twice changes nothing.
`dead_letters/store.py` reads them.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import msgspec
from msgspec import Struct

from services.sync.failures import retry_store
from shared.entities.contract import Time
from shared.postgres.pool import Connection

_MAX_ATTEMPTS = 100
_KEEP_TIMEOUT_SECONDS = 30.0  # bodies can have many megabytes


class Attempt(Struct, frozen=True):
    """One failed attempt to write a change, as in the header `ticketrail-attempts`."""

    at: Time
    reason: str
    error: str
    place: str


class NewDeadLetter(Struct, frozen=True, kw_only=True):
    """One dead letter as parsed from a dead message (services/sync/failures/parsing.py)."""

    digest: bytes
    """SHA-256 of dead-letter queue and body. It identifies the dead letter through all of its deaths."""
    queue: str
    lane: str | None
    """None for a dead letter of the mirror writer. A rewind reads its change again, which does not count as a death."""
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
    """The dead letter names two restaurants, of which neither may see the other's part."""
    reason: str
    error: str
    place: str
    fingerprint: str
    attempts: tuple[Attempt, ...]
    """At least one attempt, oldest first."""
    headers: dict[str, Any]
    body: bytes
    replay_of: str | None = None
    """Id of the dead letter whose replay failed and produced this one."""


_NEW: Sequence[tuple[str, str, Callable[[NewDeadLetter], Any]]] = (
    *((name, "text", attrgetter(name)) for name in ("queue", "lane", "entity", "type", "source", "terminal_id")),
    *((name, "text", attrgetter(name)) for name in ("trace_id", "reason", "error", "place", "fingerprint")),
    *((name, "uuid", attrgetter(name)) for name in ("restaurant_id", "change_id", "entity_id")),
    *((name, "bytea", attrgetter(name)) for name in ("digest", "body")),
    ("version", "int4", attrgetter("version")),
    ("mixed", "bool", attrgetter("mixed")),
    ("attempts", "json", lambda one: _json(one.attempts)),
    ("headers", "json", lambda one: _json(one.headers)),
    ("first_failed_at", "timestamptz", lambda one: one.attempts[0].at),
    ("last_failed_at", "timestamptz", lambda one: one.attempts[-1].at),
)
_NAMES = ", ".join(name for name, _, _ in _NEW)
_KEEP = (
    f"insert into dead_letters ({_NAMES}) select * from unnest("  # noqa: S608
    + ", ".join(f"${number}::{type_}[]" for number, (_, type_, _) in enumerate(_NEW, 1))
    + f") as new ({_NAMES}) on conflict (digest) do nothing returning digest"
)
_KNOWN = "select id::text, attempts::text, last_failed_at, status from dead_letters where digest = $1 for update"
_DIED_AGAIN = """
update dead_letters
set attempts = $2::json, deaths = deaths + 1, revision = revision + 1, last_failed_at = $3, reason = $4, error = $5,
    place = $6, fingerprint = $7, headers = $8::json, status = $9, closed_at = null
where id = $1
"""


async def keep(connection: Connection, dead_letters: Sequence[NewDeadLetter]) -> list[NewDeadLetter]:
    """Stores all dead letters or none, in a transaction of its own. Returns those whose death was not stored yet.

    A dead letter that is stored already has died again: its attempts are appended, it has one death more and is open
    again, and its revision increases. A message that was delivered twice changes nothing, because its failure is stored
    already. The same transaction deletes the changes from `retries`."""
    first: dict[bytes, NewDeadLetter] = {}
    for dead_letter in dead_letters:
        first.setdefault(dead_letter.digest, dead_letter)
    fresh = [first[digest] for digest in sorted(first)]  # in one order everywhere: collectors must not deadlock
    async with connection.transaction():
        arrays = ([value(one) for one in fresh] for _, _, value in _NEW)
        rows = await connection.fetch(_KEEP, *arrays, timeout=_KEEP_TIMEOUT_SECONDS)
        new = {row[0] for row in rows}
        known = [one for one in dead_letters if one.digest not in new or one is not first[one.digest]]
        news = [one for one in fresh if one.digest in new]
        news += [one for one in sorted(known, key=attrgetter("digest")) if await _died_again(connection, one)]
        retried = [
            (one.restaurant_id, one.change_id)
            for one in dead_letters
            if len(one.attempts) > 1 and one.restaurant_id and one.change_id
        ]
        if retried:
            await retry_store.forget(connection, retried)
    return news


async def _died_again(connection: Connection, dead_letter: NewDeadLetter) -> bool:
    known = await connection.fetchrow(_KNOWN, dead_letter.digest)
    if known is None or dead_letter.lane is None:
        return False
    before = msgspec.json.decode(known["attempts"], type=list[Attempt])
    if dead_letter.attempts[-1].at in {one.at for one in before}:
        return False
    attempts = [*before, *(one for one in dead_letter.attempts if one not in before)]
    # The death of another copy of the change says nothing about the result of the replay.
    still = known["status"] == "replaying" and dead_letter.replay_of != known["id"]
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
        "replaying" if still else "open",
    )
    return True


def bounded(attempts: list[Attempt], most: int) -> list[Attempt]:
    """Returns at most `most` attempts: the first one and the latest ones."""
    return attempts if len(attempts) <= most else [attempts[0], *attempts[1 - most :]]


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
