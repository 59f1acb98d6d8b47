"""The notifier, wired: the one place that sees all its parts.

Starts while RabbitMQ is away and waits for it, not ready; refuses to start on a broker that answers and lacks the log.
Stops in this order: every stream ends (the server waits for open responses), the follower lets go of the log.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from litestar import Litestar
from litestar.di import Provide
from msgspec import Struct

from services.notifier.follower import LogFollower
from services.notifier.hub import Hub
from services.notifier.transports import API, TRANSPORTS
from services.notifier.window import Window
from shared.http.api_docs import pages
from shared.http.authorization import ResponseHeaders, authorization, cors
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.limits import Limits
from shared.http.server import EXCEPTION_HANDLERS, Call, health, metrics_route, options, stop_event
from shared.lifecycle import freeze_memory
from shared.messaging import declare
from shared.observability.logs import configure_logging
from shared.observability.metrics import HttpMetrics, Metrics, PushMetrics
from shared.observability.tracing import Tracer
from shared.rail.instance import number_of_traces
from shared.security.tokens import Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)


class NotifierParts(Struct, frozen=True):
    settings: Settings
    hub: Hub
    follower: LogFollower
    tracer: Tracer
    metrics: Metrics


def assemble(settings: Settings) -> NotifierParts:
    window = Window(
        seconds=settings.replay_window_seconds,
        changes=settings.replay_window_changes,
        size=settings.replay_window_bytes,
    )
    hub = Hub(window, buffer_events=settings.client_buffer_events, buffer_bytes=settings.client_buffer_bytes)
    tracer = Tracer("notifier", settings)
    metrics = Metrics()
    parts = NotifierParts(settings, hub, LogFollower(settings, hub, tracer, PushMetrics(metrics)), tracer, metrics)
    metrics.watch("ticketrail_subscribers", "Open event streams", lambda: len(hub))
    metrics.watch("ticketrail_window_changes", "Changes that can be replayed", lambda: len(hub.window))
    metrics.watch("ticketrail_slow_subscribers", "Let go because they did not read, since the start", lambda: hub.slow)
    metrics.watch("ticketrail_caught_up", "1 while the log is read to its end", lambda: parts.follower.caught_up)
    metrics.watch(
        "ticketrail_heartbeat_age_seconds", "Since the last heartbeat was sent", lambda: parts.follower.heartbeat_age
    )
    return parts


async def start(parts: NotifierParts) -> None:
    """Raises TopologyError when the broker answers and has no log."""
    await declare.check_log_at_start(parts.settings)
    parts.follower.start()


async def stop(parts: NotifierParts) -> None:
    parts.hub.close()
    await parts.follower.stop()
    parts.tracer.close()


async def readiness(parts: NotifierParts) -> tuple[bool, dict[str, Any]]:
    return parts.follower.readiness()


async def _close_on(stopping: asyncio.Event, hub: Hub) -> None:
    await stopping.wait()
    log.info("stopping", subscribers=len(hub))
    hub.close()


def create(settings: Settings | None = None) -> ResponseHeaders:
    settings = settings or Settings.load()
    configure_logging("notifier", settings.log_level)
    settings, lease = number_of_traces(settings, "notifier")
    parts = assemble(settings)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        closing = asyncio.create_task(_close_on(stop_event(), parts.hub), name="close-on-stop")
        try:
            await start(parts)
            freeze_memory(collect_rarely=False)
            log.info("started", instance=settings.instance, port=settings.notifier_port)
            yield
        finally:
            closing.cancel()
            await stop(parts)
            lease.release()
            log.info("stopped")

    app = Litestar(
        route_handlers=[
            *options(TRANSPORTS),
            *TRANSPORTS,
            *health(lambda: readiness(parts)),
            metrics_route(parts.metrics),
            *pages(API),
        ],
        dependencies={
            "hub": Provide(lambda: parts.hub, sync_to_thread=False),
            "follower": Provide(lambda: parts.follower, sync_to_thread=False),
        },
        middleware=[
            authorization(
                Tokens.of(settings),
                parts.tracer,
                HttpMetrics(parts.metrics),
                # Of its own: it reads the log and needs no mirror.
                Limits(None, settings),
                proxies=settings.trusted_proxies,
            )
        ],
        cors_config=cors(settings),
        exception_handlers=EXCEPTION_HANDLERS,
        request_class=Call,
        lifespan=[lifespan],
        request_max_body_size=MAX_BODY_BYTES,
        openapi_config=None,
        logging_config=None,
    )
    return ResponseHeaders(app)
