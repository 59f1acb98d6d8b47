"""Assembles the sync worker: the PostgreSQL writer, the mirror writer, the feed loop, the ledger loop, the dead-letter
collector, replays, heartbeats, the reconciler, thresholds, the cleanup, and a health endpoint.

The worker can start while PostgreSQL, Redis or RabbitMQ is unavailable, and waits for them. It refuses to start if the
broker answers and lacks a queue or a binding. At a stop, consumers unsubscribe and finish their messages before the
connections are closed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import structlog
from litestar import Litestar
from msgspec import Struct

from services.sync.dead_letters.collector import DeadLetterCollector
from services.sync.dead_letters.replay_worker import Replays
from services.sync.heartbeat import HEARTBEAT_PATHS, HeartbeatMonitor, HeartbeatSender
from services.sync.ledger.ledger_loop import OPEN_PLACES, LedgerLoop
from services.sync.maintenance.cleanup import Cleanup
from services.sync.maintenance.reconciler import Reconciler
from services.sync.mirror.feed_loop import FeedLoop
from services.sync.mirror.mirror_writer import MirrorWriter
from services.sync.mirror.thresholds import Thresholds
from services.sync.writer.postgres_writer import PostgresWriter
from shared.http.response_headers import ResponseHeaders
from shared.http.service import create_health_service, settings_of_service
from shared.lifecycle import freeze_memory, vital_task
from shared.messaging import declare
from shared.messaging.log_tap import LogTap
from shared.observability.metrics import Metrics, RailMetrics, WriterMetrics, watch_pool
from shared.observability.tracing import Tracer
from shared.postgres.pool import Postgres
from shared.rail.assemble import RailParts, assemble_rail
from shared.rail.instance import number_of_traces
from shared.settings import Settings

log = structlog.get_logger(__name__)

_MIN_PROOF_SECONDS = 5.0


class WorkerParts(Struct, frozen=True):
    settings: Settings
    postgres: Postgres
    rail_parts: RailParts
    watch: HeartbeatMonitor
    heartbeats: HeartbeatSender
    postgres_writer: PostgresWriter
    mirror_writer: MirrorWriter
    feed_loop: FeedLoop
    ledger_loop: LedgerLoop
    reconciler: Reconciler
    collector: DeadLetterCollector
    replays: Replays
    thresholds: Thresholds
    cleanup: Cleanup
    tracer: Tracer
    metrics: Metrics


def assemble(settings: Settings) -> WorkerParts:
    tracer = Tracer("sync-worker", settings)
    metrics = Metrics()
    writer_metrics = WriterMetrics(metrics)
    postgres = Postgres(settings.database_writer_url, settings)
    # The worker needs no journal: a claim that the reconciler cannot record now stays in the mirror until the next
    # round.
    rail_parts = assemble_rail(settings, tracer=tracer, metrics=RailMetrics(metrics))
    mirror, publisher, rail = rail_parts.mirror, rail_parts.publisher, rail_parts.rail
    watch = HeartbeatMonitor(settings)
    feed_loop = FeedLoop(settings, postgres, mirror)
    tap = LogTap()
    ledger_loop = LedgerLoop(settings, postgres, publisher, tap=tap)
    mirror_writer = MirrorWriter(settings, postgres, mirror, publisher, watch, tracer, writer_metrics, tap=tap)
    return WorkerParts(
        settings,
        postgres,
        rail_parts,
        watch,
        HeartbeatSender(settings, postgres, publisher, watch),
        PostgresWriter(settings, postgres, publisher, watch, tracer, writer_metrics, committed=feed_loop.wake),
        mirror_writer,
        feed_loop,
        ledger_loop,
        Reconciler(settings, postgres, mirror, rail, ledger_loop),
        DeadLetterCollector(settings, postgres, writer_metrics),
        Replays(settings, postgres, mirror_writer, publisher, mirror, rail),
        Thresholds(settings, mirror),
        Cleanup(settings, postgres),
        tracer,
        metrics,
    )


def _watch(parts: WorkerParts) -> None:
    def seconds(found: dict[str, float | None], path: str) -> float:
        known = found[path]
        return float("nan") if known is None else known

    watch, heartbeats = parts.metrics.watch, parts.watch
    parts.metrics.watch_each(
        "ticketrail_heartbeat_age_seconds",
        "path",
        {path: lambda path=path: seconds(heartbeats.ages(), path) for path in HEARTBEAT_PATHS},  # type: ignore[misc]
    )
    parts.metrics.watch_each(
        "ticketrail_heartbeat_lag_seconds",
        "path",
        {path: lambda path=path: seconds(heartbeats.lags(), path) for path in HEARTBEAT_PATHS},  # type: ignore[misc]
    )
    watch(
        "ticketrail_held_messages",
        lambda: parts.postgres_writer.held,
    )
    watch(
        "ticketrail_holding",
        lambda: parts.postgres_writer.holding,
    )
    parts.rail_parts.watch(parts.metrics)
    watch(
        "ticketrail_dead_letters_open",
        lambda: parts.collector.open_dead_letters,
    )
    watch(
        "ticketrail_conflicts_open",
        lambda: parts.reconciler.open_conflicts.number,
    )
    watch("ticketrail_pending", lambda: parts.thresholds.pending)
    watch("ticketrail_failed", lambda: parts.thresholds.failed)
    parts.metrics.watch_each(
        "ticketrail_restaurants_above_threshold",
        "state",
        {name: lambda name=name: parts.thresholds.over[name] for name in ("pending", "failed")},  # type: ignore[misc]
    )
    watch("ticketrail_mirror_warm", lambda: parts.mirror_writer.warm)
    watch("ticketrail_feed_stalled_seconds", lambda: parts.feed_loop.stalled_seconds)
    watch("ticketrail_claims_unfinished", lambda: parts.rail_parts.rail.claim_finisher.unfinished)
    ledger = parts.ledger_loop
    watch("ticketrail_ledger_age_seconds", lambda: ledger.age_seconds)
    parts.metrics.watch_each(
        "ticketrail_ledger_open",
        "place",
        {place: lambda place=place: ledger.totals.open.get(place, 0) for place in OPEN_PLACES},  # type: ignore[misc]
    )
    watch("ticketrail_ledger_resent", lambda: ledger.totals.resent)
    watch("ticketrail_ledger_republished", lambda: ledger.totals.republished)
    watch("ticketrail_ledger_unexplained", lambda: len(ledger.totals.unexplained))
    watch("ticketrail_ledger_expired_ranges", lambda: len(ledger.totals.expired))
    watch_pool(parts.metrics, parts.postgres)


async def start(parts: WorkerParts) -> None:
    """Starts all parts. Raises TopologyError if a queue or a binding is missing."""
    await parts.rail_parts.check_mirror()
    await declare.check_at_start(
        parts.settings, within=None
    )  # waits without limit, because the worker has nothing to do without the broker
    await parts.rail_parts.publisher.start(wait=5.0)
    await parts.postgres_writer.start()
    parts.collector.start()
    parts.mirror_writer.start()
    parts.feed_loop.start()
    parts.ledger_loop.start()
    await parts.heartbeats.start()
    await parts.watch.prove(max(_MIN_PROOF_SECONDS, 3 * parts.settings.heartbeat_interval_seconds))
    parts.reconciler.start()
    parts.replays.start()
    parts.thresholds.start()
    parts.cleanup.start()
    freeze_memory()


async def stop(parts: WorkerParts) -> None:
    await parts.cleanup.stop()
    await parts.thresholds.stop()
    await parts.replays.stop()
    await parts.reconciler.stop()
    await parts.heartbeats.stop()
    await parts.postgres_writer.stop()
    await parts.collector.stop()
    await parts.mirror_writer.stop()
    await parts.feed_loop.stop()
    await parts.ledger_loop.stop()
    await parts.rail_parts.close()
    await parts.postgres.close()
    parts.tracer.close()


async def readiness(parts: WorkerParts, started: asyncio.Task[None]) -> tuple[bool, dict[str, Any]]:
    """Returns (ready, details for the health endpoint). The worker is ready if the start has finished, and if a
    heartbeat of every lane and of the log arrived within three intervals."""
    fresh, heartbeats = parts.watch.readiness()
    has_started = started.done() and not started.cancelled() and started.exception() is None
    return has_started and fresh, {
        "heartbeats": heartbeats,
        "postgres_writer": parts.postgres_writer.state(),
        "mirror": "warm" if parts.mirror_writer.warm else "cold",
        "feed": parts.feed_loop.state(),
        **await parts.rail_parts.clock_details(),
        "ledger": parts.ledger_loop.state(),
    }


def create(settings: Settings | None = None) -> ResponseHeaders:
    settings = settings_of_service("sync-worker", settings)
    settings, lease = number_of_traces(settings, "sync-worker")
    parts = assemble(settings)
    _watch(parts)
    started: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        # Start in the background, because the health endpoint must answer while the worker waits for a backend.
        task = vital_task(start(parts), name="start")
        started.append(task)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await stop(parts)
            lease.release()
            log.info("stopped")

    return create_health_service(lambda: readiness(parts, started[0]), parts.metrics, lifespan)
