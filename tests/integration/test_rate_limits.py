"""Rate limits of restaurants and of addresses, over HTTP."""

from collections.abc import AsyncIterator

import pytest

from deploy.local.port_check import find_free
from shared.security.tokens import Role
from tests.rigs.http_client import http_client
from tests.rigs.limited_orders import (
    ADDRESS_BURST_REQUESTS,
    BURST_REQUESTS,
    addresses,
    headers_of,
    limited_orders,
    new_restaurant,
)
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


async def test_requests_of_a_restaurant_are_limited_across_addresses(
    limited: str, restaurant: RestaurantRig, system: System
) -> None:
    tokens = [restaurant.token, restaurant.token_of(Role.STAFF), restaurant.token_of(Role.CUSTOMER, session="s1")]
    async with http_client(base_url=limited) as client:
        for place in range(BURST_REQUESTS):
            reply = await client.get("/api/menu", headers=headers_of(tokens[place % 3]))
            assert reply.status_code == 200
            assert reply.headers["ratelimit-limit"] == str(BURST_REQUESTS)
            assert reply.headers["ratelimit-remaining"] == str(BURST_REQUESTS - 1 - place)
            assert int(reply.headers["ratelimit-reset"]) == (place + 1) * 10
        reply = await client.get("/api/menu", headers=headers_of(restaurant.token))
        assert reply.status_code == 429
        assert reply.json()["error"]["code"] == "rate_limited"
        assert 1 <= int(reply.headers["retry-after"]) <= 10
        assert (reply.headers["ratelimit-limit"], reply.headers["ratelimit-remaining"]) == (str(BURST_REQUESTS), "0")
        # Other restaurants continue, and requests without a valid token do not count for the restaurant.
        other = await new_restaurant(system, limited)
        assert (await client.get("/api/menu", headers=headers_of(other.token))).status_code == 200
        assert (await client.get("/api/menu", headers=headers_of("garbage"))).status_code == 401


async def test_requests_from_an_address_are_limited_across_callers(limited: str, restaurant: RestaurantRig) -> None:
    address = next(addresses)
    async with http_client(base_url=limited) as client:
        for place in range(ADDRESS_BURST_REQUESTS):
            # An address that the client itself puts in front changes nothing.
            headers = headers_of(address=f"{next(addresses)}, {address}")
            reply = await client.get("/api/menu", headers=headers)
            assert reply.status_code == 401
            assert reply.headers["ratelimit-remaining"] == str(ADDRESS_BURST_REQUESTS - 1 - place)
        for token in (None, restaurant.token):
            reply = await client.get("/api/menu", headers=headers_of(token, address=address))
            assert reply.status_code == 429
            assert 1 <= int(reply.headers["retry-after"]) <= 10
        assert (await client.get("/api/menu", headers=headers_of(restaurant.token))).status_code == 200
        # Health checks are not counted.
        for _ in range(ADDRESS_BURST_REQUESTS + 1):
            reply = await client.get("/health/live", headers=headers_of(address=address))
            assert reply.status_code == 200


async def test_service_without_redis_still_limits(system: System, restaurant: RestaurantRig) -> None:
    name, (port, unused_port) = "alone", find_free(2)
    system.urls[name] = f"http://127.0.0.1:{port}"
    system.start(
        "sync",
        alias=name,
        instance="auto",
        sync_port=port,
        redis_url=f"redis://127.0.0.1:{unused_port}/0",
        restaurant_burst_requests=BURST_REQUESTS,
        restaurant_requests_per_second=0.01,
    )
    try:
        await system.ready(name)
        async with http_client(base_url=system.urls[name], headers=headers_of(restaurant.token)) as client:
            replies = [await client.get("/api/sync/status") for _ in range(BURST_REQUESTS + 2)]
    finally:
        await system.stop(name)
    assert [reply.status_code for reply in replies] == [200] * BURST_REQUESTS + [429] * 2
    left = [int(reply.headers["ratelimit-remaining"]) for reply in replies]
    assert left == [*reversed(range(BURST_REQUESTS)), 0, 0]
