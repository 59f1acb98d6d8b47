"""Watches the numbers of pending and failed changes in each restaurant. If a number exceeds its setting, `Thresholds`
logs a warning and sets a metric; when the number is below the setting again, it logs that too.

It only reads the mirror, every few seconds. While the mirror is unavailable, its metrics are NaN. It may be stopped at
any time.
"""

import asyncio
import math

import structlog
from msgspec import Struct

from shared.entities import registry
from shared.lifecycle import BackgroundLoop
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.settings import Settings

log = structlog.get_logger(__name__)


class Above(Struct, frozen=True):
    """A number that is above its threshold."""

    state: str
    count: int
    threshold: int


def warnings(settings: Settings, pending: int, failed: int) -> list[Above]:
    """Returns the numbers that are above their threshold."""
    seen = (("pending", pending, settings.pending_warning_changes), ("failed", failed, settings.failed_warning_changes))
    return [Above(state, count, threshold) for state, count, threshold in seen if count > threshold]


class Thresholds:
    def __init__(self, settings: Settings, mirror: Mirror) -> None:
        self._settings = settings
        self._mirror = mirror
        self.loop = BackgroundLoop("thresholds", self._run)
        self._reported: set[tuple[str, str]] = set()
        self.pending = self.failed = math.nan
        """The numbers of pending and failed changes in all restaurants; NaN while unknown."""
        self.over: dict[str, float] = {"pending": math.nan, "failed": math.nan}
        """The number of restaurants above each threshold; NaN while unknown."""

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        while True:
            try:
                await self.count()
            except (MirrorUnavailable, MirrorInDoubt) as error:
                self.pending = self.failed = math.nan
                self.over = {"pending": math.nan, "failed": math.nan}
                log.debug("thresholds_wait", error=str(error) or type(error).__name__)
            self.loop.turned()
            await asyncio.sleep(self._settings.threshold_interval_seconds)

    async def count(self) -> None:
        """Counts all restaurants once. Raises MirrorUnavailable, MirrorInDoubt."""
        pending = failed = 0
        above: dict[tuple[str, str], Above] = {}
        for restaurant in await self._mirror.restaurant_ids():
            counts = await asyncio.gather(*(self._mirror.counts(restaurant, name) for name in registry.ENTITIES))
            restaurant_pending, restaurant_failed = (sum(numbers) for numbers in zip(*counts, strict=True))
            pending, failed = pending + restaurant_pending, failed + restaurant_failed
            above |= {
                (restaurant, warning.state): warning
                for warning in warnings(self._settings, restaurant_pending, restaurant_failed)
            }
        for restaurant, state in sorted(set(above) - self._reported):
            found = above[restaurant, state]
            log.warning(
                "sync_above_threshold",
                restaurant_id=restaurant,
                state=state,
                count=found.count,
                threshold=found.threshold,
            )
        for restaurant, state in sorted(self._reported - set(above)):
            log.info("sync_below_threshold", restaurant_id=restaurant, state=state)
        self._reported = set(above)
        self.pending, self.failed = pending, failed
        self.over = {name: float(sum(state == name for _, state in above)) for name in ("pending", "failed")}
