"""How long does an order take from the moment it is due to be sent until a subscriber's screen shows it?

The load is an open loop: 100 and 500 orders per second arrive at a constant rate over 64 persistent connections, and
latency counts from the moment an order was due. All services run, and each restaurant has one SSE subscriber. The peer
is a bare publisher confirm, measured between the slices: one message of the size of an order at a time, published to a
quorum queue and a stream.
"""

import asyncio
import re
import time
from urllib.parse import urlsplit
from uuid import uuid4

import aio_pika
from msgspec import Struct

from benchmarks.load import open_loop, percentile
from benchmarks.question import BenchmarkPlan, ResultRow, compared, median
from benchmarks.rig import BenchmarkRig, RunningProgram
from benchmarks.rig import run as run_async
from shared.messaging.publisher import Publisher

QUESTION = "end_to_end"
_ORDERS_PER_SECOND = (100, 500)
_CONFIRMS = 200
_CONFIRM_TIMEOUT_SECONDS = 5.0
_PUSH_TIMEOUT_SECONDS = 20.0
"""The time limit for every accepted order to reach the screens."""
_ORDER_BYTES = 1_700
_CREATED = re.compile(rb'event: order_created\ndata: [^\n]*?"orderID":"([0-9a-f-]{36})"')


class EndToEndSlice(Struct):
    p50_ms: float
    p99_ms: float
    confirm_ms: float


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    with rig.rail() as (orders, _):
        notifier = rig.service("notifier")
        try:
            found = run_async(_measure(rig, plan, orders, notifier))
        finally:
            notifier.stop()
    rows = []
    for rate, slices in found.items():
        confirms = [one.confirm_ms for one in slices]
        note = f"bare confirm p50 {median(confirms):.2f} ms"
        rows += [
            compared(QUESTION, f"{rate} orders/s", "p50", "ms", [one.p50_ms for one in slices], "bare confirm",
                     confirms, at_most=8.0, note=note),
            compared(QUESTION, f"{rate} orders/s", "p99", "ms", [one.p99_ms for one in slices], "bare confirm",
                     confirms),
        ]  # fmt: skip
    return rows


async def _measure(
    rig: BenchmarkRig, plan: BenchmarkPlan, orders: RunningProgram, notifier: RunningProgram
) -> dict[int, list[EndToEndSlice]]:
    """Returns the measured slices of each rate."""
    pushed: dict[str, float] = {}
    screens = [asyncio.create_task(_screen(notifier.url, one.token, pushed)) for one in rig.restaurants]
    confirms = _ConfirmProbe(rig)
    await confirms.open()
    address = urlsplit(orders.url)
    host, port = str(address.hostname), int(address.port or 0)
    await open_loop(host, port, rig.restaurants, per_second=50, seconds=1)  # loads menus and opens connections
    found: dict[int, list[EndToEndSlice]] = {rate: [] for rate in _ORDERS_PER_SECOND}
    try:
        for _ in range(plan.rounds):
            for rate in _ORDERS_PER_SECOND:
                confirm = await confirms.measure()
                sent = await open_loop(host, port, rig.restaurants, per_second=rate, seconds=plan.seconds)
                deadline = time.monotonic() + _PUSH_TIMEOUT_SECONDS
                while any(one.order_id not in pushed for one in sent):
                    if ended := [screen for screen in screens if screen.done()]:
                        raise RuntimeError(f"an event stream ended: {ended[0].exception()!r}")
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"an accepted order was not pushed within {_PUSH_TIMEOUT_SECONDS:.0f} s")
                    await asyncio.sleep(0.01)
                latencies_ms = [(pushed[one.order_id] - one.due) * 1000 for one in sent]
                found[rate].append(
                    EndToEndSlice(percentile(latencies_ms, 0.5), percentile(latencies_ms, 0.99), confirm)
                )
    finally:
        for screen in screens:
            screen.cancel()
        await asyncio.gather(*screens, return_exceptions=True)
        await confirms.close()
    return found


async def _screen(url: str, token: str, pushed: dict[str, float]) -> None:
    """Stores the monotonic time at which the event of each order arrives in `pushed`, by order id, until cancelled."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 22)
    writer.write(
        b"GET /api/v1/sync/events HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %b\r\n\r\n" % token.encode()
    )
    try:
        while True:
            event = await reader.readuntil(b"\n\n")
            if found := _CREATED.search(event):
                pushed[found[1].decode()] = time.monotonic()
    finally:
        writer.close()


_QUEUE_TYPES = ("quorum", "stream")


class _ConfirmProbe:
    """Measures our publisher on a private exchange with a quorum queue and a stream, which are bound like a lane."""

    def __init__(self, rig: BenchmarkRig) -> None:
        self._url = rig.rabbitmq_url
        self._name = f"bench.confirm.{uuid4().hex[:8]}"
        self._publisher = Publisher(
            rig.rabbitmq_url,
            self._name,
            queues=[f"{self._name}.{queue_type}" for queue_type in _QUEUE_TYPES],
            timeout=_CONFIRM_TIMEOUT_SECONDS,
        )

    async def open(self) -> None:
        async with await aio_pika.connect(self._url) as connection:
            channel = await connection.channel()
            exchange = await channel.declare_exchange(self._name, "direct", durable=True)
            for queue_type in _QUEUE_TYPES:
                queue = await channel.declare_queue(
                    f"{self._name}.{queue_type}", durable=True, arguments={"x-queue-type": queue_type}
                )
                await queue.bind(exchange, "critical")
        await self._publisher.start(wait=_CONFIRM_TIMEOUT_SECONDS)

    async def measure(self) -> float:
        """Returns the median time of a publish and its confirm in milliseconds."""
        body = b"x" * _ORDER_BYTES
        took_ms = []
        for _ in range(_CONFIRMS):
            began = time.perf_counter()
            await self._publisher.publish("critical", body)
            took_ms.append((time.perf_counter() - began) * 1000)
        return median(took_ms)

    async def close(self) -> None:
        await self._publisher.stop()
        async with await aio_pika.connect(self._url) as connection:
            channel = await connection.channel()
            for queue_type in _QUEUE_TYPES:
                await channel.queue_delete(f"{self._name}.{queue_type}")
            await channel.exchange_delete(self._name)
