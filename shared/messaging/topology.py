"""Every exchange, queue and binding, as plain data. Only `ticketrail migrate` declares them; services check at start.

    ticketrail.changes (direct) ── lane ──► sync.postgres.<lane>.v1 (quorum) ─┬─ attempts ─► .retry.<ms> ─ TTL ─► back to its lane
                     │                                                        └─ poison, exhausted ─► sync.postgres.<lane>.dead.v1
                     ├── every lane ──► changes.log.v1 (stream)               sync.mirror.dead.v1
                     └── all but critical ──► changes.reference.log.v1 (stream)

Retries come back through the default exchange to their lane's queue alone: through `ticketrail.changes` the stream
would get them twice. Dead-lettering is at least once, for which RabbitMQ wants the strategy, `reject-publish` and an
exchange together: with one missing it silently is at most once.

The reference log is the log without orders and payments: who only wants menus, tables or customers does not read the
bulk of all changes for them.
"""

from dataclasses import dataclass, field
from typing import Any

from shared.entities.contract import Lane
from shared.settings import Settings

CHANGES = "ticketrail.changes"
LOG = "changes.log.v1"
REFERENCE_LOG = "changes.reference.log.v1"
MIRROR_DEAD = "sync.mirror.dead.v1"
DELIVERY_LIMIT = 100
DEAD_DELIVERY_LIMIT = 1_000_000_000
"""Of the dead queues, beyond which there is nothing: without one RabbitMQ 4 drops a letter at its 21st delivery."""
ATTEMPT = "ticketrail-attempt"
"""Header with the number of attempts so far. Ours: `x-death` is ignored on re-publish from RabbitMQ 4.0.1 on."""


def lane_queue(lane: Lane) -> str:
    return f"sync.postgres.{lane}.v1"


def dead_queue(lane: Lane) -> str:
    return f"sync.postgres.{lane}.dead.v1"


def retry_queue(lane: Lane, delay_ms: int) -> str:
    """The delay is part of the name: with other steps there are other queues, never a mismatch of arguments."""
    return f"sync.postgres.{lane}.retry.{delay_ms}ms.v1"


def bound_queues() -> list[str]:
    """Where a change goes, whatever its lane."""
    return [*(lane_queue(lane) for lane in Lane), REFERENCE_LOG, LOG]


@dataclass(frozen=True)
class QueueSpec:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    bound_to: tuple[Lane, ...] = ()
    older: dict[str, Any] | None = None
    """Arguments of an earlier version of ours: a queue that stands with them goes on as it is."""


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
    """Each with the lane whose letters it holds; those of the mirror writer have none."""
    return [*((dead_queue(lane), lane) for lane in Lane), (MIRROR_DEAD, None)]


def logs(settings: Settings) -> list[QueueSpec]:
    """The streams, the log itself last: where it stands the others do."""
    arguments = {
        "x-queue-type": "stream",
        "x-max-age": settings.change_log_max_age,
        "x-max-length-bytes": settings.change_log_max_bytes,
        "x-stream-max-segment-size-bytes": settings.change_log_segment_bytes,
    }
    return [QueueSpec(REFERENCE_LOG, arguments, (Lane.NORMAL, Lane.BACKGROUND)), QueueSpec(LOG, arguments, tuple(Lane))]


def queues(settings: Settings) -> list[QueueSpec]:
    """All queues but the logs, targets of dead-lettering first: at-least-once dead-lettering to a missing queue jams."""
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
