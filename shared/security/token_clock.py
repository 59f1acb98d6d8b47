"""The clock by which tokens begin and expire.

The clock of one machine may be wrong by hours, also the clock of PostgreSQL's machine. So there are two: the clock of
this host, and PostgreSQL's, which every service reads with the revocations. A token is refused for its time only if
both clocks say so. Then no single wrong clock refuses people who have signed in. Tokens are issued by PostgreSQL's
clock, so that the tokens of a host whose clock is wrong are valid everywhere. The price: where one of the two clocks is
behind, a token is accepted longer than it should be; its session can still be ended.
"""

import time

LEEWAY_SECONDS = 30.0
"""Clocks of hosts that are synchronised differ by less."""


class TokenClock:
    def __init__(self) -> None:
        self._ahead: float | None = None
        """Unix time of PostgreSQL minus the monotonic clock of this process, which no correction moves."""

    @property
    def compared(self) -> bool:
        """True if PostgreSQL's clock is known. It stays known while PostgreSQL is unavailable."""
        return self._ahead is not None

    def compare(self, at: float) -> None:
        """Notes that PostgreSQL's clock shows `at` (Unix seconds)."""
        self._ahead = at - time.monotonic()

    def earliest(self) -> float:
        """Returns the earlier of the two clocks in Unix seconds. Expiry is compared with it."""
        here = time.time()
        return here if self._ahead is None else min(here, self._ahead + time.monotonic())

    def latest(self) -> float:
        """Returns the later of the two clocks. The beginning of a token is compared with it."""
        here = time.time()
        return here if self._ahead is None else max(here, self._ahead + time.monotonic())

    def issuing(self) -> float:
        """Returns the time for new tokens: PostgreSQL's clock, or this host's if that is not known."""
        return time.time() if self._ahead is None else self._ahead + time.monotonic()
