"""Requests with bodies that never arrive completely: the server ends them, and still serves honest clients."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, made, register_restaurant
from tests.rigs.system import System

HALF_OPEN = 2_000
PER_ADDRESS = 50
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


@pytest.fixture(scope="module")
async def patient(system: System) -> AsyncIterator[str]:
    """URL of an orders instance that waits long for bodies, so that only the limit of an address ends one."""
    async with system.another_orders("patient", body_timeout_seconds=600, address_open_bodies=PER_ADDRESS) as url:
        yield url


@pytest.fixture(scope="module")
async def strict(system: System) -> AsyncIterator[str]:
    """URL of an orders instance that ends each body after a moment."""
    async with system.another_orders("strict", body_timeout_seconds=1.0, address_open_bodies=PER_ADDRESS) as url:
        yield url


async def begin(url: str, path: str, *headers: str, address: str = "198.51.100.1") -> Connection:
    """Sends a request and a half of its body."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Length: 100", f"X-Forwarded-For: {address}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode() + b'{"items": [')
    await writer.drain()
    return reader, writer


async def begin_many(url: str, token: str, count: int) -> list[Connection]:
    found: list[Connection] = []
    for start in range(0, count, 100):
        numbers = range(start, min(count, start + 100))
        found += await asyncio.gather(
            *(
                begin(
                    url,
                    "/api/orders",
                    f"Authorization: Bearer {token}",
                    address=f"198.51.{number // PER_ADDRESS}.7",
                )
                for number in numbers
            )
        )
    return found


async def end_of(connection: Connection) -> bytes:
    """Returns what the service sends until it closes the connection."""
    reader, writer = connection
    try:
        return await asyncio.wait_for(reader.read(), 120)
    finally:
        writer.close()


async def test_orders_are_placed_beside_2000_half_open_requests(
    system: System, restaurant: RestaurantRig, strict: str
) -> None:
    dish = (await restaurant.dish())["id"]
    order = {"items": [{"menu_item_id": dish, "quantity": 1}]}
    took: list[float] = []
    headers = {"Authorization": f"Bearer {restaurant.token}", "X-Forwarded-For": "203.0.113.7"}
    async with http_client(base_url=strict, headers=headers, timeout=60.0) as honest:

        async def place() -> None:
            began = time.monotonic()
            made(await honest.post("/api/orders", json=order))
            took.append(time.monotonic() - began)

        await place()
        alone = took.pop()
        opening = asyncio.create_task(begin_many(strict, restaurant.token, HALF_OPEN))
        while not opening.done() or len(took) < 100:
            await place()
    replies = await asyncio.gather(*map(end_of, await opening))
    p99 = sorted(took)[int(len(took) * 0.99)]
    print(f"{len(took)} orders beside {HALF_OPEN} half-open requests: p99 {p99:.3f} s, alone {alone:.3f} s")
    assert {reply.partition(b"\r\n")[0] for reply in replies} == {b"HTTP/1.1 408 Request Timeout"}
    body = json.loads(replies[0].partition(b"\r\n\r\n")[2])
    assert (body["error"]["code"], body["error"]["message"]) == ("request_timeout", "the body did not arrive in time")


async def test_address_with_too_many_unfinished_bodies_loses_the_oldest_and_can_still_order(
    restaurant: RestaurantRig, patient: str
) -> None:
    dish = (await restaurant.dish())["id"]
    token = f"Authorization: Bearer {restaurant.token}"
    many = [await begin(patient, "/api/orders", token) for _ in range(PER_ADDRESS + 1)]
    assert b"too many requests from this address" in await end_of(many[0])
    headers = {"Authorization": f"Bearer {restaurant.token}", "X-Forwarded-For": "198.51.100.1"}
    async with http_client(base_url=patient, headers=headers, timeout=60.0) as client:
        body = {"items": [{"menu_item_id": dish, "quantity": 1}]}
        for _ in range(3):
            made(await client.post("/api/orders", json=body))
    for reader, writer in many[4:]:
        assert not reader.at_eof()
        writer.close()


async def test_slow_body_that_is_steady_enough_is_read(restaurant: RestaurantRig, system: System) -> None:
    """20,000 bytes give the body a second more than the shortest deadline."""
    async with system.another_orders("steady", body_timeout_seconds=0.5, body_bytes_per_second=100) as url:
        body = json.dumps({"label": "Slow", "seats": 2}).encode().ljust(20_000)

        async def parts() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 4_000):
                yield body[start : start + 4_000]
                await asyncio.sleep(0.2)  # the tested pause, which makes the body late without its bytes

        async with http_client(base_url=url, headers={"Authorization": f"Bearer {restaurant.token}"}) as client:
            made(await client.post("/api/tables", content=parts()))


async def test_every_service_ends_a_body_that_does_not_come(system: System, restaurant: RestaurantRig) -> None:
    sync_token = f"x-sync-token: {system.demo['sync_token']}"
    begun = await asyncio.gather(
        begin(system.urls["sync"], "/api/sync/order", sync_token),
        begin(system.urls["orders"], "/api/tables", f"Authorization: Bearer {restaurant.token}"),
        begin(system.urls["orders"], "/api/orders", "Authorization: Bearer garbage"),
        begin(system.urls["notifier"], "/api/v1/sync/events", f"Authorization: Bearer {restaurant.token}"),
    )
    replies = await asyncio.gather(*map(end_of, begun))
    assert [reply.split(b" ")[1] for reply in replies] == [b"408", b"408", b"401", b"405"]
