"""Metrics: what Prometheus reads from `/metrics`, one registry per process. docs/metrics.md says what each is for.

Labels are bounded: routes by their templates, codes and reasons by a closed list or a cap; never an id or a tenant.
What exists anyway (depths, ages, connections) is read when somebody scrapes, by `watch`; what is counted on the way of
an order costs a few microseconds in all.
"""

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from shared.postgres.pool import Postgres

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LAGS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MOST_VALUES = 64


class _Bounded:
    """Children of a metric by one label, made once each; past the cap they are counted as `other`."""

    def __init__(self, metric: Counter) -> None:
        self._metric = metric
        self._children: dict[str, Counter] = {}

    def inc(self, value: str, amount: int = 1) -> None:
        child = self._children.get(value)
        if child is None:
            name = value if len(self._children) < _MOST_VALUES else "other"
            child = self._metric.labels(name)
            if name == value:
                self._children[value] = child
        child.inc(amount)


class Metrics:
    """All that any service counts; each shows what it has touched, and zero for the rest of its own kind."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.content_type = CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def watch(self, name: str, documentation: str, look: Callable[[], float]) -> None:
        """A gauge that is read at each scrape. `look` must not wait, and gives NaN for what is not known."""
        Gauge(name, documentation, registry=self.registry).set_function(look)

    def watch_each(self, name: str, documentation: str, label: str, looks: Mapping[str, Callable[[], float]]) -> None:
        gauge = Gauge(name, documentation, [label], registry=self.registry)
        for value, look in looks.items():
            gauge.labels(value).set_function(look)

    def counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, registry=self.registry)

    def counter_by(self, name: str, documentation: str, label: str) -> _Bounded:
        return _Bounded(Counter(name, documentation, [label], registry=self.registry))

    def histogram(self, name: str, documentation: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)


def watch_pool(metrics: Metrics, postgres: Postgres) -> None:
    metrics.watch_each(
        "ticketrail_postgres_connections",
        "Connections of the pool: in use, idle, at most; and callers that wait for one",
        "state",
        {
            "in_use": lambda: postgres.connections[0],
            "idle": lambda: postgres.connections[1],
            "most": lambda: postgres.connections[2],
            "waiting": lambda: postgres.waiting,
        },
    )


class HttpMetrics:
    """Of every HTTP service: answers and refusals, and how long they took."""

    def __init__(self, metrics: Metrics) -> None:
        self._answers = Counter(
            "ticketrail_http_answers", "Answers, by route and status", ["route", "status"], registry=metrics.registry
        )
        self._seconds = Histogram(
            "ticketrail_http_answer_seconds",
            "From the request to the first byte of the answer",
            ["route"],
            buckets=_SECONDS,
            registry=metrics.registry,
        )
        self._refused = metrics.counter_by("ticketrail_refused", "Refused requests, by error code", "code")
        self._bound: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """`route` with its method, as a template."""
        bound = self._bound.get((route, status))
        if bound is None:
            bound = self._answers.labels(route, str(status)), self._seconds.labels(route)
            self._bound[route, status] = bound
        bound[0].inc()
        bound[1].observe(seconds)

    def refused(self, code: str) -> None:
        self._refused.inc(code)


class RailMetrics:
    """Of the commit: wherever changes are made."""

    def __init__(self, metrics: Metrics) -> None:
        self.accepted = metrics.counter_by("ticketrail_accepted", "Changes that were accepted, by event", "event")
        self.durable = metrics.counter_by(
            "ticketrail_durable", "Changes made durable, by where: broker, journal", "where"
        )
        self.per_message = metrics.histogram("ticketrail_message_changes", "Changes in one message", _SIZES)
        self.claims_lost = metrics.counter("ticketrail_claims_lost", "Claims that another change won")
        self.claims_finished = metrics.counter(
            "ticketrail_claims_finished", "Claims that their owner left behind, finished here"
        )


class ReadMetrics:
    """Of reads by id."""

    def __init__(self, metrics: Metrics) -> None:
        self.mirror = metrics.counter_by(
            "ticketrail_mirror_reads", "Reads by id: hit, miss, away; and repairs", "result"
        )


class WriterMetrics:
    """Of the PostgreSQL writer and its ladder."""

    def __init__(self, metrics: Metrics) -> None:
        self.batch = metrics.histogram("ticketrail_batch_changes", "Changes in one batch", _SIZES)
        self.write_seconds = metrics.histogram("ticketrail_batch_write_seconds", "From taking a batch to its commit")
        self.lag = metrics.histogram(
            "ticketrail_postgres_lag_seconds", "From accepting a change to its commit in PostgreSQL", _LAGS
        )
        self.mirror_lag = metrics.histogram(
            "ticketrail_mirror_lag_seconds", "From accepting a change to the mirror writer's having applied it", _LAGS
        )
        self.retries = metrics.counter_by(
            "ticketrail_retries", "Changes sent up the retry ladder, by attempt", "attempt"
        )
        self.dead = metrics.counter_by("ticketrail_dead", "Changes sent to a dead queue, by class of error", "reason")
        self.letters = metrics.counter_by(
            "ticketrail_dead_letters_kept", "Deaths kept as dead letters, by class of error", "reason"
        )


class PushMetrics:
    """Of the notifier."""

    def __init__(self, metrics: Metrics) -> None:
        self.events = metrics.counter("ticketrail_push_events", "Events handed to the hub")
        self.lag = metrics.histogram("ticketrail_push_lag_seconds", "From accepting a change to its push", _LAGS)
