"""The request log: a line for each request, with its user and restaurant, and no line of another format in the file."""

import io
import json
from typing import Any
from uuid import uuid4

import pytest

from shared.http.request_log import RequestLog
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, expect, register_restaurant
from tests.rigs.system import SERVICES, System, eventually


@pytest.fixture
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


def lines_of(system: System, service: str) -> list[dict[str, Any]]:
    """Returns the lines of a service. Fails if one is not JSON."""
    found = []
    for line in (system.directory / f"{service}.log").read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            pytest.fail(f"{service} has written a line of another format: {line!r}")
    return found


async def logged(system: System, request_id: str, service: str = "orders") -> dict[str, Any]:
    async def look() -> list[dict[str, Any]]:
        return [
            line
            for line in lines_of(system, service)
            if line["event"] == "request" and line["request_id"] == request_id
        ]

    [found] = await eventually(look, what="the line of the request", until=bool)
    return found


async def test_request_is_logged_with_its_route_status_user_and_restaurant(
    system: System, restaurant: RestaurantRig
) -> None:
    good, missing, stranger, nowhere = (f"r-{uuid4()}" for _ in range(4))
    async with restaurant.client() as staff:
        reply = await staff.get("/api/orders?limit=1", headers={"X-Request-Id": good})
        expect(reply)
        await staff.get(f"/api/orders/{uuid4()}", headers={"X-Request-Id": missing})
    async with http_client(base_url=system.urls["orders"]) as nobody:
        await nobody.post("/api/orders", json={}, headers={"X-Request-Id": stranger})
        await nobody.get("/no/such/route", headers={"X-Request-Id": nowhere})
    line = await logged(system, good)
    assert (line["service"], line["level"], line["method"], line["route"]) == ("orders", "info", "GET", "/api/orders")
    assert (line["status"], line["user"], line["restaurant"]) == (200, restaurant.staff_id, restaurant.id)
    assert line["trace_id"] == reply.headers["x-trace-id"]
    assert 0 < line["ms"] < 60_000
    assert "limit" not in json.dumps(line), "the line has the query"
    line = await logged(system, missing)
    assert (line["level"], line["route"], line["status"]) == ("warning", "/api/orders/{order_id}", 404)
    line = await logged(system, stranger)
    assert (line["status"], line["user"], line["restaurant"]) == (401, None, None)
    line = await logged(system, nowhere)
    assert (line["status"], line["route"]) == (404, None)


async def test_logs_of_all_services_have_json_lines_alone_and_none_of_health_or_metrics(system: System) -> None:
    request_id = f"r-{uuid4()}"
    for service in SERVICES:
        async with http_client(base_url=system.urls[service]) as client:
            for path in ("/health/live", "/health/ready", "/metrics"):
                await client.get(path, headers={"X-Request-Id": request_id})
            if service != "worker":  # it has no other routes and no request log
                later = f"r-{uuid4()}"
                await client.get("/nowhere", headers={"X-Request-Id": later})
                await logged(system, later, service)
        lines = lines_of(system, service)
        assert {"started"} <= {line["event"] for line in lines} or service == "worker"
        assert any("granian" in line["event"] for line in lines), "the lines of the HTTP server are missing"
        assert not [line for line in lines if line.get("request_id") == request_id]


@pytest.mark.parametrize(
    ("level", "logged_statuses"),
    [("info", [200, 304, 404, 499, 503]), ("warning", [404, 499, 503]), ("error", [503]), ("off", [])],
)
async def test_setting_is_the_lowest_level_that_is_logged(level: str, logged_statuses: list[int]) -> None:
    output = io.StringIO()
    request_log = RequestLog(level, "orders", output)
    for status in (200, 304, 404, 0, 503):
        scope = {"path": "/api/orders", "method": "GET"}
        request_log.write(scope, status=status, began=0.0, request_id="r", trace_id="t")
    request_log.flush()
    assert [json.loads(line)["status"] for line in output.getvalue().splitlines()] == logged_statuses


async def test_lines_are_written_whole_and_in_order_and_none_waits_for_long() -> None:
    class Writes(list[str]):
        def write(self, text: str) -> None:
            assert text.endswith("}\n")
            self.append(text)

    writes = Writes()
    request_log = RequestLog("info", "orders", writes)
    for number in range(100):
        scope = {"path": "/api/orders", "method": "GET"}
        request_log.write(scope, status=200, began=0.0, request_id=str(number), trace_id="t")

    async def written() -> int:
        return "".join(writes).count("\n")

    assert await eventually(written, what="all lines", until=lambda lines: lines == 100) == 100
    assert all(len(text) <= 4_096 for text in writes), "a pipe would mix the line with one of another process"
    assert len(writes) < 20
    assert [json.loads(line)["request_id"] for line in "".join(writes).splitlines()] == [str(n) for n in range(100)]
