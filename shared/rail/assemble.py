"""Builds the parts of the rail from the settings, in the same way for every process that commits changes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from msgspec import Struct

from shared.messaging.publisher import Publisher
from shared.messaging.topology import CHANGES, bound_queues
from shared.mirror.connection import MirrorInDoubt, MirrorMisconfigured, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.observability.metrics import Metrics, RailMetrics
from shared.observability.tracing import Tracer
from shared.rail.commit import Rail
from shared.rail.journal import Journal
from shared.rail.record import Recorder
from shared.settings import Settings

log = structlog.get_logger(__name__)

_MAX_CLOCK_SKEW_SECONDS = 5.0
_CLOCK_TIMEOUT_SECONDS = 0.5
_WAIT_SHARE = 2 / 3  # with the default timeout, a change waits at most one second for its publish
_SECOND_CONNECT_SECONDS = 5.0


class RailParts(Struct, frozen=True):
    """The rail, and the parts through which it commits."""

    mirror: Mirror
    publisher: Publisher
    recorder: Recorder
    rail: Rail
    second_publisher: Publisher | None = None
    """Publishes what would delay other changes, in a process without a journal."""

    def watch(self, metrics: Metrics) -> None:
        metrics.watch("ticketrail_broker_connected", lambda: self.publisher.connected)
        metrics.watch("ticketrail_mirror_available", lambda: self.mirror.available)

    async def check_mirror(self) -> None:
        """Checks the mirror. Raises MirrorMisconfigured for a server that cannot be a mirror. Only logs that the mirror
        is unavailable."""
        try:
            await self.mirror.check()
        except MirrorMisconfigured:
            raise
        except (MirrorUnavailable, MirrorInDoubt) as error:
            log.warning("starting_without_mirror", error=str(error) or type(error).__name__)

    async def clock_details(self) -> dict[str, Any]:
        """Returns the skew between the clocks of Redis and of this host for the health endpoint, with a warning if it
        is more than five seconds. No decision compares the two, but orders get the times and the business day of this
        host. Returns nothing if Redis does not answer within half a second."""
        try:
            async with asyncio.timeout(_CLOCK_TIMEOUT_SECONDS):
                skew = await self.mirror.clock_skew_seconds()
        except (MirrorUnavailable, MirrorInDoubt, TimeoutError):
            return {}  # the health endpoint shows the mirror itself
        details: dict[str, Any] = {"clock_skew_seconds": round(skew, 3)}
        if abs(skew) > _MAX_CLOCK_SKEW_SECONDS:
            side = "behind" if skew > 0 else "ahead of"
            details["warnings"] = [
                f"the clock of this host is {abs(skew):.0f} s {side} the clock of Redis: set both by NTP"
            ]
        return details

    async def close(self) -> None:
        """Waits for the commits that are under way, then closes all connections."""
        await self.rail.drain()
        await self.publisher.stop()
        if self.second_publisher is not None:
            await self.second_publisher.stop()
        await self.mirror.close()


def assemble_rail(
    settings: Settings,
    *,
    mirror: Mirror | None = None,
    publisher: Publisher | None = None,
    journal: Journal | None = None,
    publish_interval_ms: float = 0.0,
    tracer: Tracer | None = None,
    metrics: RailMetrics | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> RailParts:
    """Returns the parts. Nothing connects before `publisher.start` and the first call of the mirror.

    `mirror`, `publisher`: connections to use instead of new ones. `journal`: takes changes while the broker cannot.
    Without a journal, a change that cannot be recorded is refused, and a claim that cannot be finished stays in the
    mirror for the next round. Changes that would delay others are published over a second connection, which is made
    when it is needed (not if `publisher` is given). `publish_interval_ms`: the minimum time between two publishes of
    one lane, so that changes share a message.
    """
    second = publisher_of(settings) if journal is None and publisher is None else None
    mirror, publisher = mirror or mirror_of(settings), publisher or publisher_of(settings)
    recorder = Recorder(
        publisher,
        journal,
        max_publishes=settings.publish_concurrency,
        max_wait_seconds=settings.publish_timeout_seconds * _WAIT_SHARE,
        publish_interval_ms=publish_interval_ms,
        batch_max_changes=settings.publish_max_changes,
        second=(
            Recorder(second, None, max_publishes=1, connect_seconds=_SECOND_CONNECT_SECONDS, metrics=metrics)
            if second
            else None
        ),
        metrics=metrics,
    )
    rail = Rail(
        mirror,
        recorder,
        journal,
        claim_timeout_seconds=settings.claim_timeout_seconds,
        reveal_timeout_seconds=settings.reveal_timeout_seconds,
        tracer=tracer,
        metrics=metrics,
        clock=clock,
        sleep=sleep,
    )
    return RailParts(mirror, publisher, recorder, rail, second)


def mirror_of(settings: Settings) -> Mirror:
    """Raises SettingsError if the settings name no mirror."""
    settings.require("redis_url")
    return Mirror(
        settings.redis_url, timeout=settings.redis_timeout_seconds, stale_seconds=settings.claim_stale_seconds
    )


def publisher_of(settings: Settings) -> Publisher:
    """Returns a publisher to `ticketrail.changes`. It counts as connected only if every queue that is bound to this
    exchange exists."""
    return Publisher(settings.rabbitmq_url, CHANGES, queues=bound_queues(), timeout=settings.publish_timeout_seconds)
