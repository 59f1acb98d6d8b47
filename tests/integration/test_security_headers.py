"""Security headers of every kind of reply."""

import re
from typing import Any
from uuid import uuid4

import httpx
import pytest
from litestar import Litestar, get

from shared.http.bodies import MAX_BODY_BYTES
from shared.http.error_replies import EXCEPTION_HANDLERS
from shared.http.response_headers import ResponseHeaders
from shared.security.tokens import Role
from tests.rigs.http_client import http_client
from tests.rigs.limited_orders import ORIGIN
from tests.rigs.restaurant import register_restaurant
from tests.rigs.system import System

SAFE = {
    "strict-transport-security": re.compile(r"max-age=\d{8}; includeSubDomains"),
    "x-content-type-options": re.compile("nosniff"),
    "x-frame-options": re.compile("DENY"),
    "referrer-policy": re.compile("no-referrer"),
    "content-security-policy": re.compile("default-src 'none'; .*frame-ancestors 'none'.*"),
    "x-request-id": re.compile("[!-~]{1,128}"),
    "x-trace-id": re.compile("[0-9a-f]{32}"),
}


def check(reply: httpx.Response) -> None:
    for name, pattern in SAFE.items():
        found = reply.headers.get_list(name)
        assert len(found) == 1, (reply.request.url, reply.status_code, name, found)
        assert pattern.fullmatch(found[0]), (name, found)


@pytest.mark.parametrize("service", ["orders", "sync", "notifier"])
async def test_every_kind_of_reply_has_the_security_headers(system: System, service: str) -> None:
    async with system.client(service=service) as client:
        for method, path, status in (
            ("GET", "/health/live", 200),
            ("GET", "/health/ready", 200),
            ("GET", "/metrics", 200),
            ("GET", "/api-docs", 200),
            ("GET", "/api-docs/openapi.json", 200),
            ("GET", "/api-docs/files/start.js", 200),
            ("GET", "/api-docs/files/swagger-ui.css", 200),
            ("GET", "/api-docs/files/../../settings.py", 404),
            ("GET", "/api-docs/files/nothing.js", 404),
            ("GET", "/no/such/path", 404),
            ("GET", "/", 404),
            ("PATCH", "/health/live", 405),
        ):
            reply = await client.request(method, path)
            assert reply.status_code == status, path
            check(reply)
        check(await client.options("/no/such/path", headers={"Origin": ORIGIN}))
        check(await client.get("/health/live", headers={"Host": "a b"}))


async def test_replies_of_the_orders_api_have_the_security_headers(system: System) -> None:
    restaurant = await register_restaurant(system)
    dish = await restaurant.dish()
    async with restaurant.client(Role.ADMIN) as client:
        path = f"/api/menu/{dish['id']}"
        replies = {
            201: await client.post("/api/menu", json={"name": "Dosa", "price": 1, "category": "Mains"}),
            200: await client.get(path),
            304: await client.get(path, headers={"If-None-Match": '"1"'}),
            401: await client.get(path, headers={"Authorization": ""}),
            403: await client.get(path, headers={"Authorization": f"Bearer {system.token('operator')}"}),
            404: await client.get(f"/api/menu/{uuid4()}"),
            405: await client.patch(path),
            409: await client.put(path, json={"price": 2}, headers={"If-Match": '"7"'}),
            413: await client.post("/api/menu", content=b"x" * (MAX_BODY_BYTES + 1)),
            422: await client.put(path, json={"price": -1}),
        }
    for status, reply in replies.items():
        assert reply.status_code == status, reply.text
        check(reply)
        if status not in (304, 405):
            assert "ratelimit-limit" in reply.headers, status
        if status >= 400:
            assert reply.json()["error"]["trace_id"] == reply.headers["x-trace-id"]


async def test_event_stream_has_the_security_headers(system: System) -> None:
    async with system.client(service="notifier") as client, client.stream("GET", "/api/v1/sync/events") as reply:
        assert reply.status_code == 200
        check(reply)


async def test_internal_error_has_the_security_headers_and_hides_its_cause() -> None:
    @get("/broken", sync_to_thread=False)
    def broken() -> None:
        raise RuntimeError("postgresql://ticketrail:secret@db/")

    app: Any = ResponseHeaders(
        Litestar([broken], exception_handlers=EXCEPTION_HANDLERS, openapi_config=None, logging_config=None),
    )
    async with http_client(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        reply = await client.get("/broken")
    assert reply.status_code == 500
    check(reply)
    assert reply.json()["error"]["code"] == "internal"
    assert "secret" not in reply.text
    assert "RuntimeError" not in reply.text


@pytest.mark.parametrize("service", ["orders", "sync", "notifier"])
async def test_api_page_obeys_its_own_policy_and_loads_nothing_from_other_hosts(system: System, service: str) -> None:
    async with http_client(base_url=system.urls[service]) as client:
        page = await client.get("/api-docs")
        assert page.headers["content-type"].startswith("text/html")
        policy = dict(
            part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";") if part.strip()
        )
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(loaded) == 4
        assert all(path.startswith("/api-docs/files/") for path in loaded)
        # The page has no inline script, because the policy would not run it.
        assert not re.search(r"<script(?![^>]* src=)", page.text)
        assert " on" not in re.sub(r">[^<]*<", "><", page.text)
        for path in loaded:
            assert (await client.get(path)).status_code == 200
