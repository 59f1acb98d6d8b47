"""How long from the moment an order is due to be sent until a subscriber's screen has it?

Open loop: constant arrivals at 100 and 500 orders a second over 64 kept connections; latency counts from the intended
start. One SSE subscriber per restaurant. Everything runs. The unit to compare with is the bare publisher confirm: one
message of the size of an order at a time, to a quorum queue and a stream, measured between the slices.
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
_RATES = (100, 500)
_CONFIRMS = 200
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
    pushed: dict[str, float] = {}
    screens = [asyncio.create_task(_screen(notifier.url, one.token, pushed)) for one in rig.restaurants]
    confirms = _ConfirmProbe(rig)
    await confirms.open()
    address = urlsplit(orders.url)
    host, port = str(address.hostname), int(address.port or 0)
    await open_loop(host, port, rig.restaurants, per_second=50, seconds=1)  # menus, connections
    found: dict[int, list[EndToEndSlice]] = {rate: [] for rate in _RATES}
    try:
        for _ in range(plan.rounds):
            for rate in _RATES:
                confirm = await confirms.measure()
                sent = await open_loop(host, port, rig.restaurants, per_second=rate, seconds=plan.seconds)
                deadline = time.monotonic() + 20
                while any(one.order_id not in pushed for one in sent):
                    if time.monotonic() > deadline:
                        raise RuntimeError("an order was accepted and not pushed within 20 s")
                    await asyncio.sleep(0.01)
                late = [(pushed[one.order_id] - one.due) * 1000 for one in sent]
                found[rate].append(EndToEndSlice(percentile(late, 0.5), percentile(late, 0.99), confirm))
    finally:
        for screen in screens:
            screen.cancel()
        await asyncio.gather(*screens, return_exceptions=True)
        await confirms.close()
    return found


async def _screen(url: str, token: str, pushed: dict[str, float]) -> None:
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


_KINDS = ("quorum", "stream")


class _ConfirmProbe:
    """A quorum queue and a stream of its own, bound like a lane, and our publisher."""

    def __init__(self, rig: BenchmarkRig) -> None:
        self._url = rig.rabbitmq_url
        self._name = f"bench.confirm.{uuid4().hex[:8]}"
        self._publisher = Publisher(
            rig.rabbitmq_url, self._name, queues=[f"{self._name}.{kind}" for kind in _KINDS], timeout=5.0
        )

    async def open(self) -> None:
        async with await aio_pika.connect(self._url) as connection:
            channel = await connection.channel()
            exchange = await channel.declare_exchange(self._name, "direct", durable=True)
            for kind in _KINDS:
                queue = await channel.declare_queue(
                    f"{self._name}.{kind}", durable=True, arguments={"x-queue-type": kind}
                )
                await queue.bind(exchange, "critical")
        await self._publisher.start(wait=5.0)

    async def measure(self) -> float:
        """Median of a publish and its confirm, in milliseconds."""
        body = b"x" * _ORDER_BYTES
        took = []
        for _ in range(_CONFIRMS):
            began = time.perf_counter()
            await self._publisher.publish("critical", body)
            took.append((time.perf_counter() - began) * 1000)
        return median(took)

    async def close(self) -> None:
        await self._publisher.stop()
        async with await aio_pika.connect(self._url) as connection:
            channel = await connection.channel()
            for kind in _KINDS:
                await channel.queue_delete(f"{self._name}.{kind}")
            await channel.exchange_delete(self._name)
