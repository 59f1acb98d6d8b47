"""`/metrics` and `ticketrail status` of a real system."""

import asyncio
import json
import re
from typing import Any
from uuid import uuid4

from prometheus_client.parser import text_string_to_metric_families

from shared.observability.metrics import Metrics, watch_pool
from shared.postgres.pool import Postgres
from shared.settings import Settings
from tests.rigs.http_client import http_client
from tests.rigs.system import ROOT, SERVICES, System, eventually

Samples = dict[str, float]
_PAGE = (ROOT / "docs" / "metrics.md").read_text()


async def scraped(system: System, name: str) -> Samples:
    async with http_client() as client:
        answer = await client.get(f"{system.urls[name]}/metrics")
    assert answer.status_code == 200
    return {
        sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def test_accepted_and_refused_orders_are_counted(system: System) -> None:
    before = await scraped(system, "orders")
    async with system.client() as client:
        for _ in range(3):
            assert (await client.post("/api/orders", json=system.order_body())).status_code == 201
        refused = await client.post("/api/orders", json=system.order_body(discount_amount=10**10))
        assert refused.status_code == 422
    after = await scraped(system, "orders")

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown("ticketrail_accepted_total|event=ticketrail.order.created.v1") == 3
    assert grown("ticketrail_refused_total|code=discount_above_subtotal") == 1
    assert grown("ticketrail_http_answers_total|route=POST /api/orders|status=201") == 3
    assert grown("ticketrail_http_answer_seconds_count|route=POST /api/orders") == 4
    assert grown("ticketrail_durable_total|where=broker") == 3
    assert after["ticketrail_journal_entries"] == 0
    assert after["ticketrail_broker_connected"] == 1


async def test_lag_of_a_change_is_measured_at_every_sink(system: System) -> None:
    before = {name: await scraped(system, name) for name in ("worker", "notifier")}
    async with system.client() as client:
        assert (await client.post("/api/orders", json=system.order_body())).status_code == 201

    async def grown() -> list[float]:
        after = {name: await scraped(system, name) for name in ("worker", "notifier")}
        sinks = (
            ("worker", "ticketrail_postgres_lag_seconds_count"),
            ("worker", "ticketrail_mirror_lag_seconds_count"),
            ("worker", "ticketrail_batch_changes_sum"),
            ("notifier", "ticketrail_push_lag_seconds_count"),
        )
        return [after[service][name] - before[service][name] for service, name in sinks]

    await eventually(grown, what="one change at every sink", until=lambda counts: min(counts) >= 1)


async def test_reads_are_counted_as_hits_and_misses_of_the_mirror(system: System) -> None:
    async with system.client() as client:
        id_ = (await client.post("/api/orders", json=system.order_body())).json()["data"]["id"]
        before = await scraped(system, "orders")
        assert (await client.get(f"/api/orders/{id_}")).status_code == 200
        assert (await client.get(f"/api/orders/{uuid4()}")).status_code == 404
    after = await scraped(system, "orders")
    for result in ("hit", "miss"):
        name = f"ticketrail_mirror_reads_total|result={result}"
        assert after[name] - before.get(name, 0.0) == 1, result


async def test_lost_claims_are_counted(system: System) -> None:
    before = await scraped(system, "orders")
    async with system.client() as client:
        id_ = (await client.post("/api/orders", json=system.order_body())).json()["data"]["id"]

        async def race() -> float:
            await asyncio.gather(*(client.put(f"/api/orders/{id_}", json={"notes": str(n)}) for n in range(10)))
            after = await scraped(system, "orders")
            return after["ticketrail_claims_lost_total"] - before["ticketrail_claims_lost_total"]

        assert await eventually(race, what="a lost claim") >= 1


async def test_callers_that_wait_for_a_connection_are_counted(system: System) -> None:
    postgres = Postgres(system.database_url("ticketrail_api"), Settings(), size=1)
    metrics = Metrics()
    watch_pool(metrics, postgres)

    async def seen(state: str) -> bool:
        return f'ticketrail_postgres_connections{{state="{state}"}} 1.0' in metrics.text().decode()

    async def also() -> None:
        async with postgres.connection():
            pass

    try:
        async with postgres.connection():
            assert await seen("in_use") and not await seen("waiting")
            second = asyncio.create_task(also())
            await eventually(lambda: seen("waiting"), what="a second caller that waits")
        await second
        assert await seen("idle") and not await seen("waiting")
    finally:
        await postgres.close()


async def test_status_shows_every_service_and_names_the_unavailable_one(system: System) -> None:
    async def status() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await system.cli("status", "--json"))
        assert found.pop("system") == "the backends that the environment names"  # every other line names a service
        return found

    def all_ready(found: dict[str, Any]) -> bool:
        states = {name: one["state"] for name, one in found.items()}
        return (
            states == dict.fromkeys(("orders", "sync-worker", "sync-api", "notifier"), "ready")
            and found["orders"].get("broker connected") == 1
            and found["sync-worker"].get("mirror warm") == 1
        )

    # The test repeats the command: a worker is not ready if its last heartbeat is three seconds old, and `status`
    # ignores a reply that takes two seconds.
    await eventually(status, what="every service ready", until=all_ready)
    env = dict(system.env)
    try:
        system.env["TICKETRAIL_NOTIFIER_PORT"] = "1"
        found = await eventually(
            status, what="an orders service that is ready", until=lambda seen: seen["orders"]["state"] == "ready"
        )
    finally:
        system.env = env
    assert found["notifier"]["state"] == "unavailable"


async def test_documented_and_existing_metrics_are_the_same(system: System) -> None:
    async with http_client() as client:
        texts = [(await client.get(f"{url}/metrics")).text for url in (system.urls[name] for name in SERVICES)]
    exported = {
        name for text in texts for name in re.findall(r"^# TYPE (ticketrail_\w+) (?!gauge.*_created)", text, re.M)
    }
    exported = {name.removesuffix("_total") for name in exported if not name.endswith("_created")}
    documented = {name.removesuffix("_total") for name in re.findall(r"`(ticketrail_\w+)`", _PAGE)}
    assert exported == documented


def test_labels_beyond_the_limit_are_counted_together() -> None:
    metrics = Metrics()
    counted = metrics.counter_by("ticketrail_test", "For this test", "code")
    for number in range(100):
        counted.inc(f"code-{number}")
    text = metrics.text().decode()
    assert text.count('ticketrail_test_total{code="code-') == 64
    assert 'ticketrail_test_total{code="other"} 36.0' in text
