"""Messages of a dead-letter queue become dead letters that PostgreSQL can store, whatever the message holds."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.sync.failures.classification import Failure, FailureKind
from services.sync.failures.dead_letter_store import NewDeadLetter
from services.sync.failures.parsing import parse_dead_letters
from services.sync.failures.retry_ladder import FailedChange, headers_for
from shared.entities.contract import Lane, encode
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, message, order

AT = datetime(2026, 3, 14, 12, 30, 1, 234_567, tzinfo=UTC)
NOW = AT + timedelta(minutes=1)
QUEUE = "sync.postgres.critical.dead.v1"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FAILURE = Failure(FailureKind.POISON, "wrong_tenant", "BrokenContract: not yours", "shared.entities.entity:decode")


def dead_letter(body: bytes, headers: dict[str, Any] | None = None, lane: Lane | None = Lane.CRITICAL) -> NewDeadLetter:
    [found] = parse_dead_letters(QUEUE, lane, body, headers or {}, NOW)
    return found


def failed_headers(body: bytes, failure: Failure = FAILURE, at: datetime = AT, **headers: Any) -> dict[str, Any]:
    return dict(headers_for(FailedChange(body, headers, failure, at), Lane.CRITICAL))


def test_a_dead_letter_names_its_change_its_queue_and_its_failure() -> None:
    made = change(order(), source="terminal/T-7", traceparent=TRACE, entityversion=4)
    body = message(made)
    found = dead_letter(body, failed_headers(body))
    assert (found.queue, found.lane) == (QUEUE, "critical")
    assert (found.restaurant_id, found.change_id) == (RESTAURANT, made.id)
    assert (found.entity, found.entity_id, found.version) == ("order", made.entity_id, 4)
    assert (found.type, found.source, found.terminal_id) == ("ticketrail.order.created.v1", "terminal/T-7", "T-7")
    assert found.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert (found.reason, found.error, found.place) == (FAILURE.reason, FAILURE.error, FAILURE.place)
    assert [(one.at, one.reason, one.place) for one in found.attempts] == [(AT, FAILURE.reason, FAILURE.place)]
    assert found.body == body
    assert found.headers["ticketrail-attempt"] == 1
    assert not found.mixed


def test_a_dead_letter_has_every_attempt_of_the_retry_ladder() -> None:
    body = message(change(order()))
    slow = Failure(
        FailureKind.TRANSIENT, "transient", "SerializationError: try again", "services.sync.writer.upsert:write_batch"
    )
    first = failed_headers(body, slow)
    found = dead_letter(body, failed_headers(body, at=AT + timedelta(seconds=9), **first))
    assert [one.reason for one in found.attempts] == ["transient", "wrong_tenant"]
    assert found.attempts[0].at == AT
    assert (found.reason, found.place) == ("wrong_tenant", FAILURE.place)


def test_the_digest_depends_on_the_message_alone() -> None:
    one = message(change(order()))
    assert dead_letter(one).digest == dead_letter(one, failed_headers(one)).digest
    assert dead_letter(one).digest == dead_letter(b"[ " + one[1:-1] + b" ]").digest, (
        "the digest depends on spaces, which a replay removes"
    )
    [elsewhere] = parse_dead_letters("sync.mirror.dead.v1", None, one, {}, NOW)
    assert elsewhere.digest == dead_letter(one).digest
    assert (elsewhere.sinks, dead_letter(one).sinks) == (("mirror",), ("postgres",))
    assert dead_letter(message(change(order()))).digest != dead_letter(one).digest


def by_broker(reason: str = "delivery_limit") -> dict[str, Any]:
    when = datetime(2026, 3, 14, 12, 0)  # the client delivers times without a time zone
    return {
        "x-death": [{"count": 1, "reason": reason, "queue": "sync.postgres.critical.v1", "time": when}],
        "x-delivery-count": 101,
    }


def test_a_message_dead_lettered_by_the_broker_is_a_dead_letter_for_each_change() -> None:
    several = [change(order()) for _ in range(3)]
    found = parse_dead_letters(QUEUE, Lane.CRITICAL, message(*several), by_broker(), NOW)
    assert [one.change_id for one in found] == [made.id for made in several]
    assert [one.body for one in found] == [message(made) for made in several]
    assert len({one.digest for one in found}) == 3
    for one in found:
        assert (one.reason, one.place) == ("delivery_limit", "broker")
        assert "sync.postgres.critical.v1" in one.error
        assert one.attempts[-1].at == datetime(2026, 3, 14, 12, 0, tzinfo=UTC)


def test_a_retried_message_dead_lettered_by_the_broker_keeps_its_attempts() -> None:
    body = message(change(order()))
    slow = Failure(
        FailureKind.TRANSIENT, "transient", "SerializationError: try again", "services.sync.writer.upsert:write_batch"
    )
    found = dead_letter(body, {**failed_headers(body, slow), **by_broker()})
    assert [one.reason for one in found.attempts] == ["transient", "delivery_limit"]


def test_an_unreadable_message_becomes_a_dead_letter_without_restaurant_or_change() -> None:
    found = dead_letter(b"\xff\x00 garbage")
    assert (found.reason, found.place) == ("delivery_limit", "broker")
    assert found.attempts[-1].at == NOW
    assert found.restaurant_id is found.change_id is found.entity is None


def test_a_dead_letter_that_names_two_restaurants_is_marked() -> None:
    theirs = change(order(restaurant_id=OTHER_RESTAURANT), restaurantid=RESTAURANT)
    assert dead_letter(message(theirs)).mixed
    negative = encode(theirs).replace(b'"total":', b'"total":-')
    assert dead_letter(b"[" + negative + b"]").mixed, "the mark is missing if another error is found first"
    ours = change(order())
    assert dead_letter(encode([{"restaurantid": RESTAURANT, "data": {"after": 7}}])).mixed, (
        "the mark is missing if the restaurant of the content is unknown"
    )
    assert not dead_letter(encode([{"restaurantid": RESTAURANT}])).mixed
    assert not dead_letter(message(ours)).mixed


@pytest.mark.parametrize(
    "event",
    [
        {"id": "not an id", "restaurantid": "nor this", "subject": "order"},
        {"id": 7, "restaurantid": None, "subject": ["order"], "entityversion": "1", "type": {}, "source": 0},
        {"entityversion": 2**40, "subject": "order/" + "9" * 500, "source": "terminal/" + "x" * 500},
        {"entityversion": True, "type": "nul\0", "subject": "nul\0/x", "traceparent": "\0"},
    ],
)
def test_names_that_no_column_can_store_are_left_out(event: dict[str, Any]) -> None:
    found = dead_letter(json.dumps([event]).encode())
    assert [found.restaurant_id, found.change_id, found.entity_id, found.version] == [None] * 4
    for text in (found.type, found.source, found.entity, found.terminal_id):
        assert text is None or ("\0" not in text and len(text) <= 200)


def test_headers_of_any_kind_become_json() -> None:
    strange = {
        "bytes": b"\xff\x00", "at": AT, "decimal": Decimal("1.5"), "nan": float("nan"), "big": 2**70,
        "deep": {"a": {"b": {"c": {"d": {"e": 1}}}}}, "list": [1, None, True, "\ud800\0"], "long": "x" * 50_000,
        "nul\0": 1,
    }  # fmt: skip
    found = dead_letter(b"", {**strange, "ticketrail-attempts": "[{", "ticketrail-reason": "undecodable"})
    text = json.dumps(found.headers)
    assert "\\u0000" not in text
    assert "\\ud800" not in text
    assert len(text) < 20_000
    assert found.headers["nan"] == "nan"
    assert found.reason == "undecodable"


@pytest.mark.parametrize("depth", [3, 100_000])
def test_a_body_nested_too_deeply_becomes_a_dead_letter(depth: int) -> None:
    assert dead_letter(b"[" * depth + b"]" * depth).body.startswith(b"[[[")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.sampled_from(
    [
        "ticketrail-reason", "ticketrail-error", "ticketrail-place", "ticketrail-attempts", "ticketrail-failed-at",
        "ticketrail-replay", "x-death", "x-delivery-count",
    ]
) | st.text()  # fmt: skip


@given(st.binary() | st.text().map(str.encode), st.dictionaries(_NAMES, _VALUES, max_size=6))
@example(b"", {"ticketrail-reason": "\\u0000"})
@example(b"", {"ticketrail-reason": "\0"})
def test_any_message_becomes_at_least_one_dead_letter(body: bytes, headers: dict[str, Any]) -> None:
    found = parse_dead_letters(QUEUE, Lane.CRITICAL, body, headers, NOW)
    assert found
    for one in found:
        assert one.attempts
        assert one.reason == one.attempts[-1].reason
        texts = msgspec.json.encode([one.headers, one.attempts, one.reason, one.error, one.place])
        # Escaped backslashes do not count: a text may contain the six characters of the escape, and jsonb accepts them.
        assert b"\\u0000" not in texts.replace(rb"\\", b"")
        assert all(attempt.at.tzinfo is not None for attempt in one.attempts)
    if len(found) == 1:
        assert found[0].body == body
