"""A peer of the accept benchmark: Litestar with one PostgreSQL transaction per order (transaction.py).

It writes no mirror and pushes nothing. It therefore does less work than the rail and is not an equal peer.
"""

import os

from litestar import Litestar, post
from litestar.types import ASGIApp

from benchmarks.peers.transaction import application, placed, priced_order, store
from shared.http.call import Call


@post("/api/orders")
async def place(request: Call) -> ASGIApp:
    return placed(await store(request, await priced_order(request)))


def create() -> Litestar:
    return application(place, name="direct")


if __name__ == "__main__":
    from shared.http.server import serve

    serve("benchmarks.peers.direct:create", host="127.0.0.1", port=int(os.environ["BENCH_PORT"]))
