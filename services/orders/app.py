"""Wires the orders service.

It can start while any one backend is unavailable. It stops in this order: the server accepts no more requests, running
commits end, the drainer and the log reader stop, the connections close.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import structlog
from litestar import Litestar
from msgspec import Struct

from services.orders.accounts import Accounts
from services.orders.api_keys import ApiKeyStore
from services.orders.derived_figures import DerivedFigures
from services.orders.entity_changes import EntityChanges
from services.orders.entity_reads import EntityReads
from services.orders.menu import Menus
from services.orders.order_commands import OrderCommands
from services.orders.route_context import RouteContext
from services.orders.routes import API
from services.orders.sign_in import SignIn
from shared.entities.contract import now
from shared.http.api_key_verifier import ApiKeyVerifier
from shared.http.limits import Rate, TokenBucket
from shared.http.response_headers import ResponseHeaders
from shared.http.service import create_service, settings_of_service
from shared.lifecycle import freeze_memory
from shared.messaging import declare
from shared.messaging.log import LogReader
from shared.messaging.publisher import Publisher
from shared.messaging.recovery import START_WAIT_SECONDS
from shared.messaging.topology import REFERENCE_LOG
from shared.observability.metrics import Metrics, RailMetrics, ReadMetrics, watch_pool
from shared.observability.tracing import Tracer
from shared.postgres.pool import Postgres
from shared.rail.assemble import RailParts, assemble_rail, publisher_of
from shared.rail.drain import Drainer
from shared.rail.head import Heads
from shared.rail.instance import Lease
from shared.rail.journal import Journal, JournalBroken
from shared.rail.orphaned_journals import OrphanedJournals
from shared.rail.set_aside import count_aside
from shared.security.revoked import RevocationPoller
from shared.security.tokens import Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)


class OrdersParts(Struct, frozen=True):
    settings: Settings
    postgres: Postgres
    rail_parts: RailParts
    journal: Journal
    journal_publisher: Publisher
    """Has a connection of its own, so that new changes do not wait behind the journals."""
    drainer: Drainer
    orphaned_journals: OrphanedJournals
    menus: Menus
    reads: EntityReads
    context: RouteContext
    tokens: Tokens
    revocations: RevocationPoller
    tracer: Tracer
    metrics: Metrics


def assemble(settings: Settings, lease: Lease) -> OrdersParts:
    tracer = Tracer("orders", settings)
    metrics = Metrics()
    postgres = Postgres(settings.database_api_url, settings)
    journal = Journal(
        settings.journal_path,
        instance=settings.instance_number,
        max_bytes=settings.journal_max_bytes,
        reserve_bytes=settings.journal_reserve_bytes,
        lease=lease,
    )
    rail_parts = assemble_rail(
        settings,
        journal=journal,
        publish_interval_ms=settings.publish_interval_ms,
        tracer=tracer,
        metrics=RailMetrics(metrics),
    )
    mirror, rail, journal_publisher = rail_parts.mirror, rail_parts.rail, publisher_of(settings)
    reads = EntityReads(postgres, mirror, ReadMetrics(metrics))
    reader = LogReader(
        settings.rabbitmq_url,
        name=f"orders-{settings.instance}",
        idle_seconds=settings.heartbeat_interval_seconds * 3,
        stream=REFERENCE_LOG,
    )
    menus = Menus(postgres, mirror, reader)
    heads = Heads(mirror, postgres.tenant, window=timedelta(days=settings.mirror_window_days))
    changes, accounts, tokens = EntityChanges(rail, heads), Accounts(postgres), Tokens.of(settings)
    context = RouteContext(
        postgres,
        mirror,
        menus,
        reads,
        changes,
        OrderCommands(changes, menus),
        DerivedFigures(reads, postgres, mirror),
        accounts,
        SignIn(accounts, reads, tokens, mirror, settings),
        ApiKeyStore(postgres, tokens),
        TokenBucket(
            mirror,
            "guest-orders",
            Rate(settings.guest_orders_per_minute, settings.guest_orders_per_minute / 60),
        ),
    )
    return OrdersParts(
        settings,
        postgres,
        rail_parts,
        journal,
        journal_publisher,
        Drainer(journal, journal_publisher, tracer),
        OrphanedJournals(
            settings.journal_folder,
            journal_publisher,
            tracer,
            own=settings.instance_number,
            max_bytes=settings.journal_max_bytes,
            interval_seconds=settings.orphaned_journal_scan_seconds,
        ),
        menus,
        reads,
        context,
        tokens,
        RevocationPoller(Postgres(settings.database_api_url, settings, size=1), tokens.revoked, tokens.clock),
        tracer,
        metrics,
    )


def _watch(parts: OrdersParts) -> None:
    watch = parts.metrics.watch
    watch("ticketrail_journal_entries", lambda: parts.journal.depth)
    watch("ticketrail_journal_bytes", lambda: parts.journal.bytes)
    watch("ticketrail_journal_open", lambda: parts.journal.opened)
    watch(
        "ticketrail_journal_damaged",
        lambda: parts.journal.damaged,
    )
    watch(
        "ticketrail_journal_files_aside",
        lambda: count_aside(parts.settings.journal_folder),
    )
    parts.rail_parts.watch(parts.metrics)
    watch(
        "ticketrail_heartbeat_age_seconds",
        lambda: _heartbeat_age(parts),
    )
    watch_pool(parts.metrics, parts.postgres)


def _heartbeat_age(parts: OrdersParts) -> float:
    heartbeat_at = parts.menus.reader.heartbeat_at
    return float("nan") if heartbeat_at is None else (now() - heartbeat_at).total_seconds()


async def start(parts: OrdersParts) -> None:
    try:
        await parts.journal.open()
    except JournalBroken as error:
        # The broker can take every order without the journal. The rail tries to open the journal again when it needs
        # it.
        log.error("starting_without_journal", error=str(error))
    await parts.revocations.start()
    await parts.rail_parts.check_mirror()
    broker = await declare.check_at_start(parts.settings)
    # If the check has already waited for an unavailable broker, the publisher does not wait again.
    await parts.rail_parts.publisher.start(wait=START_WAIT_SECONDS if broker else 0.0)
    await parts.journal_publisher.start()
    parts.drainer.start()
    parts.orphaned_journals.start()
    parts.menus.start()
    await parts.menus.load_all(attach_seconds=START_WAIT_SECONDS if broker else 0.0)


async def stop(parts: OrdersParts) -> None:
    await parts.rail_parts.rail.drain()
    await parts.reads.drain()
    await parts.orphaned_journals.stop()
    await parts.drainer.stop()
    await parts.journal_publisher.stop()
    await parts.menus.stop()
    await parts.rail_parts.close()
    await parts.journal.close()
    await parts.revocations.stop()
    await parts.postgres.close()
    parts.tracer.close()


async def readiness(parts: OrdersParts) -> tuple[bool, dict[str, Any]]:
    """Returns (ready, details). The service is ready to accept orders when the menus are loaded and the broker or the
    journal can record changes. The details name unavailable backends, because the service stays ready when one of
    them is missing."""
    reader = parts.menus.reader
    heartbeat_at = reader.heartbeat_at
    age = None if heartbeat_at is None else round((now() - heartbeat_at).total_seconds(), 3)
    stale = age is None or age > max(2.0, parts.settings.heartbeat_interval_seconds * 3)
    details = {
        "menus": parts.menus.loaded,
        "broker": parts.rail_parts.publisher.connected,
        "mirror": parts.rail_parts.mirror.available,
        "journal": {
            "open": parts.journal.opened,
            "depth": parts.journal.depth,
            "damaged": parts.journal.damaged,
            "set_aside": parts.journal.set_aside,
        },
        "heartbeat_age_seconds": age,
        "heartbeats": "stale" if stale else "fresh",
        **await parts.rail_parts.clock_details(),
    }
    return parts.menus.loaded and (parts.rail_parts.publisher.connected or parts.journal.opened), details


def create(settings: Settings | None = None) -> ResponseHeaders:
    settings = settings_of_service("orders", settings)
    # The process that holds the number also owns its journal. It releases the number after it has closed the
    # journal. If the process dies, the kernel releases the number.
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

    return create_service(
        "orders",
        settings,
        API,
        state={"context": parts.context},
        readiness=lambda: readiness(parts),
        lifespan=lifespan,
        tokens=parts.tokens,
        api_keys=ApiKeyVerifier(parts.postgres, parts.rail_parts.mirror, settings),
        tracer=parts.tracer,
        metrics=parts.metrics,
        limits_mirror=parts.rail_parts.mirror,
    )
