"""The peer of the read benchmark: a bare Litestar route on the same server that returns the same bytes.

It checks no token, keeps no trace, reads no store and sets no header, so it is the upper bound for the framework.
"""

import os
from pathlib import Path

from litestar import Litestar, MediaType, Response, get


def create() -> Litestar:
    body = Path(os.environ["BENCH_BODY"]).read_bytes()

    @get("/api/orders/{order_id:str}")
    async def read(order_id: str) -> Response[bytes]:
        return Response(body, media_type=MediaType.JSON)

    @get("/health/ready", sync_to_thread=False)
    def ready() -> Response[bytes]:
        return Response(b"{}", media_type=MediaType.JSON)

    return Litestar(route_handlers=[read, ready], openapi_config=None, logging_config=None)


if __name__ == "__main__":
    from shared.http.server import serve

    serve("benchmarks.peers.bare:create", host="127.0.0.1", port=int(os.environ["BENCH_PORT"]))
