"""How fast do queued changes come into PostgreSQL?

The lanes are filled first, then the worker is started: from its first commit to its last. Two fillings: one change per
message, and as a load of 64 connections records them (27 a message, the mean that the accept benchmark shows). Peers:
a plain FastStream handler with one transaction per message and a pool of 20 (peers/faststream_plain.py), and batches by
unnest without any queue, out of memory (peers/unnest_batches.py): the same tables, orders with three items and the log
of changes. Peers that are slow drain fewer, for the same rate.
"""

import asyncio
import os
import sys
import time

import aio_pika

from benchmarks.peers import unnest_batches
from benchmarks.question import Plan, Row, compared
from benchmarks.rig import ROOT, Rig, Seeded
from benchmarks.rig import run as run_async
from deploy.local.child import Child
from shared.entities.contract import CONTENT_TYPE, Lane, encode, encode_batch
from shared.messaging.topology import CHANGES, lane_queue

QUESTION = "drain"
_CHANGES = 100_000
_FEWER = 10_000
_PER_MESSAGE = 27


def run(rig: Rig, plan: Plan) -> list[Row]:
    many, fewer = (_CHANGES, _FEWER) if not plan.quick else (5_000, 1_000)
    plain = [_plain(rig, fewer) for _ in range(1 if plan.quick else 2)]
    alone = _ours(rig, many, 1)
    plain.append(_plain(rig, fewer))
    grouped = _ours(rig, many, _PER_MESSAGE)
    unnest = [run_async(unnest_batches.rate(rig, many // 5)) for _ in range(3)]
    note = f"{many} of ours once, {fewer} of FastStream's three times, {many // 5} by unnest three times"
    return [
        compared(QUESTION, "one change a message", "throughput", "changes/s", [alone], "plain FastStream", plain,
                 at_least=4.0, note=note),
        compared(QUESTION, "as a load of 64 records", "throughput", "changes/s", [grouped], "plain FastStream", plain,
                 at_least=4.0),
        compared(QUESTION, "as a load of 64 records", "throughput", "changes/s", [grouped], "unnest without a queue",
                 unnest, at_least=0.5),
    ]  # fmt: skip


def _ours(rig: Rig, changes: int, per_message: int) -> float:
    rig.purge()
    before = rig.count_orders()
    run_async(_fill(rig, changes, per_message))
    # Not until it is ready: its fences stand in line behind what it is to drain.
    worker = rig.service("worker", wait=False)
    try:
        rig.until(lambda: rig.count_orders() > before, "the first commit")
        began, first = time.monotonic(), rig.count_orders() - before
        rig.until(lambda: rig.count_orders() - before >= changes, "every change in PostgreSQL", within=300)
        return (changes - first) / (time.monotonic() - began)
    finally:
        worker.stop()


def _plain(rig: Rig, messages: int) -> float:
    rig.purge()
    before = rig.count_orders()
    run_async(_fill(rig, messages, 1))
    env = {
        **os.environ,
        "BENCH_RABBITMQ_URL": rig.rabbitmq_url,
        "BENCH_DATABASE_URL": rig.database_url("writer"),
        "BENCH_QUEUE": lane_queue(Lane.CRITICAL),
    }
    child = Child.spawn(
        [sys.executable, "-m", "benchmarks.peers.faststream_plain"],
        log=rig.folder / "logs" / "faststream.log",
        env=env,
        cwd=ROOT,
    )
    try:
        rig.until(lambda: rig.count_orders() > before, "the first commit of the plain handler")
        began, first = time.monotonic(), rig.count_orders() - before
        rig.until(lambda: rig.count_orders() - before >= messages, "every message in PostgreSQL", within=300)
        return (messages - first) / (time.monotonic() - began)
    finally:
        child.terminate(10)


async def _fill(rig: Rig, changes: int, per_message: int) -> None:
    """Through the exchange, as the orders service does."""
    async with await aio_pika.connect(rig.rabbitmq_url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        exchange = await channel.get_exchange(CHANGES, ensure=False)
        for start in range(0, changes, per_message * 128):
            made = [events(rig.restaurants, min(per_message, changes - at)) for at in
                    range(start, min(changes, start + per_message * 128), per_message)]  # fmt: skip
            await asyncio.gather(
                *(
                    exchange.publish(
                        aio_pika.Message(
                            encode_batch(one), content_type=CONTENT_TYPE, delivery_mode=aio_pika.DeliveryMode.PERSISTENT
                        ),
                        Lane.CRITICAL.value,
                    )
                    for one in made
                )
            )


def events(restaurants: list[Seeded], count: int) -> list[bytes]:
    return [encode(unnest_batches.change(restaurants)) for _ in range(count)]
