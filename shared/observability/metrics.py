"""The metrics that Prometheus reads from `/metrics`, with one registry per process. docs/metrics.md explains each one.

This module names every metric. A gauge shows a value of one part of a service, so the service's `app.py` or `worker.py`
connects it to that part; its name and its text stand in `GAUGES`.

The number of label values is bounded. Routes are counted by their templates, and codes and reasons come from a closed
list or have a cap. No label is an id or a tenant. Each scrape reads the depths, ages and connections (`watch`). All
counters of one order together cost a few microseconds.
"""

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from shared.postgres.pool import Postgres

_DURATION_BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LAG_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_SIZE_BUCKETS_CHANGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MAX_LABEL_VALUES = 64


GAUGES = {
    # every service
    "ticketrail_broker_connected": "1 while the publisher is connected",
    "ticketrail_mirror_available": "0 while the mirror's breaker is open",
    "ticketrail_postgres_connections": (
        "Connections of the pool (in use, idle, maximum) and callers that wait for a connection"
    ),
    "ticketrail_heartbeat_age_seconds": (
        "Seconds since the last heartbeat in the log was sent; in the worker by path, since its sink stored one"
    ),
    # orders
    "ticketrail_journal_entries": "Changes that wait in the journal",
    "ticketrail_journal_bytes": "Bytes of the changes that wait in the journal",
    "ticketrail_journal_open": "0 while the journal cannot be used",
    "ticketrail_journal_damaged": "Damaged entries of the journal, which are not sent",
    "ticketrail_journal_files_aside": "Set-aside files of all journals in the folder, which an operator must look at",
    # the worker
    "ticketrail_heartbeat_lag_seconds": "Seconds from sending to storing the last heartbeat of this path",
    "ticketrail_held_messages": "Messages that were taken from the lanes and are not acknowledged",
    "ticketrail_holding": "1 while PostgreSQL is unavailable and batches are held",
    "ticketrail_mirror_warm": "1 while the mirror takes claims",
    "ticketrail_feed_stalled_seconds": "Seconds for which an open transaction has held back the feed",
    "ticketrail_claims_unfinished": "Stale claims whose last attempt to finish them failed",
    "ticketrail_ledger_resent": "Changes of the log that the ledger has sent to their lane again",
    "ticketrail_ledger_republished": "Changes of PostgreSQL that the ledger has published to the log again",
    "ticketrail_ledger_age_seconds": "Seconds since the leader of the ledger wrote a checkpoint",
    "ticketrail_ledger_open": "Changes that only the log or only PostgreSQL had at the newest checkpoint",
    "ticketrail_ledger_expired_ranges": "Ranges of the log that expired before the ledger had compared them",
    "ticketrail_ledger_unexplained": "Changes of the log that ten repeats did not bring into PostgreSQL",
    "ticketrail_dead_letters_open": "Dead letters that are open or replaying",
    "ticketrail_conflicts_open": "Entities with an open conflict",
    "ticketrail_pending": "Changes that are not in PostgreSQL yet",
    "ticketrail_failed": "Pending changes that have failed",
    "ticketrail_restaurants_above_threshold": "Restaurants with more pending or failed changes than the settings allow",
    # the notifier
    "ticketrail_subscribers": "Open push streams",
    "ticketrail_window_changes": "Changes in the window, from which clients can resume",
    "ticketrail_open_bodies": "Requests whose bodies have not arrived completely",
    "ticketrail_slow_subscribers": "Slow clients that were disconnected since the start",
    "ticketrail_caught_up": "1 if the log is read to its end",
}
"""Name of each gauge -> its text in `/metrics`."""


class _Bounded:
    """A counter with one label. Values beyond the cap are counted as `other`."""

    def __init__(self, metric: Counter) -> None:
        self._metric = metric
        self._children: dict[str, Counter] = {}

    def inc(self, value: str, amount: int = 1) -> None:
        child = self._children.get(value)
        if child is None:
            name = value if len(self._children) < _MAX_LABEL_VALUES else "other"
            child = self._metric.labels(name)
            if name == value:
                self._children[value] = child
        child.inc(amount)


class Metrics:
    """The metrics registry of a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.content_type = CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """Returns all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def watch(self, name: str, look: Callable[[], float]) -> None:
        """Connects a gauge of `GAUGES`, which is read at each scrape. `look` must not block; it returns NaN for an
        unknown value."""
        Gauge(name, GAUGES[name], registry=self.registry).set_function(look)

    def watch_each(self, name: str, label: str, looks: Mapping[str, Callable[[], float]]) -> None:
        """Connects a gauge of `GAUGES` with one label. `looks`: maps each value of the label to a function like `look`
        of `watch`."""
        gauge = Gauge(name, GAUGES[name], [label], registry=self.registry)
        for value, look in looks.items():
            gauge.labels(value).set_function(look)

    def counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, registry=self.registry)

    def counter_by(self, name: str, documentation: str, label: str) -> _Bounded:
        return _Bounded(Counter(name, documentation, [label], registry=self.registry))

    def histogram(
        self, name: str, documentation: str, buckets: Sequence[float] = _DURATION_BUCKETS_SECONDS
    ) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)


def watch_pool(metrics: Metrics, postgres: Postgres) -> None:
    """Adds gauges of the connections to PostgreSQL."""
    metrics.watch_each(
        "ticketrail_postgres_connections",
        "state",
        {
            "in_use": lambda: postgres.connections[0],
            "idle": lambda: postgres.connections[1],
            "max": lambda: postgres.connections[2],
            "waiting": lambda: postgres.waiting,
        },
    )


class HttpMetrics:
    """Metrics of an HTTP service: replies, refusals and durations."""

    def __init__(self, metrics: Metrics) -> None:
        self._answers = Counter(
            "ticketrail_http_answers", "Replies by route and status", ["route", "status"], registry=metrics.registry
        )
        self._seconds = Histogram(
            "ticketrail_http_answer_seconds",
            "Seconds from the request to the first byte of the reply",
            ["route"],
            buckets=_DURATION_BUCKETS_SECONDS,
            registry=metrics.registry,
        )
        self._refused = metrics.counter_by("ticketrail_refused", "Refused requests by error code", "code")
        self._bound: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts a reply and its duration. `route`: method and path template."""
        bound = self._bound.get((route, status))
        if bound is None:
            bound = self._answers.labels(route, str(status)), self._seconds.labels(route)
            self._bound[route, status] = bound
        bound[0].inc()
        bound[1].observe(seconds)

    def refused(self, code: str) -> None:
        self._refused.inc(code)


class RailMetrics:
    """Metrics of the commit, in every process that commits changes."""

    def __init__(self, metrics: Metrics) -> None:
        self.accepted = metrics.counter_by("ticketrail_accepted", "Accepted changes by event", "event")
        self.durable = metrics.counter_by(
            "ticketrail_durable", "Changes made durable, by place (broker, journal)", "where"
        )
        self.per_message = metrics.histogram(
            "ticketrail_message_changes", "Changes in one message", _SIZE_BUCKETS_CHANGES
        )
        self.claims_lost = metrics.counter("ticketrail_claims_lost", "Claims that another change won")
        self.claims_finished = metrics.counter("ticketrail_claims_finished", "Stale claims that this process finished")


class ReadMetrics:
    """Metrics of reads by id."""

    def __init__(self, metrics: Metrics) -> None:
        self.mirror = metrics.counter_by(
            "ticketrail_mirror_reads", "Reads by id (hit, miss, unavailable) and repairs of the mirror", "result"
        )


class WriterMetrics:
    """Metrics of the PostgreSQL writer and its retry ladder."""

    def __init__(self, metrics: Metrics) -> None:
        self.batch = metrics.histogram("ticketrail_batch_changes", "Changes in one batch", _SIZE_BUCKETS_CHANGES)
        self.write_seconds = metrics.histogram(
            "ticketrail_batch_write_seconds", "Seconds from taking a batch to its commit"
        )
        self.lag = metrics.histogram(
            "ticketrail_postgres_lag_seconds",
            "Seconds from accepting a change to its commit in PostgreSQL",
            _LAG_BUCKETS_SECONDS,
        )
        self.mirror_lag = metrics.histogram(
            "ticketrail_mirror_lag_seconds",
            "Seconds from accepting a change until the mirror writer has applied it",
            _LAG_BUCKETS_SECONDS,
        )
        self.retries = metrics.counter_by("ticketrail_retries", "Changes sent to a retry queue by attempt", "attempt")
        self.dead = metrics.counter_by("ticketrail_dead", "Changes sent to a dead-letter queue by reason", "reason")
        self.dead_letters = metrics.counter_by(
            "ticketrail_dead_letters_kept", "Deaths stored as dead letters by reason", "reason"
        )


class PushMetrics:
    """Metrics of the notifier."""

    def __init__(self, metrics: Metrics) -> None:
        self.events = metrics.counter("ticketrail_push_events", "Events handed to the hub")
        self.lag = metrics.histogram(
            "ticketrail_push_lag_seconds", "Seconds from accepting a change to its push", _LAG_BUCKETS_SECONDS
        )
