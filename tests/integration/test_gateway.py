"""The gateway of docker-compose.yml: nginx with deploy/gateway/nginx.conf, in front of real services."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from deploy.local import packages
from deploy.local.child import Child
from deploy.local.port_check import find_free
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.response_headers import CSP, HEADERS
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import made, register_restaurant
from tests.rigs.system import ROOT, System, eventually

TEXT = (ROOT / "deploy/gateway/nginx.conf").read_text()
SECURITY = {name.decode(): value.decode() for name, value in [*HEADERS, (b"content-security-policy", CSP)]}


@asynccontextmanager
async def gateway(
    folder: Path, *, services: dict[str, str], changes: dict[str, str] | None = None
) -> AsyncIterator[str]:
    """Starts the gateway and yields its URL. `services`: orders, sync-api, notifier -> URL. `changes`: further
    replacements in nginx.conf."""
    (port,) = find_free(1)
    names = {"orders": "http://orders:8001", "sync-api": "http://sync-api:8002", "notifier": "http://notifier:8003"}
    text = TEXT
    for ours, here in {
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "/tmp/": f"{folder}/",
        **{names[name]: url for name, url in services.items()},
        **(changes or {}),
    }.items():
        assert ours in text
        text = text.replace(ours, here)
    # If root starts nginx, its workers run as another user, which cannot write into the folder of the test.
    (folder / "nginx.conf").write_text(f"user root;\n{text}" if os.geteuid() == 0 else text)
    nginx = packages.ensure_nginx()
    command: list[str | Path] = [nginx, "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf", "-g", "daemon off;"]
    child = Child.spawn(command, log=folder / "log", env={"PATH": os.defpath}, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        async with http_client() as client:

            async def live() -> bool:
                return (await client.get(f"{url}/health/live")).status_code == 200

            await eventually(live, what="the gateway")
        yield url
    finally:
        child.terminate(5)


async def send(url: str, request: bytes) -> httpx.Response:
    """Sends bytes that no client would send, and returns the reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(request)
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    status, *lines = head.decode().split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def check_own_answer(reply: httpx.Response, status: int, code: str) -> None:
    """Asserts that the answer of the gateway has the format of the services' answers, and each security header once."""
    assert reply.status_code == status
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.json()["success"] is False
    assert reply.json()["error"]["code"] == code
    assert {name: reply.headers.get_list(name) for name in SECURITY} == {
        name: [value] for name, value in SECURITY.items()
    }
    assert reply.headers.get("retry-after") == ("1" if status in (429, 503) else None)


def request(line: str, *headers: str, body: str = "") -> bytes:
    return "\r\n".join([line, "Host: x", "Connection: close", *headers, "", body]).encode()


@pytest.fixture(scope="module")
async def before_system(system: System, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    services = {"orders": system.urls["orders"], "sync-api": system.urls["sync"], "notifier": system.urls["notifier"]}
    async with gateway(tmp_path_factory.mktemp("gateway"), services=services) as url:
        yield url


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GARBAGE\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (request("GET /api/../../etc HTTP/1.1"), 400, "bad_request"),
        (request("POST /api/orders HTTP/1.1", "Transfer-Encoding: chunked", body="zz\r\n"), 400, "bad_request"),
        (request("GET /metrics HTTP/1.1"), 404, "not_found"),
        (request("GET /refused HTTP/1.1"), 404, "not_found"),
        (request("TRACE /api/menu HTTP/1.1"), 405, "method_not_allowed"),
        (request("POST /api/orders HTTP/1.1", f"Content-Length: {MAX_BODY_BYTES + 1}"), 413, "body_too_large"),
        (request(f"GET /api/{'a' * 9_000} HTTP/1.1"), 414, "uri_too_long"),
        (request("GET /api/menu HTTP/1.1", f"X-Long: {'a' * 9_000}"), 431, "headers_too_large"),
        (request("POST /api/orders HTTP/1.1", "Transfer-Encoding: bogus"), 501, "not_implemented"),
        (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 505, "version_not_supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
async def test_gateway_refuses_in_the_format_of_the_services(
    before_system: str, sent: bytes, status: int, code: str
) -> None:
    check_own_answer(await send(before_system, sent), status, code)


async def test_every_service_answers_through_the_gateway(before_system: str, system: System) -> None:
    restaurant = await register_restaurant(system)
    async with http_client(headers={"Authorization": f"Bearer {restaurant.token}"}) as client:
        body = {"items": [{"menu_item_id": (await restaurant.dish())["id"], "quantity": 1}]}
        order = made(await client.post(f"{before_system}/api/orders", json=body))
        reply = await client.get(f"{before_system}/api/orders/{order['id']}")
        assert reply.json()["data"]["id"] == order["id"]
        assert {name: reply.headers.get_list(name) for name in SECURITY} == {n: [v] for n, v in SECURITY.items()}
        assert (await client.get(f"{before_system}/api/sync/status")).status_code == 200
        async with client.stream("GET", f"{before_system}/api/v1/sync/events") as events:
            assert "id: " in await anext(events.aiter_lines())
        keys = await client.get(f"{before_system}/.well-known/jwks.json")
        assert keys.json() == (await client.get(f"{system.urls['orders']}/.well-known/jwks.json")).json()


async def test_address_that_sends_too_much_gets_429(tmp_path: Path, system: System) -> None:
    services = {"orders": system.urls["orders"]}
    for name, changes in {
        "rate": {"rate=1000r/s": "rate=1r/m", "burst=2000": "burst=3"},
        "connections": {"limit_conn connections 500": "limit_conn connections 3"},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(gateway(folder, services=services, changes=changes))
            if name == "rate":
                for _ in range(4):
                    reply = await send(url, request("GET /api/none HTTP/1.1"))
                    assert reply.status_code in (401, 404)
            else:
                for _ in range(3):
                    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                    stack.callback(writer.close)
                    writer.write(request("POST /api/orders HTTP/1.1", "Content-Length: 50", body="{"))

            async def refused(url: str = url) -> httpx.Response:
                return await send(url, request("GET /api/none HTTP/1.1"))

            # The gateway may see the last half of a request a moment later.
            reply = await eventually(refused, what="429", until=lambda found: found.status_code == 429)
            check_own_answer(reply, 429, "rate_limited")
            check_own_answer(await send(url, request("PUT /api/none HTTP/1.1")), 429, "rate_limited")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_change_that_no_service_got_is_503_and_an_interrupted_one_is_504_and_sent_once(
    tmp_path: Path, method: str
) -> None:
    seen: list[bytes] = []

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    (nobody,) = find_free(1)
    async with AsyncExitStack() as stack:
        replicas = [
            await stack.enter_async_context(await asyncio.start_server(break_off, "127.0.0.1", 0)) for _ in range(2)
        ]
        ports = [replica.sockets[0].getsockname()[1] for replica in replicas]
        group = "".join(f"server 127.0.0.1:{port};" for port in ports)
        services = {"orders": "http://replicas", "sync-api": f"http://127.0.0.1:{nobody}"}
        rule = "recursive_error_pages on;"
        changes = {rule: f"{rule} upstream replicas {{ {group} }}"}
        url = await stack.enter_async_context(gateway(tmp_path, services=services, changes=changes))
        unsent = await send(url, request(f"{method} /api/sync/order HTTP/1.1", "Content-Length: 0"))
        check_own_answer(unsent, 503, "unavailable")
        broken = await send(url, request(f"{method} /api/orders HTTP/1.1", "Content-Length: 0"))
        check_own_answer(broken, 504, "outcome_unknown")
    assert len(seen) == 1
