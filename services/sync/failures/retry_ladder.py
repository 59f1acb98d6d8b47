"""The retry ladder forwards failed changes: each goes to the next retry queue, or to the dead-letter queue of its lane
if PostgreSQL has refused its dead letter.

Guarantee: `send` returns only after the broker has confirmed the change, so that the caller may acknowledge the
original. Until then, it repeats the publish. A change may therefore be enqueued twice (idempotent) but is never lost.

Each change is sent in a message of its own, with its bytes unchanged. Our headers carry its failures: the attempt
number, the last failure and the list of all failures. No `x-*` header is copied, because RabbitMQ may silently lose a
message with a copied `x-death` when it expires.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from services.sync.failures.classification import Failure, FailureKind, clip
from services.sync.failures.dead_letter_store import Attempt, bounded
from services.sync.failures.retry_store import Retry
from shared.backoff import backoff
from shared.entities.contract import Change, Lane, PartialEvent, encode, encode_batch, in_range
from shared.messaging import topology
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.observability.metrics import WriterMetrics
from shared.observability.tracing import trace_id_of

log = structlog.get_logger(__name__)

REASON = "ticketrail-reason"
ERROR = "ticketrail-error"
PLACE = "ticketrail-place"
ATTEMPTS = "ticketrail-attempts"
"""The header with the failed attempts as JSON: [{"at", "reason", "error", "place"}], oldest first."""
REPLAY = "ticketrail-replay"
"""The header with the id of the dead letter that the message replays. It stays on the change in all retry queues."""
LANE = "ticketrail-lane"
FAILED_AT = "ticketrail-failed-at"
FIRST_FAILED_AT = "ticketrail-first-failed-at"
CHANGE_ID = "ticketrail-change-id"
RESTAURANT = "ticketrail-restaurant"
SUBJECT = "ticketrail-subject"

# All headers of a message must fit into one frame of 128 KiB. Otherwise the broker closes the connection.
_MAX_ATTEMPTS = 16
_MAX_ATTEMPT_ERROR_CHARS = 300
_MAX_KEPT_HEADER_BYTES = 16_384
# Only our own headers are logged, because other senders may choose any name.
_LOGGED = (topology.ATTEMPT, REASON, ERROR, PLACE, LANE, FIRST_FAILED_AT, CHANGE_ID, RESTAURANT, SUBJECT, REPLAY)
_MAX_PUBLISHES_IN_FLIGHT = 256
_MAX_BYTES_IN_FLIGHT = 4_000_000
PUBLISH_TIMEOUT_SECONDS = 10.0
"""The timeout of a publish to a retry queue or a dead-letter queue. It is long, because no request waits for it, and
after a timeout everything in flight is sent again."""

Headers = dict[str, int | str]


class FailedChange(Struct, frozen=True):
    """A change that could not be written, or a whole message that cannot be parsed."""

    body: bytes
    """A message body: a batch with only this change, its bytes unchanged."""
    headers: Mapping[str, Any]
    """The headers of the message that carried the change."""
    failure: Failure
    at: datetime
    change: Change | None = None
    """The decoded change; None for an unreadable one."""
    message: object = None
    """The message that carried the change. It is acknowledged when the change is committed or confirmed elsewhere."""

    @property
    def attempt(self) -> int:
        """The number of attempts up to now, including this one."""
        before = self.headers.get(topology.ATTEMPT)
        return (before if isinstance(before, int) and before > 0 else 0) + 1


def single_change_body(event: bytes) -> bytes:
    """Returns a message body with only this change."""
    return encode_batch((event,))


def is_dead(failed: FailedChange, steps_ms: tuple[int, ...]) -> bool:
    """Returns whether no retry follows: the change is a dead letter. `steps_ms`: the delays of the retry queues."""
    return failed.failure.kind is FailureKind.POISON or failed.attempt > len(steps_ms)


def destination(failed: FailedChange, lane: Lane, steps_ms: tuple[int, ...]) -> str:
    """Returns the name of the queue to which the change goes next. `steps_ms`: the delays of the retry queues."""
    if is_dead(failed, steps_ms):
        return topology.dead_queue(lane)
    return topology.retry_queue(lane, steps_ms[failed.attempt - 1])


def headers_for(failed: FailedChange, lane: str) -> Headers:
    """Returns the headers with which the change goes to its next queue."""
    kept = _kept(failed.headers)
    at = failed.at.isoformat()
    return {
        **kept,
        **_identity(failed),
        topology.ATTEMPT: failed.attempt,
        REASON: failed.failure.reason,
        ERROR: failed.failure.error,
        PLACE: failed.failure.place,
        ATTEMPTS: encode(_attempts(failed)).decode(),
        LANE: str(lane),
        FAILED_AT: at,
        FIRST_FAILED_AT: kept.get(FIRST_FAILED_AT, at),
    }


def _kept(headers: Mapping[str, Any]) -> Headers:
    kept: Headers = {}
    size = 0
    # Keep our own headers first, so that other headers do not displace them.
    for name in sorted(headers, key=lambda name: not name.startswith("ticketrail-")):
        value = headers[name]
        if name.startswith("x-") or name == ATTEMPTS or not isinstance(value, int | str):
            continue
        header_bytes = len(name) + (len(value.encode(errors="replace")) if isinstance(value, str) else 8)
        if size + header_bytes <= _MAX_KEPT_HEADER_BYTES:
            size += header_bytes
            kept[name] = value
    return kept


def attempts_in(headers: Mapping[str, Any]) -> list[Attempt]:
    """Returns the attempts in the headers of a message, or an empty list if they cannot be read."""
    try:
        found = msgspec.json.decode(headers.get(ATTEMPTS) or b"[]", type=list[Attempt])
    except (msgspec.DecodeError, UnicodeError, RecursionError, TypeError):
        return []
    return [
        Attempt(
            attempt.at,
            clip(attempt.reason, 100),
            clip(attempt.error, _MAX_ATTEMPT_ERROR_CHARS),
            clip(attempt.place, 200),
        )
        for attempt in bounded(found, _MAX_ATTEMPTS)
        if in_range(attempt.at)
    ]


def _attempts(failed: FailedChange) -> list[Attempt]:
    failure = failed.failure
    this = Attempt(failed.at, failure.reason, clip(failure.error, _MAX_ATTEMPT_ERROR_CHARS), failure.place)
    return bounded([*attempts_in(failed.headers), this], _MAX_ATTEMPTS)


class RetryLadder:
    def __init__(self, publisher: Publisher, steps_ms: tuple[int, ...], metrics: WriterMetrics) -> None:
        self._metrics = metrics
        self._publisher = publisher
        self._steps_ms = steps_ms

    async def send(self, failed: Sequence[FailedChange], lane: Lane, *, ours: Callable[[], bool]) -> list[Retry]:
        """Sends failed changes. Returns the readable ones that are in a retry queue now. `ours`: whether the channel of
        their messages is still open; if it is closed, `send` stops, because the broker delivers the messages again.

        Publishes many changes at the same time, because waiting for each confirm would delay the lane. The bytes in
        flight are limited, because other publishes over the same connection wait behind them."""
        for group in _groups(failed):
            await asyncio.gather(*(self._send(failed_change, lane, ours) for failed_change in group))
        return [
            Retry(
                restaurant_id=failed_change.change.restaurantid,
                change_id=failed_change.change.id,
                lane=lane.value,
                entity=failed_change.change.entity,
                entity_id=failed_change.change.entity_id,
                attempt=failed_change.attempt,
                reason=failed_change.failure.reason,
                error=failed_change.failure.error,
                failed_at=failed_change.at,
            )
            for failed_change in failed
            if failed_change.change is not None and not is_dead(failed_change, self._steps_ms)
        ]

    async def _send(self, failed: FailedChange, lane: Lane, ours: Callable[[], bool]) -> None:
        queue = destination(failed, lane, self._steps_ms)
        headers = headers_for(failed, lane)
        log_failed(failed, queue, headers)
        attempt = 0
        while ours():
            try:
                await self._publisher.publish_to_queue(
                    queue, failed.body, headers=headers, timeout=PUBLISH_TIMEOUT_SECONDS
                )
                if queue == topology.dead_queue(lane):
                    self._metrics.dead.inc(failed.failure.reason)
                else:
                    self._metrics.retries.inc(str(failed.attempt))
                return
            except (NotSent, InDoubt) as error:
                attempt += 1
                log.warning("failed_change_not_sent", queue=queue, error=str(error), attempt=attempt)
            await asyncio.sleep(backoff(attempt))


def log_failed(failed: FailedChange, queue: str, headers: Headers) -> None:
    """Logs a failed change with the names of its headers, so that operators can search for it."""
    log.warning(
        "change_failed",
        queue=queue,
        **({"trace_id": trace} if failed.change and (trace := trace_id_of(failed.change.traceparent)) else {}),
        **{name.removeprefix("ticketrail-"): headers[name] for name in _LOGGED if name in headers},
    )


def _groups(failed: Sequence[FailedChange]) -> Iterator[list[FailedChange]]:
    group: list[FailedChange] = []
    size = 0
    for failed_change in failed:
        if group and (size + len(failed_change.body) > _MAX_BYTES_IN_FLIGHT or len(group) >= _MAX_PUBLISHES_IN_FLIGHT):
            yield group
            group, size = [], 0
        group.append(failed_change)
        size += len(failed_change.body)
    if group:
        yield group


def _identity(failed: FailedChange) -> Headers:
    """Returns the readable ids of change, restaurant and entity as headers, so that operators can search for them."""
    try:
        seen = msgspec.json.decode(failed.body, type=list[PartialEvent])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    if len(seen) != 1:
        return {}
    named = ((CHANGE_ID, seen[0].id), (RESTAURANT, seen[0].restaurantid), (SUBJECT, seen[0].subject))
    return {name: value[:200] for name, value in named if isinstance(value, str)}
