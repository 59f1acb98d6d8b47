"""Classifies the failure of a change. Pure: does not wait and sends nothing.

    unavailable  the sink accepts nothing now: hold the batch, burn no attempt
    transient    the failure may pass by itself: use the retry ladder
    poison       no retry can succeed: dead letter at once, bytes unchanged

A client that only waits cannot distinguish a frozen server from a slow statement. Therefore the server must cancel a
statement before the client gives up (`write_batch(timeout_seconds=…)`): a QueryCanceledError is an answer, so the
server lives and the statement is slow; our own TimeoutError means that not even this answer arrived.

An unknown error is a bug of ours: it takes the retry ladder and ends as a dead letter with its name, never silently.
"""

import hashlib
from enum import StrEnum

import asyncpg
from msgspec import Struct

from shared.entities.contract import BrokenContract
from shared.postgres.pool import UNAVAILABLE

UNKNOWN_PLACE = "unknown"
_MAX_ERROR_CHARS = 500
_OURS = ("services.", "shared.")
_BROKEN = BrokenContract.__name__


class FailureKind(StrEnum):
    UNAVAILABLE = "unavailable"
    TRANSIENT = "transient"
    POISON = "poison"


# SQLSTATE classes and codes, https://www.postgresql.org/docs/current/errcodes-appendix.html; the longest match applies.
_BY_SQLSTATE = {
    "08": FailureKind.UNAVAILABLE,  # connection
    "22": FailureKind.POISON,  # data
    "23": FailureKind.POISON,  # constraint
    "25006": FailureKind.UNAVAILABLE,  # read-only: a standby, or a primary that has just been demoted
    "28": FailureKind.UNAVAILABLE,  # our role is not known (yet)
    "3D": FailureKind.UNAVAILABLE,  # no such database
    "40": FailureKind.TRANSIENT,  # deadlock, serialization failure
    "42501": FailureKind.UNAVAILABLE,  # not permitted: `ticketrail migrate` has not run; no change is at fault
    "42703": FailureKind.UNAVAILABLE,  # no such column: the same
    "42P01": FailureKind.UNAVAILABLE,  # no such table: the same
    "53": FailureKind.UNAVAILABLE,  # out of disk, memory, connections
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
    """Stable name of the cause, by which dead letters are grouped."""
    error: str
    """Error type and message for people, at most 500 characters."""
    place: str = UNKNOWN_PLACE
    """The function in our code where the change failed, as `module:function`."""
    timed_out: bool = False
    """The server cancelled the statement or stopped waiting for a lock. When nothing else succeeds either, the server
    is slow, not this change."""


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
    if isinstance(error, UNAVAILABLE):
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
    # All violations of the contract have one type: their reason distinguishes them.
    named = reason if kind == _BROKEN else kind
    return hashlib.sha256(f"{reason}|{named}|{place}".encode(errors="replace")).hexdigest()[:12]


def describe(error: Exception) -> str:
    """Returns error type and message as text that always fits into a header."""
    return clip(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, _MAX_ERROR_CHARS)


def clip(text: str, most: int) -> str:
    """Returns the first `most` characters, as text that UTF-8 and PostgreSQL can hold."""
    if len(text) <= most and text.isascii() and "\x00" not in text:
        return text
    return text[:most].encode(errors="replace").decode().replace("\x00", "�")
