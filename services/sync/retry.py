"""Where a change goes that could not be written: up the retry ladder, or to the dead queue of its lane.

Guarantee: `send` returns only when the broker has confirmed, so that the original may be acknowledged then; while the
broker does not, it tries again. A change can thus be on the ladder twice, which is harmless, and is never nowhere.

Each travels alone, its bytes untouched. The attempt number is in a header of ours; no `x-*` header is copied: with a
copied `x-death` a message can be lost at its next expiry.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from services.sync.failures import Failure, Kind
from shared.backoff import backoff
from shared.entities.contract import Change, Lane, encode, encode_batch
from shared.messaging import topology
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.metrics import WriterMetrics
from shared.tracing import trace_id_of

log = structlog.get_logger(__name__)

REASON = "ticketrail-reason"
ERROR = "ticketrail-error"
LANE = "ticketrail-lane"
FAILED_AT = "ticketrail-failed-at"
FIRST_FAILED_AT = "ticketrail-first-failed-at"
CHANGE_ID = "ticketrail-change-id"
RESTAURANT = "ticketrail-restaurant"
SUBJECT = "ticketrail-subject"

Headers = dict[str, int | str]


class Failed(Struct, frozen=True):
    """A change that could not be written, or a whole message that cannot be taken apart."""

    body: bytes
    """A message body: the change to the letter, in a batch of its own."""
    headers: Mapping[str, Any]
    """Of the message in which it came."""
    failure: Failure
    at: datetime
    change: Change | None = None
    """When it can be read."""

    @property
    def attempt(self) -> int:
        """How many attempts there were, with this one."""
        before = self.headers.get(topology.ATTEMPT)
        return (before if isinstance(before, int) and before > 0 else 0) + 1


def alone(event: bytes) -> bytes:
    """The body of a message with one change in it."""
    return encode_batch((event,))


def destination(failed: Failed, lane: Lane, steps_ms: tuple[int, ...]) -> str:
    if failed.failure.kind is Kind.POISON or failed.attempt > len(steps_ms):
        return topology.dead_queue(lane)
    return topology.retry_queue(lane, steps_ms[failed.attempt - 1])


def headers_for(failed: Failed, lane: Lane) -> Headers:
    kept: Headers = {
        name: value
        for name, value in failed.headers.items()
        if not name.startswith("x-") and isinstance(value, int | str)
    }
    at = failed.at.isoformat()
    return {
        **kept,
        **_identity(failed),
        topology.ATTEMPT: failed.attempt,
        REASON: failed.failure.reason,
        ERROR: failed.failure.error,
        LANE: lane.value,
        FAILED_AT: at,
        FIRST_FAILED_AT: kept.get(FIRST_FAILED_AT, at),
    }


def for_the_mirror(failed: Failed) -> bytes:
    """What readers see of it: JSON {"error", "attempts", "last_attempt"}."""
    return encode({"error": failed.failure.error, "attempts": failed.attempt, "last_attempt": failed.at})


class Ladder:
    def __init__(self, publisher: Publisher, steps_ms: tuple[int, ...], metrics: WriterMetrics) -> None:
        self._metrics = metrics
        self._publisher = publisher
        self._steps_ms = steps_ms

    async def send(self, failed: Failed, lane: Lane, *, ours: Callable[[], bool]) -> None:
        """Returns when it is confirmed, or when its message is not `ours` any more: the broker delivers that again."""
        queue = destination(failed, lane, self._steps_ms)
        headers = headers_for(failed, lane)
        log.warning(
            "change_failed",
            queue=queue,
            **({"trace_id": trace} if failed.change and (trace := trace_id_of(failed.change.traceparent)) else {}),
            **{name.replace("ticketrail-", ""): headers[name] for name in headers},
        )
        attempt = 0
        while ours():
            try:
                await self._publisher.publish_to_queue(queue, failed.body, headers=headers)
                if queue == topology.dead_queue(lane):
                    self._metrics.dead.inc(failed.failure.reason)
                else:
                    self._metrics.retries.inc(str(failed.attempt))
                return
            except (NotSent, InDoubt) as error:
                attempt += 1
                log.warning("failed_change_not_sent", queue=queue, error=str(error), attempt=attempt)
            await asyncio.sleep(backoff(attempt))


class _Glimpse(Struct):
    """The names in an event that may be broken everywhere else."""

    id: Any = None
    restaurantid: Any = None
    subject: Any = None


def _identity(failed: Failed) -> Headers:
    """Whose it is, as far as that can be read: operators search dead letters by it."""
    try:
        seen = msgspec.json.decode(failed.body, type=list[_Glimpse])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    if len(seen) != 1:
        return {}
    named = ((CHANGE_ID, seen[0].id), (RESTAURANT, seen[0].restaurantid), (SUBJECT, seen[0].subject))
    return {name: value[:200] for name, value in named if isinstance(value, str)}
