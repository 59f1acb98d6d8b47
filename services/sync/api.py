"""Assembles the sync API, which terminals, other systems and operators call."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from litestar import Litestar
from msgspec import Struct

from services.sync.conflicts import routes as conflict_routes
from services.sync.dead_letters import routes as dead_letter_routes
from services.sync.imports import routes as import_routes
from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.routes import ImportContext
from services.sync.ledger import routes as ledger_routes
from services.sync.mirror import routes as mirror_routes
from services.sync.sync_context import SyncContext
from shared.entities.contract import now
from shared.http.api_key_verifier import ApiKeyVerifier
from shared.http.openapi import Api
from shared.http.response_headers import ResponseHeaders
from shared.http.service import create_service, settings_of_service
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.observability.metrics import Metrics, RailMetrics, watch_pool
from shared.observability.tracing import Tracer
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.rail.assemble import RailParts, assemble_rail
from shared.rail.instance import number_of_traces
from shared.security.revoked import RevocationPoller
from shared.security.tokens import Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)

_HEARTBEATS = "select lane, sent_at from last_heartbeats"
_PROBE_TIMEOUT_SECONDS = 1.0


class HeartbeatProbe:
    """Reads the heartbeats for `/health/ready`.

    Supervisors give up a probe after a few seconds, and a frozen PostgreSQL takes longer to fail. So a probe waits for
    a second at most. The query continues, and later probes wait for the same one.
    """

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._query: asyncio.Task[list[Any]] | None = None

    async def read(self) -> list[Any]:
        """Returns the rows (lane, sent_at). Raises one of UNAVAILABLE."""
        if self._query is None or self._query.done():
            self._query = asyncio.create_task(self._fetch(), name="read heartbeats")
            # A query that fails when no probe waits for it has been reported as a timeout.
            self._query.add_done_callback(lambda query: query.cancelled() or query.exception())
        done, _ = await asyncio.wait([self._query], timeout=_PROBE_TIMEOUT_SECONDS)
        if not done:
            raise TimeoutError(f"PostgreSQL did not answer within {_PROBE_TIMEOUT_SECONDS:.0f} s")
        return self._query.result()

    async def _fetch(self) -> list[Any]:
        async with self._postgres.connection() as connection:
            return list(await connection.fetch(_HEARTBEATS))


class SyncApiParts(Struct, frozen=True):
    settings: Settings
    postgres: Postgres
    heartbeats: HeartbeatProbe
    rail_parts: RailParts
    context: SyncContext
    imports: ImportContext
    tokens: Tokens
    revocations: RevocationPoller
    tracer: Tracer
    metrics: Metrics


ROUTES = [
    *mirror_routes.ROUTES,
    *import_routes.ROUTES,
    *dead_letter_routes.ROUTES,
    *ledger_routes.ROUTES,
    *conflict_routes.ROUTES,
]
API = Api("Ticketrail: sync", "The API for terminals, other systems and operators.", ROUTES)


async def readiness(parts: SyncApiParts) -> tuple[bool, dict[str, Any]]:
    """Returns (ready, details for the health endpoint). The API is ready while PostgreSQL or the mirror answers. The
    ages of the heartbeats in PostgreSQL show the sync lag."""
    details: dict[str, Any] = {"broker": parts.rail_parts.publisher.connected}
    try:
        heartbeats = await parts.heartbeats.read()
        ages = {row["lane"]: round((now() - row["sent_at"]).total_seconds(), 3) for row in heartbeats}
        limit = max(2.0, parts.settings.heartbeat_interval_seconds * 3)
        details["heartbeat_age_seconds"] = ages
        details["heartbeats"] = "fresh" if ages and max(ages.values()) <= limit else "stale"
        details["postgres"] = True
    except UNAVAILABLE as error:
        details["postgres"] = False
        details["postgres_error"] = str(error) or type(error).__name__
    try:
        details["mirror"] = "warm" if await parts.rail_parts.mirror.is_warm() else "cold"
    except (MirrorUnavailable, MirrorInDoubt):
        details["mirror"] = "unavailable"
    details |= await parts.rail_parts.clock_details()
    return details["postgres"] or details["mirror"] != "unavailable", details


def assemble(settings: Settings) -> SyncApiParts:
    tracer = Tracer("sync-api", settings)
    metrics = Metrics()
    postgres = Postgres(settings.database_api_url, settings)
    # The sync API has no journal. It refuses an order that cannot be recorded now, and the other system sends it again.
    rail_parts = assemble_rail(settings, tracer=tracer, metrics=RailMetrics(metrics))
    mirror, rail = rail_parts.mirror, rail_parts.rail
    upserts = ExternalOrderUpserts(postgres, mirror, rail, source="sync", window_days=settings.mirror_window_days)
    context = SyncContext.of(settings, postgres, mirror, rail)
    imports = ImportContext(upserts)
    tokens = Tokens.of(settings)
    return SyncApiParts(
        settings,
        postgres,
        HeartbeatProbe(postgres),
        rail_parts,
        context,
        imports,
        tokens,
        RevocationPoller(Postgres(settings.database_api_url, settings, size=1), tokens.revoked, tokens.clock),
        tracer,
        metrics,
    )


def create(settings: Settings | None = None) -> ResponseHeaders:
    settings = settings_of_service("sync-api", settings)
    settings, lease = number_of_traces(settings, "sync-api")
    parts = assemble(settings)
    parts.rail_parts.watch(parts.metrics)
    watch_pool(parts.metrics, parts.postgres)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        await parts.revocations.start()
        await parts.rail_parts.check_mirror()
        await parts.rail_parts.publisher.start(wait=3.0)
        log.info("started", port=settings.sync_port)
        yield
        await parts.rail_parts.close()
        await parts.revocations.stop()
        await parts.postgres.close()
        await parts.context.ops.close()
        parts.tracer.close()
        lease.release()
        log.info("stopped")

    return create_service(
        "sync-api",
        settings,
        API,
        state={"sync": parts.context, "imports": parts.imports},
        readiness=lambda: readiness(parts),
        lifespan=lifespan,
        tokens=parts.tokens,
        api_keys=ApiKeyVerifier(parts.postgres, parts.rail_parts.mirror, settings),
        tracer=parts.tracer,
        metrics=parts.metrics,
        limits_mirror=parts.rail_parts.mirror,
    )
