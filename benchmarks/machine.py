"""The machine under the benchmarks: whether it is at rest before a slice, and how much of it other programs took.

Two cores that somebody else uses too give figures that differ by a factor of two; a ratio of such slices says nothing.
"""

import time

import psutil
from msgspec import Struct

_AT_REST = 0.10
"""Share of all cores. What a slice leaves behind (segments, checkpoints, an append-only file) is more."""


class Meter(Struct):
    """CPU seconds since the machine's start: of everything, and of this process and what it has started."""

    busy: float
    own: float
    at: float

    @classmethod
    def read(cls) -> "Meter":
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.irq + times.softirq
        own = 0.0
        for process in (root := psutil.Process(), *root.children(recursive=True)):
            try:
                spent = process.cpu_times()
            except psutil.NoSuchProcess:
                continue  # ended between the list and the look: its parent has its seconds now
            own += spent.user + spent.system + spent.children_user + spent.children_system
        return cls(busy, own, time.monotonic())


def busy_share(since: Meter) -> float:
    """Of all cores, by everybody; 0 to 1."""
    now = Meter.read()
    return (now.busy - since.busy) / _seconds(since, now)


def others_share(since: Meter) -> float:
    """Of all cores, by programs that are not ours (the kernel's own threads count as others); 0 to 1."""
    now = Meter.read()
    return max(0.0, (now.busy - since.busy) - (now.own - since.own)) / _seconds(since, now)


def rest(within: float = 10.0) -> bool:
    """Waits until the machine is at rest for 0.3 seconds; False when it was not `within` that many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        before = Meter.read()
        time.sleep(0.3)
        if busy_share(before) <= _AT_REST:
            return True
    return False


def _seconds(since: Meter, now: Meter) -> float:
    return max(1e-6, (now.at - since.at) * (psutil.cpu_count() or 1))
