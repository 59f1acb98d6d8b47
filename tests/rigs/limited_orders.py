"""An orders instance with small rate limits, a trusted proxy and configured origins, and an address for
each client."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, made
from tests.rigs.system import System

BURST_REQUESTS, ADDRESS_BURST_REQUESTS = 6, 12


ORIGIN = "https://app.example"


addresses = (f"203.0.{number // 250}.{number % 250 + 1}" for number in itertools.count())


async def new_restaurant(system: System, limited: str) -> RestaurantRig:
    """Registers a restaurant from a new address, because registrations are limited too."""
    slug = f"shop-{uuid4().hex[:12]}"
    body = {"name": slug, "slug": slug, "email": f"{slug}@shop.example", "password": "long enough to be good"}
    async with http_client(base_url=limited, headers=headers_of(), timeout=10.0) as client:
        data = made(await client.post("/api/auth/register-restaurant", json=body))
    session = data["session"]
    admin, token = session["user"]["id"], session["access_token"]
    return RestaurantRig(system, data["restaurant"]["id"], slug, admin, token, staff_id=str(uuid4()))


def headers_of(token: str | None = None, *, address: str | None = None) -> dict[str, str]:
    found = {"X-Forwarded-For": address or next(addresses)}
    return found if token is None else {**found, "Authorization": f"Bearer {token}"}


@asynccontextmanager
async def limited_orders(system: System) -> AsyncIterator[str]:
    """Starts an orders instance with small limits that accepts pages of other origins; yields its URL."""
    async with system.another_orders(
        "limited",
        restaurant_burst_requests=BURST_REQUESTS,
        restaurant_requests_per_second=0.1,
        address_burst_requests=ADDRESS_BURST_REQUESTS,
        address_requests_per_second=0.1,
        cors_origins=f"{ORIGIN}, https://other.example",
    ) as url:
        yield url
