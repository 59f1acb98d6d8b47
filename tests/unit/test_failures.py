"""The classification of failures, and the queue that each failed change goes to."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from asyncpg.exceptions import _base as client_errors

from services.sync.failures.classification import Failure, FailureKind, classify, describe, fingerprint
from services.sync.failures.retry_ladder import (
    ATTEMPTS,
    FailedChange,
    attempts_in,
    destination,
    headers_for,
)
from shared.entities import registry
from shared.entities.contract import BrokenContract, Lane, decode_change, encode
from shared.messaging import topology
from tests.rigs.builders import RESTAURANT, change, message, order

STEPS = (1_000, 10_000)
UNEXPECTED = (FailureKind.TRANSIENT, "unexpected")
AT = datetime(2026, 3, 14, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ConnectionRefusedError("refused"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        # This is a timeout of the client: PostgreSQL has not answered at all.
        (TimeoutError(), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.CannotConnectNowError("starting up"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.AdminShutdownError("going down"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.ConnectionDoesNotExistError("closed in the middle"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.InterfaceError("connection is closed"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.TooManyConnectionsError("full"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.DiskFullError("full"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.ReadOnlySQLTransactionError("standby"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.UndefinedTableError("not migrated"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.InvalidPasswordError("not made yet"), FailureKind.UNAVAILABLE, "postgres_unavailable"),
        (asyncpg.DeadlockDetectedError("deadlock"), FailureKind.TRANSIENT, "transient"),
        (asyncpg.SerializationError("try again"), FailureKind.TRANSIENT, "transient"),
        (asyncpg.QueryCanceledError("statement timeout"), FailureKind.TRANSIENT, "transient"),
        (asyncpg.LockNotAvailableError("lock timeout"), FailureKind.TRANSIENT, "transient"),
        (BrokenContract("wrong_tenant", "not yours"), FailureKind.POISON, "wrong_tenant"),
        (asyncpg.CheckViolationError("no"), FailureKind.POISON, "refused_by_postgres"),
        (asyncpg.NumericValueOutOfRangeError("too large"), FailureKind.POISON, "refused_by_postgres"),
        (asyncpg.CharacterNotInRepertoireError("NUL"), FailureKind.POISON, "refused_by_postgres"),
        (asyncpg.DataError("invalid input for query argument $1"), FailureKind.POISON, "refused_by_postgres"),
        (asyncpg.ProgramLimitExceededError("index row too large"), FailureKind.POISON, "refused_by_postgres"),
        # These are InterfaceErrors, but the connection works.
        (client_errors.DataError("invalid input for query argument $1"), FailureKind.POISON, "refused_by_postgres"),
        (asyncpg.UnsupportedClientFeatureError("no encoder"), FailureKind.TRANSIENT, "unexpected"),
        (asyncpg.InterfaceError("the server expects 2 arguments for this query, 1 was passed"), *UNEXPECTED),
        (asyncpg.InterfaceError("the number of query arguments cannot exceed 32767"), *UNEXPECTED),
        (KeyError("a bug of ours"), FailureKind.TRANSIENT, "unexpected"),
        (asyncpg.PostgresSyntaxError("a bug of ours"), FailureKind.TRANSIENT, "unexpected"),
    ],
)
def test_each_error_is_classified(error: Exception, kind: FailureKind, reason: str) -> None:
    failure = classify(error)
    assert (failure.kind, failure.reason) == (kind, reason)
    assert type(error).__name__ in failure.error


def test_only_timeouts_of_the_server_are_marked_as_timed_out() -> None:
    timeouts = (asyncpg.QueryCanceledError("slow"), asyncpg.LockNotAvailableError("locked"))
    assert all(classify(error).timed_out for error in timeouts)
    assert not classify(asyncpg.DeadlockDetectedError("deadlock")).timed_out


def test_the_description_of_any_error_fits_into_a_header() -> None:
    text = describe(ValueError("\ud800 half a pair, a NUL \x00 and " + "x" * 10_000))
    assert len(text.encode()) < 2_000
    assert "\x00" not in text


def raised(event: bytes) -> Exception:
    try:
        registry.read(decode_change(event))
    except BrokenContract as error:
        return error
    raise AssertionError("the event was accepted")


def test_the_place_of_a_failure_is_the_last_frame_in_our_code() -> None:
    event = encode(change(order()))
    assert classify(raised(b"{")).place == "shared.entities.contract:decode_change"
    assert classify(raised(event.replace(b'"pending"', b'"hungry"'))).place == "shared.entities.entity:decode"
    assert classify(raised(event.replace(b"order.created", b"order.eaten"))).place == "shared.entities.registry:read"
    assert classify(ValueError("never raised")).place == "unknown"


def test_a_fingerprint_depends_on_error_type_and_place_but_not_on_the_message() -> None:
    assert fingerprint("transient", "DeadlockDetectedError: of 7", "a:b") == fingerprint(
        "transient", "DeadlockDetectedError: of 9", "a:b"
    )
    several = {
        fingerprint("transient", "DeadlockDetectedError: x", "a:b"),
        fingerprint("transient", "SerializationError: x", "a:b"),
        fingerprint("unexpected", "DeadlockDetectedError: x", "a:b"),
        fingerprint("transient", "DeadlockDetectedError: x", "a:c"),
        fingerprint("wrong_tenant", "BrokenContract: x", "a:b"),
        fingerprint("too_large", "BrokenContract: x", "a:b"),
    }
    assert len(several) == 6
    # The formula is documented, so that other programs can compute it: reason, type of error, place.
    expected = hashlib.sha256(b"transient|SerializationError|a:b").hexdigest()[:12]
    assert fingerprint("transient", "SerializationError: x", "a:b") == expected
    assert (
        fingerprint("too_large", "BrokenContract: x", "a:b")
        == hashlib.sha256(b"too_large|too_large|a:b").hexdigest()[:12]
    )


def failed(headers: Mapping[str, Any] | None = None, *, kind: FailureKind = FailureKind.TRANSIENT) -> FailedChange:
    made = change(order())
    failure = Failure(kind, "transient", "SerializationError: try again", "services.sync.writer.upsert:write_batch")
    return FailedChange(message(made), dict(headers or {}), failure, AT, made)


@pytest.mark.parametrize(
    ("headers", "queue"),
    [
        ({}, topology.retry_queue(Lane.NORMAL, 1_000)),
        ({topology.ATTEMPT: 1}, topology.retry_queue(Lane.NORMAL, 10_000)),
        ({topology.ATTEMPT: 2}, topology.dead_queue(Lane.NORMAL)),
        ({topology.ATTEMPT: 99}, topology.dead_queue(Lane.NORMAL)),
        ({topology.ATTEMPT: "garbage"}, topology.retry_queue(Lane.NORMAL, 1_000)),
        ({topology.ATTEMPT: -7}, topology.retry_queue(Lane.NORMAL, 1_000)),
    ],
)
def test_each_attempt_goes_to_the_next_retry_queue_and_the_last_to_the_dead_letter_queue(
    headers: dict[str, Any], queue: str
) -> None:
    assert destination(failed(headers), Lane.NORMAL, STEPS) == queue


def test_poison_goes_straight_to_the_dead_letter_queue() -> None:
    assert destination(failed(kind=FailureKind.POISON), Lane.CRITICAL, STEPS) == topology.dead_queue(Lane.CRITICAL)


def test_headers_name_the_change_and_copy_none_of_the_brokers_headers() -> None:
    one = failed({"x-death": [{"count": 3}], "x-delivery-count": 2, topology.ATTEMPT: 1, "traceparent": "00-a-b-01"})
    headers = headers_for(one, Lane.CRITICAL)
    assert one.change is not None
    assert headers == {
        "traceparent": "00-a-b-01",
        "ticketrail-attempt": 2,
        "ticketrail-reason": "transient",
        "ticketrail-error": "SerializationError: try again",
        "ticketrail-place": "services.sync.writer.upsert:write_batch",
        "ticketrail-attempts": msgspec.json.encode(
            [
                {
                    "at": AT,
                    "reason": "transient",
                    "error": "SerializationError: try again",
                    "place": "services.sync.writer.upsert:write_batch",
                }
            ]
        ).decode(),
        "ticketrail-lane": "critical",
        "ticketrail-failed-at": AT.isoformat(),
        "ticketrail-first-failed-at": AT.isoformat(),
        "ticketrail-change-id": one.change.id,
        "ticketrail-restaurant": RESTAURANT,
        "ticketrail-subject": one.change.subject,
    }


def test_the_time_of_the_first_failure_stays_over_all_attempts() -> None:
    headers = headers_for(failed({"ticketrail-first-failed-at": "long ago"}), Lane.CRITICAL)
    assert headers["ticketrail-first-failed-at"] == "long ago"


def test_headers_list_the_latest_attempts_and_always_the_first() -> None:
    headers: dict[str, Any] = {}
    for number in range(40):
        one = failed(headers)
        failure = Failure(FailureKind.TRANSIENT, f"reason {number}", "\x07" * 400, "a:b")
        one = msgspec.structs.replace(one, failure=failure, at=AT + timedelta(seconds=number))
        headers = dict(headers_for(one, Lane.CRITICAL))
    reasons = [attempt.reason for attempt in attempts_in(headers)]
    assert reasons == ["reason 0", *(f"reason {number}" for number in range(25, 40))]
    assert len(headers[ATTEMPTS]) < 40_000, "the headers do not fit into one frame"


@pytest.mark.parametrize("value", ["garbage", "[{}]", 7, b"\xff", '[{"at": "2026-01-01T00:00:00"}]', "[" * 100_000])
def test_an_invalid_list_of_attempts_is_replaced_by_a_new_one(value: Any) -> None:
    headers = headers_for(failed({ATTEMPTS: value}), Lane.CRITICAL)
    assert len(attempts_in(headers)) == 1


def test_foreign_headers_never_fill_the_frame_or_displace_our_headers() -> None:
    strange = {f"a{number}": "x" * 5_000 for number in range(100)}
    headers = headers_for(failed({**strange, "ticketrail-replay": "a dead letter"}), Lane.CRITICAL)
    assert headers["ticketrail-replay"] == "a dead letter"
    assert sum(len(str(value)) for value in headers.values()) < 60_000


def test_a_body_without_a_readable_change_still_gets_headers() -> None:
    for body in (b"", b"garbage", b"[{}, {}]", b'[{"id": 7, "restaurantid": null}]', b"[" * 50_000):
        headers = headers_for(
            FailedChange(body, {}, Failure(FailureKind.POISON, "undecodable", "?"), AT), Lane.CRITICAL
        )
        assert headers["ticketrail-reason"] == "undecodable"
        assert "ticketrail-change-id" not in headers
