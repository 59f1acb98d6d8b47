"""The sync API, wired: what terminals and operators call."""

import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from litestar import Litestar
from litestar.datastructures import State
from litestar.di import Provide
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
from shared.http.api_docs import pages
from shared.http.authorization import ResponseHeaders, authorization, cors
from shared.http.bodies import MAX_BODY_BYTES, read_body
from shared.http.endpoint import endpoint
from shared.http.limits import Limits
from shared.http.openapi import Api
from shared.http.server import EXCEPTION_HANDLERS, Call, health, metrics_route, options, success
from shared.messaging.publisher import Publisher
from shared.messaging.topology import CHANGES, bound_queues
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.observability.logs import configure_logging
from shared.observability.metrics import HttpMetrics, Metrics, RailMetrics, watch_pool
from shared.observability.tracing import Tracer
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.rail.commit import Rail
from shared.rail.instance import number_of_traces
from shared.rail.record import Recorder
from shared.security.permissions import PUBLIC
from shared.security.tokens import Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)

_HEARTBEATS = "select lane, sent_at from heartbeats"


class SyncApiParts(Struct, frozen=True):
    settings: Settings
    postgres: Postgres
    mirror: Mirror
    publisher: Publisher
    rail: Rail
    upserts: ExternalOrderUpserts
    operators: OperatorContext
    tracer: Tracer
    metrics: Metrics


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
async def sync_order(request: Call, parts: SyncApiParts) -> ASGIApp:
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
async def status(request: Call, parts: SyncApiParts) -> ASGIApp:
    return success(await sync_status(parts.settings, parts.postgres, parts.mirror, request.identity.tenant))


ROUTES = [status, sync_order, *dead_letter_routes.ROUTES, *conflict_routes.ROUTES]
API = Api("Ticketrail: sync", "What terminals, other systems and operators call.", ROUTES)


async def readiness(parts: SyncApiParts) -> tuple[bool, dict[str, Any]]:
    """Ready while one of the stores answers; the age of PostgreSQL's last heartbeat says how far the sync is behind."""
    details: dict[str, Any] = {"broker": parts.publisher.connected}
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
        details["mirror"] = "warm" if await parts.mirror.is_warm() else "cold"
    except (MirrorUnavailable, MirrorInDoubt):
        details["mirror"] = "away"
    return details["postgres"] or details["mirror"] != "away", details


def assemble(settings: Settings) -> SyncApiParts:
    tracer = Tracer("sync-api", settings)
    metrics = Metrics()
    postgres = Postgres(settings.database_api_url, settings)
    mirror = Mirror(
        settings.redis_url, timeout=settings.redis_timeout_seconds, stale_seconds=settings.claim_stale_seconds
    )
    publisher = Publisher(
        settings.rabbitmq_url, CHANGES, queues=bound_queues(), timeout=settings.publish_timeout_seconds
    )
    # Without a journal: what cannot be recorded now is refused, and the other system sends it again.
    recorder = Recorder(publisher, None, under_way=settings.publish_concurrency)
    rail = Rail(
        mirror,
        recorder,
        None,
        claim_timeout_seconds=settings.claim_timeout_seconds,
        reveal_timeout_seconds=settings.reveal_timeout_seconds,
        tracer=tracer,
        metrics=RailMetrics(metrics),
    )
    upserts = ExternalOrderUpserts(postgres, mirror, rail, source="sync", window_days=settings.mirror_window_days)
    operators = OperatorContext.of(settings, postgres, mirror, rail)
    return SyncApiParts(settings, postgres, mirror, publisher, rail, upserts, operators, tracer, metrics)


def create(settings: Settings | None = None) -> ResponseHeaders:
    settings = settings or Settings.load()
    configure_logging("sync-api", settings.log_level)
    settings, lease = number_of_traces(settings, "sync-api")
    parts = assemble(settings)
    parts.metrics.watch(
        "ticketrail_mirror_available", "0 while the mirror's breaker is open", lambda: parts.mirror.available
    )
    watch_pool(parts.metrics, parts.postgres)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        await parts.publisher.start(wait=3.0)
        log.info("started", port=settings.sync_port)
        yield
        await parts.rail.drain()
        await parts.publisher.stop()
        await parts.mirror.close()
        await parts.postgres.close()
        await parts.operators.ops.close()
        parts.tracer.close()
        lease.release()
        log.info("stopped")

    app = Litestar(
        route_handlers=[
            *options(ROUTES),
            *ROUTES,
            *health(lambda: readiness(parts)),
            metrics_route(parts.metrics),
            *pages(API),
        ],
        state=State({"operators": parts.operators}),
        dependencies={"parts": Provide(lambda: parts, sync_to_thread=False)},
        middleware=[
            authorization(
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
    return ResponseHeaders(app)
