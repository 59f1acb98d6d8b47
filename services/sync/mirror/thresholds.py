"""Watching how much is on its way to PostgreSQL, restaurant by restaurant: a warning in the log and a metric when more
is pending, or has failed, than the settings allow, and a line when it is over.

Only looks, at the mirror alone, every few seconds. While the mirror is away it knows nothing and says so in its metric
(NaN). It may be stopped at any time.
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
    state: str
    count: int
    threshold: int


def warnings(settings: Settings, pending: int, failed: int) -> list[Above]:
    """What is above its threshold."""
    seen = (("pending", pending, settings.pending_warning_changes), ("failed", failed, settings.failed_warning_changes))
    return [Above(state, count, threshold) for state, count, threshold in seen if count > threshold]


class Thresholds:
    def __init__(self, settings: Settings, mirror: Mirror) -> None:
        self._settings = settings
        self._mirror = mirror
        self.loop = BackgroundLoop("thresholds", self._run)
        self._told: set[tuple[str, str]] = set()
        self.pending = self.failed = math.nan
        """Over all restaurants."""
        self.over: dict[str, float] = {"pending": math.nan, "failed": math.nan}
        """How many restaurants are above each threshold."""

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except (MirrorUnavailable, MirrorInDoubt) as error:
                self.pending = self.failed = math.nan
                self.over = {"pending": math.nan, "failed": math.nan}
                log.debug("thresholds_wait", error=str(error) or type(error).__name__)
            self.loop.turned()
            await asyncio.sleep(self._settings.threshold_interval_seconds)

    async def look(self) -> None:
        """Raises MirrorUnavailable, MirrorInDoubt."""
        pending = failed = 0
        above: dict[tuple[str, str], Above] = {}
        for restaurant in await self._mirror.restaurant_ids():
            counts = await asyncio.gather(*(self._mirror.counts(restaurant, name) for name in registry.ENTITIES))
            waits, broken = sum(one for one, _ in counts), sum(one for _, one in counts)
            pending, failed = pending + waits, failed + broken
            above |= {(restaurant, one.state): one for one in warnings(self._settings, waits, broken)}
        for restaurant, state in sorted(set(above) - self._told):
            found = above[restaurant, state]
            log.warning(
                "sync_above_threshold",
                restaurant_id=restaurant,
                state=state,
                count=found.count,
                threshold=found.threshold,
            )
        for restaurant, state in sorted(self._told - set(above)):
            log.info("sync_below_threshold", restaurant_id=restaurant, state=state)
        self._told = set(above)
        self.pending, self.failed = pending, failed
        self.over = {name: float(sum(state == name for _, state in above)) for name in ("pending", "failed")}
