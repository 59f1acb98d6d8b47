"""Pages of other origins: only configured ones may call the API."""

import re
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest

from shared.http.cors import cors
from shared.settings import Settings
from tests.rigs.http_client import http_client
from tests.rigs.limited_orders import ORIGIN, headers_of, limited_orders, new_restaurant
from tests.rigs.restaurant import RestaurantRig
from tests.rigs.system import System


@pytest.fixture(scope="module")
async def limited(system: System) -> AsyncIterator[str]:
    """URL of an orders instance with small limits."""
    async with limited_orders(system) as url:
        yield url


@pytest.fixture
async def restaurant(system: System, limited: str) -> RestaurantRig:
    return await new_restaurant(system, limited)


async def preflight(url: str, origin: str) -> httpx.Response:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization, content-type, if-match, idempotency-key",
    }
    async with http_client(base_url=url) as client:
        return await client.options(f"/api/orders/{uuid4()}", headers={**headers_of(), **asked})


def permissions_of(reply: httpx.Response) -> list[str]:
    return [name for name in reply.headers if name.startswith("access-control")]


async def test_pages_of_configured_origins_may_call(limited: str, restaurant: RestaurantRig) -> None:
    for origin in (ORIGIN, "https://other.example"):
        reply = await preflight(limited, origin)
        assert reply.status_code == 204
        assert reply.headers["access-control-allow-origin"] == origin
        allowed = reply.headers["access-control-allow-headers"].lower()
        assert {"authorization", "idempotency-key", "if-match", "last-event-id"} <= set(re.split(", *", allowed))
        assert "access-control-allow-credentials" not in reply.headers
    async with http_client(base_url=limited) as client:
        # Errors need the headers too, or a page could not show its user what was wrong.
        for path, token, status in (
            ("/api/menu", restaurant.token, 200),
            ("/api/menu", None, 401),
            ("/api/menu?limit=x", restaurant.token, 422),
            (f"/api/menu/{uuid4()}", restaurant.token, 404),
            ("/no/such/path", None, 404),
        ):
            reply = await client.get(path, headers={**headers_of(token), "Origin": ORIGIN})
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == ORIGIN, path
            exposed = set(re.split(", *", reply.headers["access-control-expose-headers"].lower()))
            assert {"etag", "retry-after", "ratelimit-remaining", "x-request-id", "x-trace-id"} <= exposed


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example.evil.example", "null", "http://app.example"]
)
async def test_pages_of_other_origins_may_not_call(
    system: System, limited: str, restaurant: RestaurantRig, origin: str
) -> None:
    unset = await preflight(system.urls["orders"], origin)
    for reply in (unset, await preflight(limited, origin)):
        assert (reply.status_code, reply.headers["allow"]) == (204, unset.headers["allow"])
        assert permissions_of(reply) == []
    async with http_client(base_url=limited) as client:
        reply = await client.get("/api/menu", headers={**headers_of(restaurant.token), "Origin": origin})
        assert reply.status_code == 200
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("service", ["orders", "sync", "notifier"])
async def test_no_other_origin_may_call_without_configured_origins(system: System, service: str) -> None:
    assert permissions_of(await preflight(system.urls[service], ORIGIN)) == []


def test_asterisk_allows_every_origin() -> None:
    found = cors(Settings(_env_file=None, cors_origins="*"))
    assert found is not None
    assert found.is_allow_all_origins
    assert not found.allow_credentials
