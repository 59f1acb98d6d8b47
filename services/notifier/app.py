"""Wires the notifier.

The notifier can start while RabbitMQ is unavailable, but it is not ready until it has read the log. It refuses to start
if the broker answers but has no log. A stop first ends every stream, because the server waits for open responses. Then
the follower stops."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from litestar import Litestar
from msgspec import Struct

from services.notifier.follower import LogFollower
from services.notifier.hub import Hub
from services.notifier.streams import Caps, OpenStreams
from services.notifier.transports import API
from services.notifier.window import Window
from shared.http.api_key_verifier import ApiKeyVerifier
from shared.http.origins import AllowedOrigins
from shared.http.response_headers import ResponseHeaders
from shared.http.server import stop_event
from shared.http.service import create_service, settings_of_service
from shared.lifecycle import freeze_memory
from shared.messaging import declare
from shared.observability.metrics import Metrics, PushMetrics
from shared.observability.tracing import Tracer
from shared.postgres.pool import Postgres
from shared.rail.instance import number_of_traces
from shared.security.revoked import RevocationPoller
from shared.security.tokens import Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)


class NotifierParts(Struct, frozen=True):
    settings: Settings
    hub: Hub
    follower: LogFollower
    tokens: Tokens
    streams: OpenStreams
    revocations: RevocationPoller
    postgres: Postgres
    """Finds API keys."""
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
    tokens = Tokens.of(settings)
    streams = OpenStreams(hub, tokens, Caps.of(settings))
    revocations = RevocationPoller(Postgres(settings.database_api_url, settings, size=1), tokens.revoked, tokens.clock)
    revocations.listeners.append(streams.end_revoked)
    follower = LogFollower(settings, hub, tracer, PushMetrics(metrics))
    postgres = Postgres(settings.database_api_url, settings, size=2)
    parts = NotifierParts(settings, hub, follower, tokens, streams, revocations, postgres, tracer, metrics)
    metrics.watch("ticketrail_subscribers", lambda: len(hub))
    metrics.watch("ticketrail_window_changes", lambda: len(hub.window))
    metrics.watch(
        "ticketrail_slow_subscribers",
        lambda: hub.slow_count,
    )
    metrics.watch("ticketrail_caught_up", lambda: parts.follower.caught_up)
    metrics.watch(
        "ticketrail_heartbeat_age_seconds",
        lambda: parts.follower.heartbeat_age,
    )
    return parts


async def start(parts: NotifierParts) -> None:
    """Starts to follow the log. Raises TopologyError if the broker answers but has no log."""
    await declare.check_log_at_start(parts.settings)
    await parts.revocations.start()
    parts.follower.start()


async def stop(parts: NotifierParts) -> None:
    parts.hub.close()
    await parts.follower.stop()
    await parts.revocations.stop()
    await parts.postgres.close()
    parts.tracer.close()


async def readiness(parts: NotifierParts) -> tuple[bool, dict[str, Any]]:
    return parts.follower.readiness()


async def _close_on(stopping: asyncio.Event, hub: Hub) -> None:
    await stopping.wait()
    log.info("stopping", subscribers=len(hub))
    hub.close()


def create(settings: Settings | None = None) -> ResponseHeaders:
    settings = settings_of_service("notifier", settings)
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

    return create_service(
        "notifier",
        settings,
        API,
        state={
            "hub": parts.hub,
            "follower": parts.follower,
            "streams": parts.streams,
            "origins": AllowedOrigins(settings.cors_origins),
        },
        readiness=lambda: readiness(parts),
        lifespan=lifespan,
        tokens=parts.tokens,
        api_keys=ApiKeyVerifier(parts.postgres, None, settings),
        tracer=parts.tracer,
        metrics=parts.metrics,
        limits_mirror=None,  # the notifier reads the log and needs no mirror
    )
