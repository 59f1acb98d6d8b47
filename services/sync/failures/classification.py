"""What a failure to write means for the change that met it. Pure: no waiting, no sending.

    away       the sink does not take anything now: hold the batch, no attempt burnt
    transient  this change may pass later: the retry ladder
    poison     no retry can mend it: dead letter at once, untouched

A frozen server and one slow statement look alike to a client that only waits. So the server is told to give up on a
statement before the client does (`write_batch(patience=…)`): a QueryCanceledError is an answer, so the server lives and
the statement is slow; a TimeoutError of ours means that not even that answer came.

What we do not know is our own bug: it goes up the ladder, and dies there with its name, never silently.
"""

import hashlib
from enum import StrEnum

import asyncpg
from msgspec import Struct

from shared.entities.contract import BrokenContract
from shared.postgres.pool import UNAVAILABLE

UNKNOWN_PLACE = "unknown"
_LONGEST_ERROR = 500
_OURS = ("services.", "shared.")
_BROKEN = BrokenContract.__name__

# SQLSTATE classes and codes, https://www.postgresql.org/docs/current/errcodes-appendix.html; the longest match counts.
_BY_SQLSTATE = {
    "08": "away",  # connection
    "22": "poison",  # data
    "23": "poison",  # constraint
    "25006": "away",  # read-only: a standby, or a primary that has just been demoted
    "28": "away",  # who we are is not known (yet)
    "3D": "away",  # no such database
    "40": "transient",  # deadlock, serialization failure
    "42501": "away",  # not permitted: `ticketrail migrate` has not run, no change is to blame
    "42703": "away",  # no such column: the same
    "42P01": "away",  # no such table: the same
    "53": "away",  # out of disk, memory, connections
    "55P03": "transient",  # lock not available in time
    "57": "away",  # shutting down, starting, crashed
    "57014": "transient",  # statement timeout
    "58": "away",  # the server's own input and output
}


class FailureKind(StrEnum):
    UNAVAILABLE = "away"
    TRANSIENT = "transient"
    POISON = "poison"


class Failure(Struct, frozen=True):
    kind: FailureKind
    reason: str
    """Stable: dead letters are grouped by it."""
    error: str
    """For people; short."""
    place: str = UNKNOWN_PLACE
    """Where in our code: `module:function`."""
    timed_out: bool = False
    """The server gave up waiting, for a lock or for itself: if nothing else gets through either, it is the server."""


def classify(error: Exception) -> Failure:
    text, place = describe(error), place_of(error)
    if isinstance(error, BrokenContract):
        return Failure(FailureKind.POISON, error.reason, text, place)
    if isinstance(error, asyncpg.PostgresError):
        sqlstate = error.sqlstate or ""
        for length in (5, 2):
            if kind := _BY_SQLSTATE.get(sqlstate[:length]):
                reason = {"away": "postgres_unavailable", "transient": "transient", "poison": "refused_by_postgres"}[
                    kind
                ]
                return Failure(FailureKind(kind), reason, text, place, timed_out=sqlstate in ("57014", "55P03"))
    if isinstance(error, UNAVAILABLE):
        return Failure(FailureKind.UNAVAILABLE, "postgres_unavailable", text, place)
    return Failure(FailureKind.TRANSIENT, "unexpected", text, place)


def place_of(error: BaseException) -> str:
    """The last frame of our own code in its traceback, such as `shared.entities.entity:decode`: without line numbers,
    so that a failure has the same place after the next edit of the file."""
    place, step = UNKNOWN_PLACE, error.__traceback__
    while step is not None:
        module = step.tb_frame.f_globals.get("__name__", "")
        if module.startswith(_OURS) and not step.tb_frame.f_code.co_name.startswith("<"):
            place = f"{module}:{step.tb_frame.f_code.co_name}"
        step = step.tb_next
    return place


def fingerprint(reason: str, error: str, place: str) -> str:
    """What dead letters are grouped by. Of the error (`describe`) only its type counts: messages name ids."""
    kind = error.partition(":")[0].strip()
    # One type for all that breaks the contract: there the reason says which.
    named = reason if kind == _BROKEN else kind
    return hashlib.sha256(f"{reason}|{named}|{place}".encode(errors="replace")).hexdigest()[:12]


def describe(error: Exception) -> str:
    """Type and message, in a form that fits a header whatever it is made of."""
    return clip(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, _LONGEST_ERROR)


def clip(text: str, most: int) -> str:
    """So much of it, as text that UTF-8 and PostgreSQL can hold."""
    if len(text) <= most and text.isascii() and "\x00" not in text:
        return text
    return text[:most].encode(errors="replace").decode().replace("\x00", "�")
