"""Computes how many dead letters of a replay may be sent now, from its rate and its canaries. Does no I/O."""

from services.sync.dead_letters.replay_sql import Progress, Running

CANARIES = (1, 11)
"""The numbers of dead letters at the end of each canary step: one, then ten more. Each step waits for the outcomes of
the previous one."""


class Pace:
    """Limits the rate of a replay. A pause does not allow a burst afterwards."""

    def __init__(self, per_second: float, *, at: float) -> None:
        self._per_second = per_second
        self._next = at

    def take(self, requested: int, at: float) -> int:
        """Returns how many of `requested` may be sent at `at`, on the monotonic clock."""
        if at < self._next or requested <= 0:
            return 0
        self._next = max(self._next, at - 0.1)
        due = 1 + int((at - self._next) * self._per_second)
        taken = min(requested, due)
        self._next += taken / self._per_second
        return taken


def allowed(job: Running, progress: Progress) -> int:
    """Returns how many dead letters of the job may have been sent so far."""
    if job.canary and job.kind == "replay":
        for canaries in CANARIES:
            if progress.settled < min(canaries, job.total):
                return min(canaries, job.total)
    return job.total
