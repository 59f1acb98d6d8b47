"""Every exchange, queue and binding, as plain data. Only `ticketrail migrate` declares them; services check them when they
start.

    ticketrail.changes (direct) ── lane ──► sync.postgres.<lane>.v1 (quorum) ─┬─ attempts ─► .retry.<ms> ─ TTL ─► back to its lane
                     │                                                        └─ poison, exhausted ─► sync.postgres.<lane>.dead.v1
                     ├── every lane ──► changes.log.v1 (stream)               sync.mirror.dead.v1
                     └── all but critical ──► changes.reference.log.v1 (stream)

Retries return to the queue of their lane through the default exchange. Through `ticketrail.changes` the stream would receive
them twice. Dead-lettering is at least once. RabbitMQ guarantees that only with three arguments together: the dead-letter
strategy, `reject-publish` and an exchange. If one is missing, dead-lettering is silently at most once.

The reference log is the change log without orders and payments. Readers that need only menus, tables or customers read this
log, because orders are the bulk of all changes.
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
"""The delivery limit of the dead-letter queues. They have no dead-letter target, and with its default limit RabbitMQ 4
would drop a message at its 21st delivery."""
ATTEMPT = "ticketrail-attempt"
"""Our header with the number of attempts so far. From 4.0.1 on, RabbitMQ ignores `x-death` when a message is published
again."""


def lane_queue(lane: Lane) -> str:
    return f"sync.postgres.{lane}.v1"


def dead_queue(lane: Lane) -> str:
    return f"sync.postgres.{lane}.dead.v1"


def retry_queue(lane: Lane, delay_ms: int) -> str:
    """Returns the name of a retry queue. It contains the delay, because a queue keeps its arguments: another delay
    needs another queue."""
    return f"sync.postgres.{lane}.retry.{delay_ms}ms.v1"


def retry_delays_ms(settings: Settings) -> list[int]:
    """Returns each delay of the retry schedule once. Several steps with one delay share its queue."""
    return list(dict.fromkeys(settings.retry_steps_ms))


def bound_queues() -> list[str]:
    """Returns the queues that receive changes from the exchange, for all lanes."""
    return [*(lane_queue(lane) for lane in Lane), REFERENCE_LOG, LOG]


@dataclass(frozen=True)
class QueueSpec:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    bound_to: tuple[Lane, ...] = ()
    older: dict[str, Any] | None = None
    """The arguments of an earlier release. A queue that exists with these arguments is used as it is."""


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
    """Returns (queue, lane) of each dead-letter queue. The lane is None for the queue of the mirror writer."""
    return [*((dead_queue(lane), lane) for lane in Lane), (MIRROR_DEAD, None)]


def logs(settings: Settings) -> list[QueueSpec]:
    """Returns the streams. The change log is the last one, so that the others exist when it exists."""
    arguments = {
        "x-queue-type": "stream",
        "x-max-age": settings.change_log_max_age,
        "x-max-length-bytes": settings.change_log_max_bytes,
        "x-stream-max-segment-size-bytes": settings.change_log_segment_bytes,
    }
    return [QueueSpec(REFERENCE_LOG, arguments, (Lane.NORMAL, Lane.BACKGROUND)), QueueSpec(LOG, arguments, tuple(Lane))]


def queues(settings: Settings) -> list[QueueSpec]:
    """Returns all queues without the logs. Targets of dead-lettering come first, because at-least-once dead-lettering
    to a missing queue blocks its source."""
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
            for step in retry_delays_ms(settings)
        )
    return found


@dataclass(frozen=True)
class Permissions:
    """The permissions of a user of RabbitMQ, as regular expressions of names. No service may declare or delete
    anything."""

    write: str
    read: str
    configure: str = "^$"


# A reader of a log publishes marks to it through the default exchange, whose name for permissions is `amq.default`.
_MARKS = r"amq\.default"
_LOGS = r"changes\..*log\.v1"
PERMISSIONS = {
    "orders": Permissions(write=rf"^(ticketrail\.changes|{_MARKS})$", read=rf"^{_LOGS}$"),
    "sync-worker": Permissions(write=rf"^(ticketrail\.changes|{_MARKS})$", read=rf"^({_LOGS}|sync\..*)$"),
    "sync-api": Permissions(write=rf"^(ticketrail\.changes|{_MARKS})$", read=rf"^{_LOGS}$"),
    "notifier": Permissions(write=rf"^{_MARKS}$", read=rf"^{_LOGS}$"),
}
"""Service -> the permissions of its user, which `ticketrail migrate` creates."""
