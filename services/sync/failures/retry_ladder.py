"""Where a change goes that could not be written: up the retry ladder, or to the dead queue of its lane.

Guarantee: `send` returns only when the broker has confirmed, so that the original may be acknowledged then; while the
broker does not, it tries again. A change can thus be on the ladder twice, which is harmless, and is never nowhere.

Each travels alone, its bytes untouched, with what is known of its failures in headers of ours: the attempt number, the
last failure, and the list of all of them. No `x-*` header is copied: with a copied `x-death` a message can be lost at
its next expiry.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from services.sync.dead_letters.store import Attempt, bounded
from services.sync.failures.classification import Failure, FailureKind, clip
from services.sync.failures.retry_store import Retry
from shared.backoff import backoff
from shared.entities.contract import Change, Lane, encode, encode_batch, in_range
from shared.messaging import topology
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.observability.metrics import WriterMetrics
from shared.observability.tracing import trace_id_of

log = structlog.get_logger(__name__)

REASON = "ticketrail-reason"
ERROR = "ticketrail-error"
PLACE = "ticketrail-place"
ATTEMPTS = "ticketrail-attempts"
"""JSON: [{"at", "reason", "error", "place"}], the first failure first."""
REPLAY = "ticketrail-replay"
"""The dead letter that this is the replay of. It stays with the change until its end, up the ladder too."""
LANE = "ticketrail-lane"
FAILED_AT = "ticketrail-failed-at"
FIRST_FAILED_AT = "ticketrail-first-failed-at"
CHANGE_ID = "ticketrail-change-id"
RESTAURANT = "ticketrail-restaurant"
SUBJECT = "ticketrail-subject"

# All headers of a message must fit into one frame of 128 KiB, or the broker closes the connection over them.
_MOST_ATTEMPTS = 16
_LONGEST_ATTEMPT = 300
_MOST_KEPT = 16_384  # bytes of headers that came with it
# Not all of a message's headers: what others have named theirs is not ours to write into the log.
_TOLD = (topology.ATTEMPT, REASON, ERROR, PLACE, LANE, FIRST_FAILED_AT, CHANGE_ID, RESTAURANT, SUBJECT, REPLAY)
_MOST_UNDER_WAY = 256
_MOST_BYTES = 4_000_000
# A broker that is only slow must not lose its connection over it: what is under way would all be sent once more.
_PATIENCE, _BYTES_PER_SECOND = 10.0, 1_000_000

Headers = dict[str, int | str]


class FailedChange(Struct, frozen=True):
    """A change that could not be written, or a whole message that cannot be taken apart."""

    body: bytes
    """A message body: the change to the letter, in a batch of its own."""
    headers: Mapping[str, Any]
    """Of the message in which it came."""
    failure: Failure
    at: datetime
    change: Change | None = None
    """When it can be read."""
    message: object = None
    """In which it came: settled when this is where it belongs."""

    @property
    def attempt(self) -> int:
        """How many attempts there were, with this one."""
        before = self.headers.get(topology.ATTEMPT)
        return (before if isinstance(before, int) and before > 0 else 0) + 1


def single_change_body(event: bytes) -> bytes:
    """The body of a message with one change in it."""
    return encode_batch((event,))


def destination(failed: FailedChange, lane: Lane, steps_ms: tuple[int, ...]) -> str:
    if failed.failure.kind is FailureKind.POISON or failed.attempt > len(steps_ms):
        return topology.dead_queue(lane)
    return topology.retry_queue(lane, steps_ms[failed.attempt - 1])


def headers_for(failed: FailedChange, lane: str) -> Headers:
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
    # Our own first: they must not be left out for what others have added.
    for name in sorted(headers, key=lambda name: not name.startswith("ticketrail-")):
        value = headers[name]
        if name.startswith("x-") or name == ATTEMPTS or not isinstance(value, int | str):
            continue
        its = len(name) + (len(value.encode(errors="replace")) if isinstance(value, str) else 8)
        if size + its <= _MOST_KEPT:
            size += its
            kept[name] = value
    return kept


def attempts_in(headers: Mapping[str, Any]) -> list[Attempt]:
    """Those that are in a message's headers; none where they cannot be read."""
    try:
        found = msgspec.json.decode(headers.get(ATTEMPTS) or b"[]", type=list[Attempt])
    except (msgspec.DecodeError, UnicodeError, RecursionError, TypeError):
        return []
    return [
        Attempt(one.at, clip(one.reason, 100), clip(one.error, _LONGEST_ATTEMPT), clip(one.place, 200))
        for one in bounded(found, _MOST_ATTEMPTS)
        if in_range(one.at)
    ]


def _attempts(failed: FailedChange) -> list[Attempt]:
    failure = failed.failure
    this = Attempt(failed.at, failure.reason, clip(failure.error, _LONGEST_ATTEMPT), failure.place)
    return bounded([*attempts_in(failed.headers), this], _MOST_ATTEMPTS)


def for_the_mirror(failed: FailedChange) -> bytes:
    """What readers see of it: JSON {"error", "attempts", "last_attempt"}."""
    return encode({"error": failed.failure.error, "attempts": failed.attempt, "last_attempt": failed.at})


def patience(size: int) -> float:
    """Seconds until a publish of so many bytes is given up on: more than for a small one."""
    return _PATIENCE + size / _BYTES_PER_SECOND


class RetryLadder:
    def __init__(self, publisher: Publisher, steps_ms: tuple[int, ...], metrics: WriterMetrics) -> None:
        self._metrics = metrics
        self._publisher = publisher
        self._steps_ms = steps_ms

    def is_dead(self, failed: FailedChange, lane: Lane) -> bool:
        """It has no way up."""
        return destination(failed, lane, self._steps_ms) == topology.dead_queue(lane)

    async def send(self, failed: Sequence[FailedChange], lane: Lane, *, ours: Callable[[], bool]) -> list[Retry]:
        """Returns when all are confirmed, or when their messages are not `ours` any more: the broker delivers those
        again. Gives those that are on a rung of the ladder now, as far as they can be read.

        All at once, as one after the other would hold up the lane for a confirm each; but so many bytes at most, which
        must get through the broker before its confirm is given up on."""
        for group in _groups(failed):
            timeout = patience(sum(len(one.body) for one in group))
            await asyncio.gather(*(self._send(one, lane, ours, timeout) for one in group))
        return [
            Retry(
                restaurant_id=one.change.restaurantid,
                change_id=one.change.id,
                lane=lane.value,
                entity=one.change.entity,
                entity_id=one.change.entity_id,
                attempt=one.attempt,
                reason=one.failure.reason,
                error=one.failure.error,
                failed_at=one.at,
            )
            for one in failed
            if one.change is not None and not self.is_dead(one, lane)
        ]

    async def _send(self, failed: FailedChange, lane: Lane, ours: Callable[[], bool], timeout: float) -> None:
        queue = destination(failed, lane, self._steps_ms)
        headers = headers_for(failed, lane)
        log.warning(
            "change_failed",
            queue=queue,
            **({"trace_id": trace} if failed.change and (trace := trace_id_of(failed.change.traceparent)) else {}),
            **{name.removeprefix("ticketrail-"): headers[name] for name in _TOLD if name in headers},
        )
        attempt = 0
        while ours():
            try:
                await self._publisher.publish_to_queue(queue, failed.body, headers=headers, timeout=timeout)
                if queue == topology.dead_queue(lane):
                    self._metrics.dead.inc(failed.failure.reason)
                else:
                    self._metrics.retries.inc(str(failed.attempt))
                return
            except (NotSent, InDoubt) as error:
                attempt += 1
                log.warning("failed_change_not_sent", queue=queue, error=str(error), attempt=attempt)
            await asyncio.sleep(backoff(attempt))


def _groups(failed: Sequence[FailedChange]) -> Iterator[list[FailedChange]]:
    group: list[FailedChange] = []
    size = 0
    for one in failed:
        if group and (size + len(one.body) > _MOST_BYTES or len(group) >= _MOST_UNDER_WAY):
            yield group
            group, size = [], 0
        group.append(one)
        size += len(one.body)
    if group:
        yield group


class _Glimpse(Struct):
    """The names in an event that may be broken everywhere else."""

    id: Any = None
    restaurantid: Any = None
    subject: Any = None


def _identity(failed: FailedChange) -> Headers:
    """Whose it is, as far as that can be read: operators search dead letters by it."""
    try:
        seen = msgspec.json.decode(failed.body, type=list[_Glimpse])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    if len(seen) != 1:
        return {}
    named = ((CHANGE_ID, seen[0].id), (RESTAURANT, seen[0].restaurantid), (SUBJECT, seen[0].subject))
    return {name: value[:200] for name, value in named if isinstance(value, str)}
