"""The sync API, wired: what terminals and operators call."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from litestar import Litestar
from litestar.di import Provide
from litestar.types import ASGIApp
from msgspec import Struct

from services.sync.status import sync_status
from shared.api import endpoint
from shared.entities.contract import now
from shared.gate import Outer, cors, gate
from shared.http import EXCEPTION_HANDLERS, MAX_BODY_BYTES, Call, health, metrics_route, success
from shared.limits import Limits
from shared.metrics import HttpMetrics, Metrics, watch_pool
from shared.mirror.connection import MirrorAway, MirrorInDoubt
from shared.mirror.mirror import Mirror
from shared.openapi import pages
from shared.postgres.pool import AWAY, Postgres
from shared.rail.instance import number_of_traces
from shared.security import Tokens
from shared.settings import Settings
from shared.telemetry import configure_logging
from shared.tracing import Tracer

log = structlog.get_logger(__name__)

_FENCES = "select lane, sent_at from fences"


class Parts(Struct, frozen=True):
    settings: Settings
    postgres: Postgres
    mirror: Mirror
    tracer: Tracer
    metrics: Metrics


@endpoint(
    "GET",
    "/api/sync/status",
    action="sync.read",
    tag="Sync",
    summary="How far every entity has come on its way to PostgreSQL",
    answer=dict[str, Any],
)
async def status(request: Call, parts: Parts) -> ASGIApp:
    return success(await sync_status(parts.postgres, parts.mirror, request.identity.tenant))


ROUTES = [status]


async def readiness(parts: Parts) -> tuple[bool, dict[str, Any]]:
    """Ready while one of the stores answers; the age of PostgreSQL's last fence says how far the sync is behind."""
    details: dict[str, Any] = {}
    try:
        async with parts.postgres.connection() as connection:
            fences = await connection.fetch(_FENCES)
        ages = {row["lane"]: round((now() - row["sent_at"]).total_seconds(), 3) for row in fences}
        limit = max(2.0, parts.settings.fence_interval_seconds * 3)
        details["fence_age_seconds"] = ages
        details["fences"] = "fresh" if ages and max(ages.values()) <= limit else "stale"
        details["postgres"] = True
    except AWAY as error:
        details["postgres"] = False
        details["postgres_error"] = str(error) or type(error).__name__
    try:
        details["mirror"] = "warm" if await parts.mirror.is_warm() else "cold"
    except (MirrorAway, MirrorInDoubt):
        details["mirror"] = "away"
    return details["postgres"] or details["mirror"] != "away", details


def create(settings: Settings | None = None) -> Outer:
    settings = settings or Settings()
    configure_logging("sync-api", settings.log_level)
    settings, lease = number_of_traces(settings, "sync-api")
    parts = Parts(
        settings,
        Postgres(settings.database_api_url, settings),
        Mirror(settings.redis_url, timeout=settings.redis_timeout_seconds, stale_seconds=settings.claim_stale_seconds),
        Tracer("sync-api", settings),
        Metrics(),
    )
    parts.metrics.watch(
        "ticketrail_mirror_available", "0 while the mirror's breaker is open", lambda: parts.mirror.available
    )
    watch_pool(parts.metrics, parts.postgres)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        log.info("started", port=settings.sync_port)
        yield
        await parts.mirror.close()
        await parts.postgres.close()
        parts.tracer.close()
        lease.release()
        log.info("stopped")

    app = Litestar(
        route_handlers=[
            *ROUTES,
            *health(lambda: readiness(parts)),
            metrics_route(parts.metrics),
            *pages("Ticketrail: sync", "What terminals, other systems and operators call.", ROUTES),
        ],
        dependencies={"parts": Provide(lambda: parts, sync_to_thread=False)},
        middleware=[
            gate(
                Tokens.of(settings),
                parts.tracer,
                HttpMetrics(parts.metrics),
                Limits(parts.mirror, settings),
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
    return Outer(app)
