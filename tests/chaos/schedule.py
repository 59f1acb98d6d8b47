"""The faults of a run and their times. Pure: the same seed and length give the same schedule."""

import random
from collections.abc import Container
from enum import StrEnum

from msgspec import Struct


class Kind(StrEnum):
    KILL = "kill"
    FREEZE = "freeze"
    SLOW = "slow"
    NARROW = "4 Mbit/s"
    STALL = "stall"
    LOSE = "half-open"
    WIPE = "wipe"
    ROLL_BACK = "roll back"
    DISK_FULL = "disk full"
    """The disk of the services is full, and the broker refuses connections."""
    HOST_FULL = "host disk full"
    """The disk of the services is full: journals, logs and traces."""
    OLD_RELEASE = "previous release of"
    MIRROR_FAILOVER = "failover of the mirror,"
    """The replica gets no writes for some seconds. Then the primary is killed and the replica promoted."""
    MIRROR_FAILBACK = "failover and failback of the mirror,"
    """The replica is promoted without the last writes. At the end the first server, which never stopped, is promoted
    the same way."""
    DATABASE_FAILOVER = "failover of the database,"
    """The standby gets no commits for some seconds. Then the primary is killed and the standby promoted."""
    POWER_CUT = "power cut of"
    """All servers are killed. The streams and the mirror lose what they wrote since the fault began; quorum queues and
    PostgreSQL flush before they confirm, so they lose nothing."""
    CLOCK = "wrong clock of"
    """The clock of a service jumps ahead or back by hours while it runs, and returns at the end."""


SERVICES = ("orders", "second-orders", "worker", "notifier", "sync")
WITH_CLOCK = ("orders", "second-orders", "worker")
"""The services whose clock a fault moves."""
SERVERS = ("postgres", "redis", "rabbitmq")

# kind -> (targets, (shortest, longest) in seconds, weight)
_KINDS: dict[Kind, tuple[tuple[str, ...], tuple[float, float], int]] = {
    Kind.KILL: ((*SERVICES, *SERVERS), (0.5, 5.0), 6),
    Kind.FREEZE: ((*SERVICES, *SERVERS), (1.0, 8.0), 5),
    Kind.SLOW: (SERVERS, (2.0, 8.0), 2),
    Kind.NARROW: (SERVERS, (3.0, 10.0), 2),
    Kind.STALL: (SERVERS, (2.0, 10.0), 2),
    Kind.LOSE: (SERVERS, (2.0, 8.0), 2),
    Kind.WIPE: (("redis",), (0.0, 0.0), 2),
    Kind.ROLL_BACK: (("redis",), (0.5, 2.0), 1),
    Kind.DISK_FULL: (("rabbitmq",), (2.0, 5.0), 1),
    Kind.HOST_FULL: (("host",), (2.0, 8.0), 1),
    Kind.OLD_RELEASE: (SERVICES, (4.0, 12.0), 2),
    Kind.CLOCK: (WITH_CLOCK, (4.0, 15.0), 2),
    Kind.MIRROR_FAILOVER: (("redis",), (0.5, 3.0), 1),
    Kind.MIRROR_FAILBACK: (("redis",), (3.0, 12.0), 1),
    Kind.DATABASE_FAILOVER: (("postgres",), (0.5, 5.0), 1),
    Kind.POWER_CUT: (("machine",), (0.5, 5.0), 1),
}
RARE = frozenset({Kind.MIRROR_FAILOVER, Kind.MIRROR_FAILBACK, Kind.DATABASE_FAILOVER, Kind.POWER_CUT})
"""The faults that a short run leaves out, because they take long or need servers of their own."""
_HOURS = (-3.0, -1.0, 1.0, 3.0)
_LONG_STALL_SECONDS = 70.0
_LONG_RUN_SECONDS = 170.0
_PAUSE_SECONDS = (0.5, 3.0)
_OVERLAP_PROBABILITY = 0.2
_MIN_GAP_SECONDS = 0.5
"""Seconds between two faults of one target."""


class Fault(Struct, frozen=True):
    starts_at: float
    """Seconds since the run began."""
    kind: Kind
    target: str
    seconds: float
    hours: float = 0.0
    """How far a wrong clock is ahead; negative if it is behind."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The broken part: `target`, or all servers of the machine."""
        return SERVERS if self.target == "machine" else (self.target,)

    @property
    def ends_at(self) -> float:
        return self.starts_at + self.seconds

    def __str__(self) -> str:
        lasts = f" for {self.seconds:.1f} s" if self.seconds else ""
        by = f" by {self.hours:+.0f} h" if self.hours else ""
        return f"{self.starts_at:6.1f} s  {self.kind} {self.target}{by}{lasts}"


def schedule(seed: int, length: float, *, without: Container[Kind] = ()) -> list[Fault]:
    """Returns faults of all kinds but `without` that all end within `length` seconds. Faults of different targets may
    overlap; faults of one target never do. In a run of three minutes or more, one connection stalls for over a
    minute."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    if length >= _LONG_RUN_SECONDS:
        starts_at = round(chance.uniform(5.0, length - _LONG_STALL_SECONDS - 10.0), 2)
        faults.append(Fault(starts_at, Kind.STALL, chance.choice(SERVERS), _LONG_STALL_SECONDS))
    at = chance.uniform(1.0, 3.0)
    kinds = [kind for kind in _KINDS if kind not in without]
    weights = [_KINDS[kind][2] for kind in kinds]
    while True:
        kind = chance.choices(kinds, weights)[0]
        targets, (shortest, longest), _ = _KINDS[kind]
        hours = chance.choice(_HOURS) if kind is Kind.CLOCK else 0.0
        fault = Fault(round(at, 2), kind, chance.choice(targets), round(chance.uniform(shortest, longest), 2), hours)
        if fault.starts_at > length:
            return sorted(faults, key=lambda one: one.starts_at)
        same_target = [one for one in faults if {*one.targets} & {*fault.targets}]
        too_close = any(
            one.starts_at < fault.ends_at + _MIN_GAP_SECONDS and fault.starts_at < one.ends_at + _MIN_GAP_SECONDS
            for one in same_target
        )
        if fault.ends_at > length or too_close:
            at += _MIN_GAP_SECONDS
            continue
        faults.append(fault)
        pause = chance.uniform(*_PAUSE_SECONDS)
        at = fault.starts_at + pause if chance.random() < _OVERLAP_PROBABILITY else fault.ends_at + pause
