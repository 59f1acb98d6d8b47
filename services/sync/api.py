"""The sync API, wired: what terminals and operators call."""

import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from litestar import Litestar
from litestar.types import ASGIApp
from msgspec import Struct

from services.sync.conflicts import routes as conflict_routes
from services.sync.dead_letters import routes as dead_letter_routes
from services.sync.dead_letters.routes import OperatorContext
from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.external_orders import ExternalOrder
from services.sync.mirror.sync_status import SyncStatus, sync_status
from shared.entities.contract import now
from shared.errors import Unauthenticated
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.endpoint import endpoint
from shared.http.openapi import Api
from shared.http.replies import success
from shared.http.response_headers import ResponseHeaders
from shared.http.service import create_service, settings_of_service
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.observability.metrics import Metrics, RailMetrics, watch_pool
from shared.observability.tracing import Tracer
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.rail.assemble import RailParts, assemble_rail
from shared.rail.instance import number_of_traces
from shared.security.permissions import PUBLIC
from shared.security.tokens import Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)

_HEARTBEATS = "select lane, sent_at from heartbeats"


class SyncApiParts(Struct, frozen=True):
    settings: Settings
    postgres: Postgres
    rail_parts: RailParts
    upserts: ExternalOrderUpserts
    operators: OperatorContext
    tracer: Tracer
    metrics: Metrics


def _parts_of(request: Call) -> SyncApiParts:
    found: SyncApiParts = request.app.state["parts"]
    return found


class Synced(Struct, frozen=True):
    outcome: str
    """created, updated or unchanged"""
    id: str
    order_number: str
    version: int


@endpoint(
    "POST",
    "/api/sync/order",
    action=PUBLIC,
    tag="Sync",
    summary="Bring in an order of another system",
    description="By `x-sync-token`. Once, however often it is sent: known by its external_id (or convex_id). Of two "
    "updates the one with the later updated_at stands; without one a status does not go back. Payments are added, "
    "known by their ids.",
    body=ExternalOrder,
    answer=Synced,
    errors=(401, 404, 409, 504),
    headers=("x-sync-token",),
    example={
        "restaurant_id": "11111111-1111-4111-8111-111111111111",
        "external_id": "pos-4711",
        "status": "completed",
        "items": [{"name": "Margherita", "quantity": 2, "unit_price": 980}],
        "payments": [{"id": "card-1", "amount": 2097, "method": "card"}],
    },
)
async def sync_order(request: Call) -> ASGIApp:
    parts = _parts_of(request)
    given = (request.header(b"x-sync-token") or "").encode("latin-1")
    # Of equal length whatever was sent: neither the time nor the length says how much of it is right.
    expected = hashlib.sha256(parts.settings.sync_token.encode()).digest()
    if not given or not hmac.compare_digest(hashlib.sha256(given).digest(), expected):
        raise Unauthenticated("x-sync-token is missing or wrong", field="x-sync-token")
    wanted = read_body(await request.whole_body(), ExternalOrder)
    done = await parts.upserts.upsert(wanted)
    return success(Synced(done.outcome, done.order.id, done.order.order_number, done.head.version))


@endpoint(
    "GET",
    "/api/sync/status",
    action="sync.read",
    tag="Sync",
    summary="How far every entity has come on its way to PostgreSQL",
    answer=SyncStatus,
)
async def status(request: Call) -> ASGIApp:
    parts = _parts_of(request)
    return success(await sync_status(parts.settings, parts.postgres, parts.rail_parts.mirror, request.identity.tenant))


ROUTES = [status, sync_order, *dead_letter_routes.ROUTES, *conflict_routes.ROUTES]
API = Api("Ticketrail: sync", "What terminals, other systems and operators call.", ROUTES)


async def readiness(parts: SyncApiParts) -> tuple[bool, dict[str, Any]]:
    """Ready while one of the stores answers; the age of PostgreSQL's last heartbeat says how far the sync is behind."""
    details: dict[str, Any] = {"broker": parts.rail_parts.publisher.connected}
    try:
        async with parts.postgres.connection() as connection:
            heartbeats = await connection.fetch(_HEARTBEATS)
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
        details["mirror"] = "away"
    return details["postgres"] or details["mirror"] != "away", details


def assemble(settings: Settings) -> SyncApiParts:
    tracer = Tracer("sync-api", settings)
    metrics = Metrics()
    postgres = Postgres(settings.database_api_url, settings)
    # Without a journal: an order that cannot be recorded now is refused, and the other system sends it again.
    rail_parts = assemble_rail(settings, tracer=tracer, metrics=RailMetrics(metrics))
    mirror, rail = rail_parts.mirror, rail_parts.rail
    upserts = ExternalOrderUpserts(postgres, mirror, rail, source="sync", window_days=settings.mirror_window_days)
    operators = OperatorContext.of(settings, postgres, mirror, rail)
    return SyncApiParts(settings, postgres, rail_parts, upserts, operators, tracer, metrics)


def create(settings: Settings | None = None) -> ResponseHeaders:
    settings = settings_of_service("sync-api", settings)
    settings, lease = number_of_traces(settings, "sync-api")
    parts = assemble(settings)
    parts.rail_parts.watch(parts.metrics)
    watch_pool(parts.metrics, parts.postgres)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        await parts.rail_parts.publisher.start(wait=3.0)
        log.info("started", port=settings.sync_port)
        yield
        await parts.rail_parts.close()
        await parts.postgres.close()
        await parts.operators.ops.close()
        parts.tracer.close()
        lease.release()
        log.info("stopped")

    return create_service(
        settings,
        API,
        state={"parts": parts, "operators": parts.operators},
        readiness=lambda: readiness(parts),
        lifespan=lifespan,
        tokens=Tokens.of(settings),
        tracer=parts.tracer,
        metrics=parts.metrics,
        limits_mirror=parts.rail_parts.mirror,
    )
