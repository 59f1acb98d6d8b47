"""A peer of the accept benchmark: the dual write. It does the same work as the rail, in the usual order.

    1. one PostgreSQL transaction (transaction.py)
    2. the mirror: the order's document and its place in the list of live orders, one pipelined round trip to Redis
    3. the push: a persistent, mandatory, confirmed publish to the stream that a notifier follows, one per order
    4. the reply

It uses our Redis client, which pipelines the commands that wait at the same moment, our publisher and our notifier, so
that only the design differs. It publishes only to a stream: PostgreSQL already holds the order, and a stream confirms
without the flush that a quorum queue needs.

It promises less than the rail. If it crashes between steps 1 and 3, or if Redis or RabbitMQ is unavailable, readers of
the mirror and subscribers miss the order until the client repeats the request with the same key. A repeat runs steps 2
and 3 again. While PostgreSQL is unavailable, it accepts nothing.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from litestar import Litestar, post
from litestar.types import ASGIApp

from benchmarks.created_changes import created
from benchmarks.peers.transaction import application, placed, priced_order, store
from shared.entities import order as orders
from shared.entities.contract import encode, encode_batch
from shared.entities.entity import micros
from shared.entities.order import Order
from shared.http.call import Call
from shared.messaging.publisher import Publisher
from shared.messaging.topology import CHANGES, LOG
from shared.mirror.connection import MirrorConnection

_MIRROR_TIMEOUT_SECONDS = 0.5
_PUBLISH_TIMEOUT_SECONDS = 1.5
_CONNECT_TIMEOUT_SECONDS = 10.0


@post("/api/orders")
async def place(request: Call) -> ASGIApp:
    order = await store(request, await priced_order(request))
    await mirror(request.app.state["mirror"], order)
    await push(request.app.state["publisher"], order)
    return placed(order)


def document_key(restaurant: str, id_: str) -> str:
    return f"{{{restaurant}}}:order:{id_}"


def live_key(restaurant: str) -> str:
    return f"{{{restaurant}}}:live:order"


async def mirror(redis: MirrorConnection, order: Order) -> None:
    """Writes the order, which is in PostgreSQL by then, to Redis. Raises MirrorUnavailable or MirrorInDoubt."""
    restaurant = order.restaurant_id
    await asyncio.gather(
        redis.call("HSET", document_key(restaurant, order.id), "v", 1, "d", encode(order)),
        redis.call("ZADD", live_key(restaurant), micros(order.created_at), order.id),
    )


async def push(publisher: Publisher, order: Order) -> None:
    """Publishes the order, which is in PostgreSQL and in Redis by then. Raises NotSent or InDoubt."""
    event = encode(created(orders.ENTITY, order, actor=order.placed_by))
    await publisher.publish(orders.ENTITY.lane.value, encode_batch([event]))


@asynccontextmanager
async def connections(app: Litestar) -> AsyncIterator[None]:
    redis = MirrorConnection(os.environ["BENCH_REDIS_URL"], timeout=_MIRROR_TIMEOUT_SECONDS)
    publisher = Publisher(os.environ["BENCH_RABBITMQ_URL"], CHANGES, queues=[LOG], timeout=_PUBLISH_TIMEOUT_SECONDS)
    app.state["mirror"], app.state["publisher"] = redis, publisher
    await redis.check()
    await publisher.start(wait=_CONNECT_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        await publisher.stop()
        await redis.close()


def create() -> Litestar:
    return application(place, name="dual_write", resources=connections)


if __name__ == "__main__":
    from shared.http.server import serve

    serve(
        "benchmarks.peers.dual_write:create",
        service="dual-write",
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        connections=1_000,
    )
