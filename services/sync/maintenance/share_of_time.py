"""Limits repeated work to a share of the time."""

import time
from collections.abc import Awaitable, Callable

_PAUSE_PER_SECOND_OF_WORK = 9


class ShareOfTime:
    """Runs work at most a tenth of the time: after each run it pauses nine times as long as the run took."""

    def __init__(self, work: Callable[[], Awaitable[object]], *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: a monotonic clock in seconds."""
        self._work = work
        self._clock = clock
        self._next_at = float("-inf")

    async def run(self) -> None:
        """Does the work once, unless a pause lasts. A pause also follows a run that raises an error."""
        began = self._clock()
        if began < self._next_at:
            return
        try:
            await self._work()
        finally:
            ended = self._clock()
            self._next_at = ended + _PAUSE_PER_SECOND_OF_WORK * (ended - began)
