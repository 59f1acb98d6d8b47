"""Parses a dead message into dead letters for the table `dead_letters`. Pure. Parsing never raises: every message
becomes dead letters that PostgreSQL can store, with the exact bytes of the body.

One message is one dead letter. The exception is a message that the broker itself dead-lettered because of the delivery
limit: it can hold a whole batch, and each change of the batch becomes a dead letter.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct

from services.sync.failures.classification import UNKNOWN_PLACE, clip, fingerprint
from services.sync.failures.dead_letter_store import Attempt, NewDeadLetter
from services.sync.failures.retry_ladder import (
    ATTEMPTS,
    ERROR,
    FAILED_AT,
    PLACE,
    REASON,
    REPLAY,
    FailedChange,
    attempts_in,
    headers_for,
    single_change_body,
)
from shared.entities.contract import BrokenContract, Lane, PartialEvent, in_range, split_batch
from shared.messaging import topology
from shared.observability.tracing import trace_id_of

DELIVERY_LIMIT = "delivery_limit"
BROKER = "broker"
_DEATHS = "x-death"
_MAX_NAME_CHARS = 200
_MAX_ERROR_CHARS = 500
_MAX_HEADER_CHARS = 10_000
_MAX_HEADER_DEPTH = 4
_CANONICAL = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def parse_dead_letters(
    queue: str, lane: Lane | None, body: bytes, headers: Mapping[str, Any], received_at: datetime
) -> list[NewDeadLetter]:
    """Returns at least one dead letter. `lane`: the lane of the dead-letter queue; None for the queue of the mirror
    writer."""
    attempts = parse_attempts(headers, received_at)
    by_broker = attempts[-1].place == BROKER
    return [_dead_letter(queue, lane, part, headers, attempts) for part in (_parts(body) if by_broker else [body])]


def dead_letter_of(failed: FailedChange, lane: Lane) -> NewDeadLetter:
    """Returns the dead letter of a failed change, as the collector would read it from the dead-letter queue."""
    [dead_letter] = parse_dead_letters(
        topology.dead_queue(lane), lane, failed.body, headers_for(failed, lane), failed.at
    )
    return dead_letter


def parse_attempts(headers: Mapping[str, Any], received_at: datetime) -> tuple[Attempt, ...]:
    """Returns the known failures of a message, at least one. Our own publishes carry no `x-death`, so a message with
    that header was dead-lettered by the broker."""
    attempts = attempts_in(headers)
    reason = headers.get(REASON)
    if isinstance(reason, str) and not headers.get(_DEATHS):
        failed_at = _time(headers.get(FAILED_AT)) or received_at
        if not attempts or attempts[-1].at != failed_at:
            error, place = headers.get(ERROR), headers.get(PLACE)
            attempts.append(
                Attempt(
                    failed_at,
                    clip(reason, _MAX_NAME_CHARS),
                    clip(error, _MAX_ERROR_CHARS) if isinstance(error, str) else "",
                    clip(place, _MAX_NAME_CHARS) if isinstance(place, str) else UNKNOWN_PLACE,
                )
            )
        return tuple(attempts)
    at, text = received_at, "the broker dead-lettered the message"
    deaths = headers.get(_DEATHS)
    if isinstance(deaths, list) and deaths and isinstance(newest := deaths[0], Mapping):
        at = _time(newest.get("time")) or received_at
        text = f"the broker dead-lettered the message: {newest.get('reason')} in {newest.get('queue')}"
    return (*attempts, Attempt(at, DELIVERY_LIMIT, clip(text, _MAX_ERROR_CHARS), BROKER))


class _After(Struct):
    restaurant_id: Any = None


class _Data(Struct):
    after: _After | None = None


def _dead_letter(
    queue: str, lane: Lane | None, body: bytes, headers: Mapping[str, Any], attempts: tuple[Attempt, ...]
) -> NewDeadLetter:
    seen, last = _partial_event(body), attempts[-1]
    restaurant = _uuid(seen.restaurantid)
    entity, _, entity_id = seen.subject.partition("/") if isinstance(seen.subject, str) else ("", "", "")
    source = _name(seen.source)
    version = seen.entityversion
    replay = headers.get(REPLAY)
    return NewDeadLetter(
        digest=digest(body),
        queue=queue,
        lane=None if lane is None else lane.value,
        sinks=("mirror" if lane is None else "postgres",),
        restaurant_id=restaurant,
        change_id=_uuid(seen.id),
        entity=_name(entity),
        entity_id=_uuid(entity_id),
        version=version if type(version) is int and 0 <= version < 2**31 else None,
        type=_name(seen.type),
        source=source,
        terminal_id=source.removeprefix("terminal/") if source and source.startswith("terminal/") else None,
        trace_id=trace_id_of(seen.traceparent) if isinstance(seen.traceparent, str) else None,
        mixed=_names_another(seen.data, restaurant),
        reason=last.reason,
        error=last.error,
        place=last.place,
        fingerprint=fingerprint(last.reason, last.error, last.place),
        attempts=attempts,
        # The table has a column for the attempts.
        headers={clip(name, _MAX_NAME_CHARS): _plain(value) for name, value in headers.items() if name != ATTEMPTS},
        body=body,
        replay_of=replay if isinstance(replay, str) else None,
    )


def digest(body: bytes) -> bytes:
    """Returns the digest that identifies a dead letter. It is the same for both sinks, which read the same message.
    Spaces around a single event do not change it, because our own code dead-letters the same change without spaces
    (`single_change_body`)."""
    without_spaces = body.startswith(b"[{") and body.endswith(b"}]")
    parts = [body] if without_spaces else _parts(body)
    return hashlib.sha256(parts[0] if len(parts) == 1 else body).digest()


def _parts(body: bytes) -> list[bytes]:
    try:
        return [single_change_body(event) for event in split_batch(body)] or [body]
    except BrokenContract:
        return [body]


def _partial_event(body: bytes) -> PartialEvent:
    try:
        seen = msgspec.json.decode(body, type=list[PartialEvent])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return PartialEvent()
    return seen[0] if len(seen) == 1 else PartialEvent()


def _names_another(data: msgspec.Raw, restaurant: str | None) -> bool:
    try:
        after = msgspec.json.decode(data, type=_Data).after
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The restaurant of unreadable data is unknown. Treat it as another restaurant, unless the data is empty.
        return len(data) > 0
    return after is not None and after.restaurant_id is not None and _uuid(after.restaurant_id) != restaurant


def _uuid(value: Any) -> str | None:
    """Returns the UUID in canonical form, or None if the value is not a UUID."""
    if not isinstance(value, str) or len(value) > 45:
        return None
    if _CANONICAL.fullmatch(value):
        return value
    try:
        return str(UUID(value))
    except ValueError:
        return None


def _name(value: Any) -> str | None:
    return clip(value, _MAX_NAME_CHARS) if isinstance(value, str) and value else None


def _time(value: Any) -> datetime | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime) or not in_range(value):
        return None
    return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def _plain(value: Any, depth: int = 0) -> Any:
    """Returns the value with only types that JSON has; other types become text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return clip(value, _MAX_HEADER_CHARS)
    if isinstance(value, bytes | bytearray):
        return clip(bytes(value).decode(errors="replace"), _MAX_HEADER_CHARS)
    if isinstance(value, datetime):
        return value.isoformat()
    if depth < _MAX_HEADER_DEPTH and isinstance(value, Mapping):
        return {clip(str(name), _MAX_NAME_CHARS): _plain(part, depth + 1) for name, part in value.items()}
    if depth < _MAX_HEADER_DEPTH and isinstance(value, list | tuple):
        return [_plain(part, depth + 1) for part in value]
    return clip(str(value), _MAX_HEADER_CHARS)
