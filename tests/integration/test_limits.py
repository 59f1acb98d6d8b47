"""The checks before every handler: rate limits, body sizes, other origins and security headers. They run on the
shared system, and on a second orders instance with small limits and a trusted proxy."""

import asyncio
import itertools
import re
import sys
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from litestar import Litestar, get
from msgspec import Struct

from deploy.local.port_check import find_free
from shared.errors import InvalidInput
from shared.http.bodies import MAX_BODY_BYTES, read_body
from shared.http.cors import cors
from shared.http.error_replies import EXCEPTION_HANDLERS
from shared.http.limits import Rate, TokenBucket, counted_as
from shared.http.response_headers import ResponseHeaders
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.security.tokens import Role
from shared.settings import Settings
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, made
from tests.rigs.servers import Servers
from tests.rigs.system import ROOT, System, eventually

BURST_REQUESTS, ADDRESS_BURST_REQUESTS = 6, 12
ORIGIN = "https://app.example"
NO_REFILL_PER_SECOND = 0.000_001  # tokens per second: none returns during a test
_addresses = (f"203.0.{number // 250}.{number % 250 + 1}" for number in itertools.count())


@pytest.fixture
async def mirrors(servers: Servers) -> AsyncIterator[list[Mirror]]:
    """Two clients of one Redis server."""
    found = [Mirror(servers.redis.url, timeout=5.0, stale_seconds=2.0) for _ in range(2)]
    yield found
    for mirror in found:
        await mirror.close()


def new_name() -> str:
    return uuid4().hex


# -- the bucket --------------------------------------------------------------------------------------------------


async def test_two_clients_together_take_no_more_tokens_than_there_are(mirrors: list[Mirror]) -> None:
    name = new_name()
    replies = await asyncio.gather(*(mirrors[n % 2].take_tokens(name, 100, NO_REFILL_PER_SECOND, 7) for n in range(40)))
    assert sum(taken for taken, _, _ in replies) == 100
    # The last successful call got the rest of a share; later calls got nothing.
    assert sorted(taken for taken, _, _ in replies) == [0] * 25 + [2] + [7] * 14
    assert all(wait > 0 for taken, _, wait in replies if not taken)


async def test_two_processes_together_take_no_more_tokens_than_there_are(servers: Servers) -> None:
    code = f"""
import asyncio
from shared.http.limits import Rate, TokenBucket
from shared.mirror.mirror import Mirror
async def main():
    mirror = Mirror({servers.redis.url!r}, timeout=5.0, stale_seconds=2.0)
    bucket = TokenBucket(mirror, "test", Rate(200, {NO_REFILL_PER_SECOND}))
    waits = [(await bucket.take({new_name()!r}))[0] for _ in range(200)]
    print(waits.count(0.0))
asyncio.run(main())
"""
    started = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        for _ in range(3)
    ]
    got = [int((await process.communicate())[0]) for process in started]
    assert sum(got) == 200, got


async def test_bucket_fills_steadily_and_reports_the_wait(mirrors: list[Mirror]) -> None:
    # The bucket fills so slowly that no token returns during these calls.
    bucket, name = TokenBucket(mirrors[0], "test", Rate(2, 0.01)), new_name()
    assert [await bucket.take(name) for _ in range(2)] == [(0.0, 1), (0.0, 0)]
    wait, left = await bucket.take(name)
    assert 0 < wait <= 100
    assert left == 0
    quick = TokenBucket(mirrors[0], "test", Rate(2, 20.0))

    async def again() -> bool:
        return (await quick.take(name))[0] == 0.0

    await eventually(again, what="a returned token")


async def counted(bucket: TokenBucket, monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> list[int]:
    """Returns a list that receives the number of tokens that each call of the shared bucket takes."""
    taken: list[int] = []
    really_take = mirror.take_tokens

    async def take(*arguments: Any) -> tuple[int, int, float]:
        found = await really_take(*arguments)
        taken.append(found[0])
        return found

    monkeypatch.setattr(mirror, "take_tokens", take)
    return taken


async def test_many_callers_of_a_spent_share_take_one_new_share(
    mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each caller took its own share and only the last one was kept, the limit would apply too early."""
    # A share that expires during the calls would be requested again.
    bucket, name = TokenBucket(mirrors[0], "test", Rate(10_000, 5_000.0), max_token_age_seconds=60.0), new_name()
    taken = await counted(bucket, monkeypatch, mirrors[0])
    waits = await asyncio.gather(*(bucket.take(name) for _ in range(1_000)))
    assert {wait for wait, _ in waits} == {0.0}
    assert sum(taken) == 1_000
    assert len(taken) == 10


async def test_empty_bucket_is_not_asked_again_before_it_has_a_token(
    mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, name = TokenBucket(mirrors[0], "test", Rate(1, 0.01)), new_name()
    taken = await counted(bucket, monkeypatch, mirrors[0])
    waits = [(await bucket.take(name))[0] for _ in range(50)]
    assert waits[0] == 0.0
    assert all(wait > 0 for wait in waits[1:])
    assert taken == [1, 0]


async def test_each_process_has_its_own_bucket_while_redis_is_unavailable(servers: Servers) -> None:
    redis = await asyncio.to_thread(servers.extra_redis)
    mirror = Mirror(redis.url, timeout=5.0, stale_seconds=2.0)
    name, rate = new_name(), Rate(5, NO_REFILL_PER_SECOND)
    one, other = TokenBucket(mirror, "test", rate), TokenBucket(mirror, "test", rate)

    async def taken(bucket: TokenBucket) -> int:
        return [(await bucket.take(name))[0] for _ in range(10)].count(0.0)

    try:
        assert await taken(one) == 5
        assert await taken(other) == 0
        await asyncio.to_thread(redis.stop)

        async def unavailable() -> bool:
            try:
                await mirror.take_tokens(new_name(), 1, 1.0, 1)
            except (MirrorUnavailable, MirrorInDoubt):
                return True
            return False

        await eventually(unavailable, what="Redis unavailable")
        fresh = [TokenBucket(mirror, "test", rate) for _ in range(2)]
        assert [await taken(bucket) for bucket in fresh] == [5, 5]
        await asyncio.to_thread(redis.start)

        async def back() -> bool:
            return not await unavailable()

        await eventually(back, what="Redis back")
        # Both use one bucket again, which is empty, or full if the server lost it.
        assert await taken(one) + await taken(other) in (0, 5)
    finally:
        await mirror.close()
        await asyncio.to_thread(redis.discard)


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:DB8:1:2::", "2001:db8:1:2::"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
        ("a-unix-socket", "a-unix-socket"),
    ],
)
def test_ipv6_addresses_are_counted_by_network(address: str, counted: str) -> None:
    assert counted_as(address) == counted


# -- limits of requests ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def limited(system: System) -> AsyncIterator[str]:
    """URL of an orders instance with small limits that accepts pages of other origins."""
    name, port = "limited", find_free(1)[0]
    system.urls[name] = f"http://127.0.0.1:{port}"
    system.start(
        "orders",
        alias=name,
        instance="auto",
        orders_port=port,
        trusted_proxies="127.0.0.1",
        restaurant_burst_requests=BURST_REQUESTS,
        restaurant_requests_per_second=0.1,
        address_burst_requests=ADDRESS_BURST_REQUESTS,
        address_requests_per_second=0.1,
        cors_origins=f"{ORIGIN}, https://other.example",
    )
    try:
        await system.ready(name)
        yield system.urls[name]
    finally:
        await system.stop(name)


@pytest.fixture
async def restaurant(system: System, limited: str) -> RestaurantRig:
    return await new_restaurant(system, limited)


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
    found = {"X-Forwarded-For": address or next(_addresses)}
    return found if token is None else {**found, "Authorization": f"Bearer {token}"}


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
    address = next(_addresses)
    async with http_client(base_url=limited) as client:
        for place in range(ADDRESS_BURST_REQUESTS):
            # An address that the client itself puts in front changes nothing.
            headers = headers_of(address=f"{next(_addresses)}, {address}")
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


# -- pages of other origins --------------------------------------------------------------------------------------


async def preflight(url: str, origin: str) -> httpx.Response:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization, content-type, if-match, idempotency-key",
    }
    async with http_client(base_url=url) as client:
        return await client.options(f"/api/orders/{uuid4()}", headers={**headers_of(), **asked})


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
async def test_pages_of_other_origins_may_not_call(limited: str, restaurant: RestaurantRig, origin: str) -> None:
    assert "access-control-allow-origin" not in (await preflight(limited, origin)).headers
    async with http_client(base_url=limited) as client:
        reply = await client.get("/api/menu", headers={**headers_of(restaurant.token), "Origin": origin})
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("service", ["orders", "sync", "notifier"])
async def test_no_other_origin_may_call_without_configured_origins(system: System, service: str) -> None:
    reply = await preflight(system.urls[service], ORIGIN)
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_star_allows_every_origin() -> None:
    found = cors(Settings(_env_file=None, cors_origins="*"))
    assert found is not None
    assert found.is_allow_all_origins
    assert not found.allow_credentials


# -- headers of every reply --------------------------------------------------------------------------------------

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


async def test_replies_of_the_orders_api_have_the_security_headers(system: System, restaurant: RestaurantRig) -> None:
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
        Litestar([broken], exception_handlers=EXCEPTION_HANDLERS, openapi_config=None, logging_config=None)
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


# -- bodies ------------------------------------------------------------------------------------------------------


async def in_chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 50_000):
        yield b" " * 50_000
    yield b" " * (size % 50_000)


@pytest.mark.parametrize(("service", "path"), [("orders", "/api/orders"), ("sync", "/api/sync/order")])
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "in-chunks"])
async def test_body_over_a_megabyte_is_refused(system: System, service: str, path: str, chunked: bool) -> None:
    def body(size: int) -> Any:
        return in_chunks(size) if chunked else b" " * size

    token = {"x-sync-token": Settings(_env_file=None).sync_token}
    async with system.client(service=service) as client:
        for size, status in (
            (MAX_BODY_BYTES, 422),  # blanks are not JSON
            (MAX_BODY_BYTES + 1, 413),
            (12 * MAX_BODY_BYTES, 413),
        ):
            reply = await client.post(path, content=body(size), headers=token)
            assert reply.status_code == status, reply.text
            assert reply.json()["error"]["details"]["field"] == "body"
            check(reply)


def test_endlessly_nested_body_is_refused() -> None:
    class Tolerant(Struct):
        name: str = ""

    for deep in (b"[" * 200_000, b'{"x":' * 100_000):
        with pytest.raises(InvalidInput) as refused:
            read_body(b'{"x":' + deep, Tolerant)
        assert refused.value.details["field"] == "body"


async def test_body_that_no_handler_reads_is_limited_too(system: System) -> None:
    async with system.client() as client:
        reply = await client.request("DELETE", f"/api/orders/{uuid4()}", content=b" " * (MAX_BODY_BYTES + 1))
        assert reply.status_code == 413
        # The service continues.
        assert (await client.get("/api/orders?limit=1")).status_code == 200


async def test_refusal_before_the_body_was_read_reaches_the_client(system: System) -> None:
    async with system.client(token="garbage") as client:
        for size in (MAX_BODY_BYTES, 3 * MAX_BODY_BYTES):
            for body in (b" " * size, in_chunks(size)):
                assert (await client.post("/api/orders", content=body)).status_code == 401
