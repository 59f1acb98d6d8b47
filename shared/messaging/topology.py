"""Every exchange, queue and binding, as plain data. Only `ticketrail migrate` declares them; services check them when they
start.

    ticketrail.changes (direct) ── lane ──► sync.postgres.<lane>.v1 (quorum) ─┬─ attempts ─► .retry.<ms> ─ TTL ─► back to its lane
                     │                                                        └─ poison, exhausted ─► sync.postgres.<lane>.dead.v1
                     ├── every lane ──► changes.log.v1 (stream)               sync.mirror.dead.v1
                     └── all but critical ──► changes.reference.log.v1 (stream)

Retries return through the default exchange to the queue of their lane only: through `ticketrail.changes` the stream would
receive them twice. Dead-lettering is at least once. For that RabbitMQ needs the strategy, `reject-publish` and an exchange
together; without one of them it is silently at most once.

The reference log is the change log without orders and payments, for readers that only need menus, tables or customers:
they need not read the bulk of all changes.
"""

from dataclasses import dataclass, field
from typing import Any

from shared.entities.contract import Change, Lane
from shared.settings import Settings

CHANGES = "ticketrail.changes"
LOG = "changes.log.v1"
REFERENCE_LOG = "changes.reference.log.v1"
MIRROR_DEAD = "sync.mirror.dead.v1"
DELIVERY_LIMIT = 100
DEAD_DELIVERY_LIMIT = 1_000_000_000
"""Delivery limit of the dead-letter queues, which dead-letter to nothing: by default RabbitMQ 4 would drop a message at its
21st delivery."""
ATTEMPT = "ticketrail-attempt"
"""Our header with the number of attempts so far: from 4.0.1 on, RabbitMQ ignores `x-death` when a message is published
again."""


def lane_of(change: Change) -> Lane:
    """The lane, and so the queue, of a change: the one with the highest priority that the change reaches. The priority
    is that of the entity (shared/entities) unless the draft named a lane."""
    return next((lane for lane in Lane if lane.priority <= change.priority), Lane.BACKGROUND)


def lane_queue(lane: Lane) -> str:
    return f"sync.postgres.{lane}.v1"


def dead_queue(lane: Lane) -> str:
    return f"sync.postgres.{lane}.dead.v1"


def retry_queue(lane: Lane, delay_ms: int) -> str:
    """The name contains the delay: other steps need other queues, so that arguments never conflict."""
    return f"sync.postgres.{lane}.retry.{delay_ms}ms.v1"


def bound_queues() -> list[str]:
    """The queues that receive changes from the exchange, over all lanes."""
    return [*(lane_queue(lane) for lane in Lane), REFERENCE_LOG, LOG]


@dataclass(frozen=True)
class QueueSpec:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    bound_to: tuple[Lane, ...] = ()
    older: dict[str, Any] | None = None
    """The arguments of an earlier release: an existing queue with these is used as it is."""


def _quorum(**arguments: Any) -> dict[str, Any]:
    return {"x-queue-type": "quorum", **{f"x-{name.replace('_', '-')}": value for name, value in arguments.items()}}


def _dead_lettering(target: str) -> dict[str, Any]:
    return {
        "dead_letter_exchange": "",
        "dead_letter_routing_key": target,
        "dead_letter_strategy": "at-least-once",
        "overflow": "reject-publish",
    }


def _dead(name: str) -> QueueSpec:
    return QueueSpec(name, _quorum(delivery_limit=DEAD_DELIVERY_LIMIT), older=_quorum())


def dead_queues() -> list[tuple[str, Lane | None]]:
    """Returns (queue, its lane) of each dead-letter queue; the lane is None for that of the mirror writer."""
    return [*((dead_queue(lane), lane) for lane in Lane), (MIRROR_DEAD, None)]


def logs(settings: Settings) -> list[QueueSpec]:
    """The streams. The change log is last, so that the others exist when it does."""
    arguments = {
        "x-queue-type": "stream",
        "x-max-age": settings.change_log_max_age,
        "x-max-length-bytes": settings.change_log_max_bytes,
        "x-stream-max-segment-size-bytes": settings.change_log_segment_bytes,
    }
    return [QueueSpec(REFERENCE_LOG, arguments, (Lane.NORMAL, Lane.BACKGROUND)), QueueSpec(LOG, arguments, tuple(Lane))]


def queues(settings: Settings) -> list[QueueSpec]:
    """All queues without the logs. Targets of dead-lettering come first: at-least-once dead-lettering to a missing queue
    blocks its source."""
    found = [_dead(MIRROR_DEAD)]
    for lane in Lane:
        found.append(_dead(dead_queue(lane)))
        found.append(
            QueueSpec(
                lane_queue(lane),
                _quorum(delivery_limit=DELIVERY_LIMIT, **_dead_lettering(dead_queue(lane))),
                (lane,),
            )
        )
        found.extend(
            QueueSpec(retry_queue(lane, step), _quorum(message_ttl=step, **_dead_lettering(lane_queue(lane))))
            for step in settings.retry_steps_ms
        )
    return found
