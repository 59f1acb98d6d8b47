"""Classifies the failure of a change. Pure.

    unavailable  the sink accepts nothing now: hold the batch, and burn no attempt
    transient    the failure may pass by itself: send the change to the retry ladder
    poison       no retry can succeed: dead-letter the change at once, with its bytes unchanged

A client that only waits cannot distinguish a frozen server from a slow statement. Therefore the server must cancel a
statement before the client stops waiting (`write_batch(timeout_seconds=…)`). A QueryCanceledError comes from the
server, so the server works and the statement is slow. Our own TimeoutError means that the server did not answer at all.

An unknown error is a bug of ours. The change takes the retry ladder and ends as a dead letter with the name of the
error, so that the bug is visible.
"""

import hashlib
from enum import StrEnum

import asyncpg
from msgspec import Struct

from shared.entities.contract import BrokenContract
from shared.errors import described
from shared.postgres.pool import UNAVAILABLE, refused_by_client

UNKNOWN_PLACE = "unknown"
_MAX_ERROR_CHARS = 500
_OURS = ("services.", "shared.")
_BROKEN = BrokenContract.__name__


class FailureKind(StrEnum):
    UNAVAILABLE = "unavailable"
    TRANSIENT = "transient"
    POISON = "poison"


# The kind of each class or code of SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html). A code
# overrides its class.
_BY_SQLSTATE = {
    "08": FailureKind.UNAVAILABLE,  # connection
    "22": FailureKind.POISON,  # data
    "23": FailureKind.POISON,  # constraint
    "25006": FailureKind.UNAVAILABLE,  # read-only: a standby, or a primary that has just been demoted
    "28": FailureKind.UNAVAILABLE,  # authorization: our role does not exist (yet)
    "3D": FailureKind.UNAVAILABLE,  # no such database
    "40": FailureKind.TRANSIENT,  # deadlock, serialization failure
    "42501": FailureKind.UNAVAILABLE,  # not permitted: `ticketrail migrate` has not run, so the change is not the cause
    "42703": FailureKind.UNAVAILABLE,  # no such column: `ticketrail migrate` has not run
    "42P01": FailureKind.UNAVAILABLE,  # no such table: `ticketrail migrate` has not run
    "53": FailureKind.UNAVAILABLE,  # out of disk, memory, connections
    "54": FailureKind.POISON,  # a limit of PostgreSQL, such as the size of an index row
    "55P03": FailureKind.TRANSIENT,  # lock not available in time
    "57": FailureKind.UNAVAILABLE,  # shutting down, starting, crashed
    "57014": FailureKind.TRANSIENT,  # statement timeout
    "58": FailureKind.UNAVAILABLE,  # the server's own input and output
}
_REASONS = {
    FailureKind.UNAVAILABLE: "postgres_unavailable",
    FailureKind.TRANSIENT: "transient",
    FailureKind.POISON: "refused_by_postgres",
}


class Failure(Struct, frozen=True):
    kind: FailureKind
    reason: str
    """The stable name of the cause, for example `transient`. It is a part of the fingerprint."""
    error: str
    """Error type and message for people, at most 500 characters."""
    place: str = UNKNOWN_PLACE
    """The function in our code where the change failed, as `module:function`."""
    timed_out: bool = False
    """True if the server cancelled the statement or stopped waiting for a lock. If no other change succeeds either, the
    cause is a slow server and not this change."""


def classify(error: Exception) -> Failure:
    """Classifies an error raised while decoding or writing a change. Never raises."""
    text, place = describe(error), place_of(error)
    if isinstance(error, BrokenContract):
        return Failure(FailureKind.POISON, error.reason, text, place)
    if isinstance(error, asyncpg.PostgresError):
        sqlstate = error.sqlstate or ""
        for length in (5, 2):
            if kind := _BY_SQLSTATE.get(sqlstate[:length]):
                return Failure(kind, _REASONS[kind], text, place, timed_out=sqlstate in ("57014", "55P03"))
    if refused_by_client(error):
        if isinstance(error, ValueError):
            return Failure(FailureKind.POISON, _REASONS[FailureKind.POISON], text, place)
    elif isinstance(error, UNAVAILABLE):
        return Failure(FailureKind.UNAVAILABLE, "postgres_unavailable", text, place)
    return Failure(FailureKind.TRANSIENT, "unexpected", text, place)


def place_of(error: BaseException) -> str:
    """Returns the last frame of our own code in the traceback, such as `shared.entities.entity:decode`. It has no line
    number, so that a failure keeps its place after the next edit of the file."""
    place, step = UNKNOWN_PLACE, error.__traceback__
    while step is not None:
        module = step.tb_frame.f_globals.get("__name__", "")
        if module.startswith(_OURS) and not step.tb_frame.f_code.co_name.startswith("<"):
            place = f"{module}:{step.tb_frame.f_code.co_name}"
        step = step.tb_next
    return place


def fingerprint(reason: str, error: str, place: str) -> str:
    """Returns the fingerprint that groups dead letters, as 12 hex digits. It uses only the type of the error
    (`describe`), because messages contain ids."""
    kind = error.partition(":")[0].strip()
    # All violations of the contract have one error type, so their reason distinguishes them.
    cause = reason if kind == _BROKEN else kind
    return hashlib.sha256(f"{reason}|{cause}|{place}".encode(errors="replace")).hexdigest()[:12]


def describe(error: Exception) -> str:
    """Returns error type and message as text that is short enough for a header."""
    return clip(described(error), _MAX_ERROR_CHARS)


def clip(text: str, max_chars: int) -> str:
    """Returns the first `max_chars` characters, as text that UTF-8 and PostgreSQL can hold."""
    if len(text) <= max_chars and text.isascii() and "\x00" not in text:
        return text
    return text[:max_chars].encode(errors="replace").decode().replace("\x00", "�")
