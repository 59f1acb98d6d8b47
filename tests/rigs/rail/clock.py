"""A clock that only the test moves, as the wall clock and as the monotonic clock."""

import asyncio
from datetime import datetime, timedelta


class Clock:
    def __init__(self, start: datetime) -> None:
        self._start = start
        self._passed = timedelta()

    def move(self, **by: float) -> None:
        """Moves the clock by a `timedelta` with these fields."""
        self._passed += timedelta(**by)

    def now(self) -> datetime:
        return self._start + self._passed

    def monotonic(self) -> float:
        return self._passed.total_seconds()

    async def sleep(self, seconds: float) -> None:
        """Lets other tasks run once; no time passes."""
        await asyncio.sleep(0)
