"""`ticketrail status`: metrics and health of all services on one screen.

Rates and percentiles cover the interval between two scrapes. A service that does not answer is shown as unavailable.
"""

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table
from rich.text import Text

from shared.settings import Settings
from shared.version import USER_AGENT

_TIMEOUT_SECONDS = 2.0

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class ServiceSample(Struct):
    """The state of one service at one moment. It has no samples if the service was unavailable."""

    url: str
    at: float
    state: str
    """`ready`, `not ready` or `unavailable`."""
    health: dict[str, Any]
    samples: Samples

    def value(self, name: str, **labels: str) -> float:
        """Returns the value of one sample, or NaN if there is no such sample."""
        return self.samples.get((name, tuple(sorted(labels.items()))), math.nan)

    def total(self, name: str, **labels: str) -> float:
        """Returns the sum of all series with this name and these labels."""
        required = set(labels.items())
        return sum(value for (found, has), value in self.samples.items() if found == name and required <= set(has))

    def sum_by(self, name: str, label: str) -> dict[str, float]:
        """Returns label value -> sum of the series that have this value."""
        found: dict[str, float] = {}
        for (series, has), value in self.samples.items():
            if series == name and (key := dict(has).get(label)) is not None:
                found[key] = found.get(key, 0.0) + value
        return found


def urls_of(settings: Settings) -> dict[str, str]:
    """Returns service -> URL. The setting `status_urls` replaces the defaults, because in containers each service has a
    host of its own."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104  (compared, not bound)
    own = {
        "orders": f"http://{host}:{settings.orders_port}",
        "sync-worker": f"http://{host}:{settings.worker_port}",
        "sync-api": f"http://{host}:{settings.sync_port}",
        "notifier": f"http://{host}:{settings.notifier_port}",
    }
    return settings.status_urls or own


def sample_services(urls: dict[str, str]) -> dict[str, ServiceSample]:
    """Asks all services at the same time. `urls`: service -> URL."""
    with ThreadPoolExecutor(len(urls)) as threads:
        return dict(zip(urls, threads.map(_sample_service, urls.values()), strict=True))


def _sample_service(url: str) -> ServiceSample:
    try:
        health, state = json.loads(_get(f"{url}/health/ready")), "ready"
    except urllib.error.HTTPError as error:
        health, state = _object(error.read()), "not ready"
    except (OSError, ValueError):
        return ServiceSample(url, time.monotonic(), "unavailable", {}, {})
    try:
        text = _get(f"{url}/metrics").decode()
    except OSError:
        return ServiceSample(url, time.monotonic(), "unavailable", health, {})
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return ServiceSample(url, time.monotonic(), state, health, samples)


def _get(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})  # noqa: S310
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:  # noqa: S310
        return bytes(reply.read())


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# -- facts -----------------------------------------------------------------------------------------------------


def percentile(before: ServiceSample, after: ServiceSample, name: str, share: float) -> float:
    """Returns the upper bound, in seconds, of the histogram bucket that contains this share of the observations between
    the two samples; NaN if there was no observation."""
    grown = {
        float(bound): after.sum_by(f"{name}_bucket", "le")[bound]
        - before.sum_by(f"{name}_bucket", "le").get(bound, 0.0)
        for bound in after.sum_by(f"{name}_bucket", "le")
    }
    total = max(grown.values(), default=0.0)
    if total <= 0:
        return math.nan
    return min(bound for bound, count in grown.items() if count >= share * total)


def facts(before: dict[str, ServiceSample], after: dict[str, ServiceSample]) -> dict[str, dict[str, Any]]:
    """Returns service -> the figures that the screen shows and `--json` prints. Units are seconds, counts, and shares
    from 0 to 1; None means unknown."""
    found: dict[str, dict[str, Any]] = {}
    for name, seen in after.items():
        found[name] = {"state": seen.state, "url": seen.url}
        if seen.samples and before[name].samples:
            values = {key: read(before[name], seen) for key, read in _FACTS[name].items()}
            found[name] |= {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in values.items()
            }
    return found


def _rate(name: str) -> Callable[[ServiceSample, ServiceSample], float]:
    return lambda before, after: (after.total(name) - before.total(name)) / max(after.at - before.at, 1e-6)


def _mean(name: str) -> Callable[[ServiceSample, ServiceSample], float]:
    def mean(before: ServiceSample, after: ServiceSample) -> float:
        count = after.total(f"{name}_count") - before.total(f"{name}_count")
        return (after.total(f"{name}_sum") - before.total(f"{name}_sum")) / count if count else math.nan

    return mean


def _current(name: str, **labels: str) -> Callable[[ServiceSample, ServiceSample], float]:
    return lambda _, after: after.value(name, **labels)


def _split(name: str, label: str) -> Callable[[ServiceSample, ServiceSample], dict[str, float]]:
    return lambda _, after: after.sum_by(name, label)


def _percentile(name: str, share: float) -> Callable[[ServiceSample, ServiceSample], float]:
    return lambda before, after: percentile(before, after, name, share)


def _hit_share(_: ServiceSample, after: ServiceSample) -> float:
    found = after.sum_by("ticketrail_mirror_reads_total", "result")
    reads = sum(found.get(result, 0.0) for result in ("hit", "miss", "unavailable"))
    return found.get("hit", 0.0) / reads if reads else math.nan


_POOL = {"PostgreSQL connections": _split("ticketrail_postgres_connections", "state")}
_FACTS: dict[str, dict[str, Callable[[ServiceSample, ServiceSample], Any]]] = {
    "orders": {
        "accepted per second": _rate("ticketrail_accepted_total"),
        "accepted": _split("ticketrail_accepted_total", "event"),
        "refused": _split("ticketrail_refused_total", "code"),
        "answer p50 seconds": _percentile("ticketrail_http_answer_seconds", 0.5),
        "answer p99 seconds": _percentile("ticketrail_http_answer_seconds", 0.99),
        "changes per message": _mean("ticketrail_message_changes"),
        "durable": _split("ticketrail_durable_total", "where"),
        "claims lost": _current("ticketrail_claims_lost_total"),
        "claims finished": _current("ticketrail_claims_finished_total"),
        "journal entries": _current("ticketrail_journal_entries"),
        "mirror hit share": _hit_share,
        "mirror repairs": lambda _, after: after.sum_by("ticketrail_mirror_reads_total", "result").get("repair", 0.0),
        "broker connected": _current("ticketrail_broker_connected"),
        "mirror available": _current("ticketrail_mirror_available"),
        **_POOL,
    },
    "sync-worker": {
        "heartbeat lag seconds": _split("ticketrail_heartbeat_lag_seconds", "path"),
        "PostgreSQL lag p99 seconds": _percentile("ticketrail_postgres_lag_seconds", 0.99),
        "mirror lag p99 seconds": _percentile("ticketrail_mirror_lag_seconds", 0.99),
        "changes per second": lambda before, after: (
            (after.total("ticketrail_batch_changes_sum") - before.total("ticketrail_batch_changes_sum"))
            / max(after.at - before.at, 1e-6)
        ),
        "changes per batch": _mean("ticketrail_batch_changes"),
        "held messages": _current("ticketrail_held_messages"),
        "retries by attempt": _split("ticketrail_retries_total", "attempt"),
        "dead": _split("ticketrail_dead_total", "reason"),
        "claims finished": _current("ticketrail_claims_finished_total"),
        "mirror warm": _current("ticketrail_mirror_warm"),
        **_POOL,
    },
    "sync-api": {"mirror available": _current("ticketrail_mirror_available"), **_POOL},
    "notifier": {
        "subscribers": _current("ticketrail_subscribers"),
        "events per second": _rate("ticketrail_push_events_total"),
        "push lag p99 seconds": _percentile("ticketrail_push_lag_seconds", 0.99),
        "window changes": _current("ticketrail_window_changes"),
        "slow subscribers": _current("ticketrail_slow_subscribers"),
        "caught up": _current("ticketrail_caught_up"),
    },
}


def screen(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Ticketrail", title_justify="left", show_lines=False, box=None, padding=(0, 2, 0, 0))
    for column in ("service", "what", "now"):
        table.add_column(column, style="bold" if column == "service" else "")
    styles = {"ready": "green", "not ready": "yellow", "unavailable": "red"}
    for name, values in found.items():
        table.add_row(name, Text(values["state"], style=styles[values["state"]]), values["url"])
        for what, value in values.items():
            if what not in ("state", "url"):
                table.add_row("", what, _text(value))
    return table


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items()) or "none"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"
