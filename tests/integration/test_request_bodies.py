"""Limits of request bodies: their size, and how deeply they are nested."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from msgspec import Struct

from shared.errors import InvalidInput
from shared.http.bodies import MAX_BODY_BYTES, read_body
from tests.rigs.system import System


async def in_chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 50_000):
        yield b" " * 50_000
    yield b" " * (size % 50_000)


@pytest.mark.parametrize(("service", "path"), [("orders", "/api/orders"), ("sync", "/api/sync/order")])
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "in-chunks"])
async def test_body_over_a_megabyte_is_refused(system: System, service: str, path: str, chunked: bool) -> None:
    def body(size: int) -> Any:
        return in_chunks(size) if chunked else b" " * size

    token = {"x-sync-token": system.demo["sync_token"]}
    async with system.client(service=service) as client:
        for size, status in (
            (MAX_BODY_BYTES, 422),  # blanks are not JSON
            (MAX_BODY_BYTES + 1, 413),
            (12 * MAX_BODY_BYTES, 413),
        ):
            reply = await client.post(path, content=body(size), headers=token)
            assert reply.status_code == status, reply.text
            assert reply.json()["error"]["details"]["field"] == "body"


def test_too_deeply_nested_body_is_refused() -> None:
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
        # The service still answers other requests.
        assert (await client.get("/api/orders?limit=1")).status_code == 200


async def test_refusal_before_the_body_was_read_reaches_the_client(system: System) -> None:
    async with system.client(token="garbage") as client:
        for size in (MAX_BODY_BYTES, 3 * MAX_BODY_BYTES):
            for body in (b" " * size, in_chunks(size)):
                assert (await client.post("/api/orders", content=body)).status_code == 401
