"""The orders service, wired: the one place that sees all its parts.

Starts without any one backend. Stops in this order: the server takes no more requests, what is under way is committed,
the drainer and the readers stop, connections close.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from litestar import Litestar
from litestar.datastructures import State
from msgspec import Struct

from services.orders.accounts import Accounts
from services.orders.changes import Changes
from services.orders.commands import Commands
from services.orders.derived_figures import DerivedFigures
from services.orders.menu import Menus
from services.orders.reads import Reads
from services.orders.route_context import RouteContext
from services.orders.routes import API
from services.orders.sign_in import SignIn
from shared.entities.contract import now
from shared.http.api_docs import pages
from shared.http.authorization import ResponseHeaders, authorization, cors
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.limits import Limits
from shared.http.server import EXCEPTION_HANDLERS, Call, health, metrics_route, options
from shared.lifecycle import freeze_memory
from shared.messaging import declare
from shared.messaging.log import LogReader
from shared.messaging.publisher import Publisher
from shared.messaging.topology import CHANGES, REFERENCE_LOG, bound_queues
from shared.mirror.connection import MirrorInDoubt, MirrorMisconfigured, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.observability.logs import configure_logging
from shared.observability.metrics import HttpMetrics, Metrics, RailMetrics, ReadMetrics, watch_pool
from shared.observability.tracing import Tracer
from shared.postgres.pool import Postgres
from shared.rail.commit import Rail
from shared.rail.drain import Drainer
from shared.rail.instance import Lease
from shared.rail.journal import Journal, JournalBroken
from shared.rail.orphaned_journals import OrphanedJournals
from shared.rail.record import Recorder
from shared.rail.set_aside import count_aside
from shared.security.tokens import Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)


class OrdersParts(Struct, frozen=True):
    settings: Settings
    postgres: Postgres
    mirror: Mirror
    publisher: Publisher
    journal: Journal
    drainer: Drainer
    orphans: OrphanedJournals
    rail: Rail
    menus: Menus
    reads: Reads
    shop: RouteContext
    tokens: Tokens
    tracer: Tracer
    metrics: Metrics


def assemble(settings: Settings, lease: Lease) -> OrdersParts:
    tracer = Tracer("orders", settings)
    metrics = Metrics()
    rail_metrics = RailMetrics(metrics)
    postgres = Postgres(settings.database_api_url, settings)
    mirror = Mirror(
        settings.redis_url, timeout=settings.redis_timeout_seconds, stale_seconds=settings.claim_stale_seconds
    )
    publisher = Publisher(
        settings.rabbitmq_url, CHANGES, queues=bound_queues(), timeout=settings.publish_timeout_seconds
    )
    journal = Journal(
        settings.journal_path,
        instance=settings.instance_number,
        max_bytes=settings.journal_max_bytes,
        reserve_bytes=settings.journal_reserve_bytes,
        lease=lease,
    )
    recorder = Recorder(
        publisher,
        journal,
        under_way=settings.publish_concurrency,
        apart_ms=settings.publish_interval_ms,
        batch_max_changes=settings.publish_max_changes,
        metrics=rail_metrics,
    )
    rail = Rail(
        mirror,
        recorder,
        journal,
        claim_timeout_seconds=settings.claim_timeout_seconds,
        reveal_timeout_seconds=settings.reveal_timeout_seconds,
        tracer=tracer,
        metrics=rail_metrics,
    )
    reads = Reads(postgres, mirror, ReadMetrics(metrics))
    reader = LogReader(
        settings.rabbitmq_url,
        name=f"orders-{settings.instance}",
        idle_seconds=settings.heartbeat_interval_seconds * 3,
        stream=REFERENCE_LOG,
    )
    menus = Menus(postgres, mirror, reader)
    changes, accounts, tokens = Changes(rail, reads), Accounts(postgres), Tokens.of(settings)
    shop = RouteContext(
        postgres,
        mirror,
        menus,
        reads,
        changes,
        Commands(changes, menus),
        DerivedFigures(reads, postgres, mirror),
        accounts,
        SignIn(accounts, reads, tokens, mirror, settings),
    )
    return OrdersParts(
        settings,
        postgres,
        mirror,
        publisher,
        journal,
        Drainer(journal, publisher, tracer),
        OrphanedJournals(
            settings.journal_folder,
            publisher,
            tracer,
            own=settings.instance_number,
            max_bytes=settings.journal_max_bytes,
            every=settings.orphaned_journal_scan_seconds,
        ),
        rail,
        menus,
        reads,
        shop,
        tokens,
        tracer,
        metrics,
    )


def _watch(parts: OrdersParts) -> None:
    watch = parts.metrics.watch
    watch("ticketrail_journal_entries", "Changes that wait in the journal", lambda: parts.journal.depth)
    watch("ticketrail_journal_bytes", "Their size", lambda: parts.journal.bytes)
    watch("ticketrail_journal_open", "0 while the journal cannot be used", lambda: parts.journal.opened)
    watch("ticketrail_journal_damaged", "Entries that are not whole, and are not sent", lambda: parts.journal.damaged)
    watch(
        "ticketrail_journal_files_aside",
        "Damaged files of all journals in the folder, set aside and waiting for somebody to look",
        lambda: count_aside(parts.settings.journal_folder),
    )
    watch("ticketrail_broker_connected", "1 while the publisher is connected", lambda: parts.publisher.connected)
    watch("ticketrail_mirror_available", "0 while the mirror's breaker is open", lambda: parts.mirror.available)
    watch(
        "ticketrail_heartbeat_age_seconds",
        "Since the last heartbeat in the log was sent",
        lambda: _heartbeat_age(parts),
    )
    watch_pool(parts.metrics, parts.postgres)


def _heartbeat_age(parts: OrdersParts) -> float:
    after_heartbeat = parts.menus.reader.heartbeat_at
    return float("nan") if after_heartbeat is None else (now() - after_heartbeat).total_seconds()


async def start(parts: OrdersParts) -> None:
    try:
        await parts.journal.open()
    except JournalBroken as error:
        # The broker may take every order all the same; the journal is tried again when it is needed.
        log.error("starting_without_journal", error=str(error))
    try:
        await parts.mirror.check()
    except MirrorMisconfigured:
        raise
    except (MirrorUnavailable, MirrorInDoubt) as error:
        log.warning("starting_without_mirror", error=str(error) or type(error).__name__)
    broker = await declare.check_at_start(parts.settings)
    await parts.publisher.start(wait=3.0 if broker else 0.0)  # a broker that is away delays the start once
    parts.drainer.start()
    parts.orphans.start()
    parts.menus.start()
    await parts.menus.load_all()


async def stop(parts: OrdersParts) -> None:
    await parts.rail.drain()
    await parts.reads.drain()
    await parts.orphans.stop()
    await parts.drainer.stop()
    await parts.menus.stop()
    await parts.publisher.stop()
    await parts.journal.close()
    await parts.mirror.close()
    await parts.postgres.close()
    parts.tracer.close()


async def readiness(parts: OrdersParts) -> tuple[bool, dict[str, Any]]:
    """Fit to take orders: a menu to price from, and the broker or the journal to keep them. Backends that are away are
    named, not fatal: an order is accepted without any one of them."""
    reader = parts.menus.reader
    after_heartbeat = reader.heartbeat_at
    age = None if after_heartbeat is None else round((now() - after_heartbeat).total_seconds(), 3)
    stale = age is None or age > max(2.0, parts.settings.heartbeat_interval_seconds * 3)
    details = {
        "menus": parts.menus.loaded,
        "broker": parts.publisher.connected,
        "mirror": parts.mirror.available,
        "journal": {
            "open": parts.journal.opened,
            "depth": parts.journal.depth,
            "damaged": parts.journal.damaged,
            "set_aside": parts.journal.set_aside,
        },
        "heartbeat_age_seconds": age,
        "heartbeats": "stale" if stale else "fresh",
    }
    return parts.menus.loaded and (parts.publisher.connected or parts.journal.opened), details


def create(settings: Settings | None = None) -> ResponseHeaders:
    settings = settings or Settings.load()
    configure_logging("orders", settings.log_level)
    # Beside the journals: who holds the number owns the journal. Given back after the journal is closed, or by death.
    lease = Lease.take(settings.journal_folder, "orders", settings.instance)
    settings = settings.numbered(lease.number)
    parts = assemble(settings, lease)
    _watch(parts)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        await start(parts)
        freeze_memory()
        log.info("started", instance=settings.instance, port=settings.orders_port)
        try:
            yield
        finally:
            await stop(parts)
            lease.release()
            log.info("stopped")

    app = Litestar(
        route_handlers=[
            *options(API.handlers),
            *API.handlers,
            *health(lambda: readiness(parts)),
            metrics_route(parts.metrics),
            *pages(API),
        ],
        state=State({"shop": parts.shop}),
        middleware=[
            authorization(
                parts.tokens,
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
