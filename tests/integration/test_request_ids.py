"""The ids of a request and its reply on the running system: the request id of the caller, and the trace."""

import asyncio
import secrets

import pytest

from tests.rigs.system import System


async def raw(url: str, *lines: bytes, path: bytes = b"/health/live") -> bytes:
    """Sends a raw request, which no client library would send; returns the head of the reply."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"Host: x", b"Connection: close", *lines, b"", b""]))
    await writer.drain()
    answer = await asyncio.wait_for(reader.read(), timeout=30)
    writer.close()
    return answer.partition(b"\r\n\r\n")[0]


def header_in(head: bytes, name: bytes) -> list[bytes]:
    lines = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
    return [value.strip() for found, _, value in lines if found.lower() == name]


PATHS: list[tuple[str, int]] = [("/api/orders?limit=1", 200), ("/api/orders?limit=x", 422), ("/no/such/path", 404)]


@pytest.mark.parametrize("asked", ["order-4711", "a" * 128, "{!~}", "8873ec35-8c64-44ad-964d-29d824a653b8"])
async def test_request_id_is_returned(system: System, asked: str) -> None:
    async with system.client() as client:
        for path, status in [*PATHS, ("/health/live", 200)]:
            reply = await client.get(path, headers={"X-Request-Id": asked})
            assert reply.status_code == status
            assert reply.headers.get_list("x-request-id") == [asked]


@pytest.mark.parametrize(
    "asked",
    [b"", b"a b", b"a\tb", b"a" * 129, "ü".encode(), b"\xff\xfe", b"<script>\x01"],
    ids=lambda value: repr(value)[:12],
)
async def test_unsafe_request_id_is_not_returned(system: System, asked: bytes) -> None:
    head = await raw(system.urls["orders"], b"X-Request-Id: " + asked)
    if b"\x01" in asked:
        assert b" 400 " in head.split(b"\r\n")[0]  # the HTTP server refuses such a header itself
        return
    (own,) = header_in(head, b"x-trace-id")
    assert header_in(head, b"x-request-id") == [own]
    assert not asked or asked not in head


@pytest.mark.parametrize("line_end", [b"\r\n ", b"\r\n\t", b"\r", b"\n", b"\r\n\r\n", b"%0d%0a", b"\\r\\n", b"\0"])
async def test_request_id_cannot_inject_a_header(system: System, line_end: bytes) -> None:
    head = await raw(system.urls["orders"], b"X-Request-Id: x" + line_end + b"Set-Cookie: a=b")
    refused = b" 400 " in head.split(b"\r\n")[0]
    assert header_in(head, b"set-cookie") == []
    assert len(header_in(head, b"x-request-id")) == (0 if refused else 1)


async def test_first_of_several_request_ids_is_returned(system: System) -> None:
    head = await raw(system.urls["orders"], b"X-Request-Id: first", b"X-Request-Id: second")
    assert header_in(head, b"x-request-id") == [b"first"]


async def test_incoming_trace_is_continued(system: System) -> None:
    async with system.client() as client:
        for path, status in PATHS[:2]:
            trace_id = secrets.token_hex(16)
            traceparent = f"00-{trace_id}-{secrets.token_hex(8)}-00"
            reply = await client.get(path, headers={"traceparent": traceparent})
            assert reply.status_code == status
            assert reply.headers["x-trace-id"] == trace_id
            assert reply.headers["x-request-id"] == trace_id
        # Without a valid `traceparent` each request gets its own trace.
        seen = set()
        for bad in (None, "", "garbage", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'g' * 32}-{'1' * 16}-01", "a" * 9_000):
            reply = await client.get("/api/orders?limit=1", headers={} if bad is None else {"traceparent": bad})
            assert reply.status_code == 200
            seen.add(reply.headers["x-trace-id"])
        assert len(seen) == 6


async def test_error_names_the_trace_of_its_reply(system: System) -> None:
    async with system.client() as client:
        for path, status in PATHS[1:]:
            reply = await client.get(path)
            assert reply.status_code == status
            assert reply.json()["error"]["trace_id"] == reply.headers["x-trace-id"]
        # Requests on one connection get different traces too.
        ids = {(await client.get("/no/such/path")).headers["x-trace-id"] for _ in range(3)}
        assert len(ids) == 3


async def test_trace_of_a_stranger_is_not_continued(system: System) -> None:
    """The caller decides whether a trace is kept, so a stranger could fill the disk with spans."""
    trace_id = secrets.token_hex(16)
    traceparent = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    for service, path in (("orders", "/api/orders"), ("sync", "/api/ops/queues"), ("notifier", "/api/v1/sync/events")):
        for authorization in ("", "Bearer garbage"):
            async with system.client(service=service) as client:
                reply = await client.get(path, headers={**traceparent, "Authorization": authorization})
            assert reply.status_code == 401
            assert reply.headers["x-trace-id"] != trace_id
    async with system.client() as client:
        body = {"email": "nobody@shop.example", "password": "wrong password"}
        reply = await client.post("/api/auth/login", json=body, headers=traceparent)
        assert reply.headers["x-trace-id"] != trace_id
