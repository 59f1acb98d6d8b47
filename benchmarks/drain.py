"""How fast do queued changes come into PostgreSQL?

The lanes are filled first, then the worker is started: from its first commit to its last. Two fillings: one change per
message, and as a load of 64 connections records them (27 a message, the mean that the accept benchmark shows). Peers:
a plain FastStream handler with one transaction per message and a pool of 20 (peers/faststream_plain.py), and batches by
unnest without any queue, out of memory (peers/unnest_batches.py): the same tables, orders with three items and the log
of changes. Peers that are slow drain fewer, for the same rate.

And how much do bad ones cost: as many again that break the contract, one after each good one, against good ones alone.
"""

import asyncio
import os
import sys
import time

import aio_pika

from benchmarks.peers import unnest_batches
from benchmarks.question import BenchmarkPlan, ResultRow, compared
from benchmarks.random_orders import encoded_orders
from benchmarks.rig import ROOT, BenchmarkRig
from benchmarks.rig import run as run_async
from deploy.local.child import Child
from shared.entities.contract import CONTENT_TYPE, Lane, encode_batch
from shared.messaging.topology import CHANGES, lane_queue

QUESTION = "drain"
_CHANGES = 100_000
_FEWER = 10_000
_PER_MESSAGE = 27
_MIXED = 10_000


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    many, fewer = (_CHANGES, _FEWER) if not plan.quick else (5_000, 1_000)
    plain = [_plain(rig, fewer) for _ in range(1 if plan.quick else 2)]
    alone = _ours(rig, many, 1)
    plain.append(_plain(rig, fewer))
    grouped = _ours(rig, many, _PER_MESSAGE)
    unnest = [run_async(unnest_batches.rate(rig, many // 5)) for _ in range(3)]
    mixed = _MIXED if not plan.quick else 1_000
    rounds = range(1 if plan.quick else 3)
    good, beside = zip(*((_ours(rig, mixed, 1), _ours(rig, mixed, 1, bad=True)) for _ in rounds), strict=True)
    note = f"{many} of ours once, {fewer} of FastStream's three times, {many // 5} by unnest three times"
    return [
        compared(QUESTION, "one change a message", "throughput", "changes/s", [alone], "plain FastStream", plain,
                 at_least=4.0, note=note),
        compared(QUESTION, "as a load of 64 records", "throughput", "changes/s", [grouped], "plain FastStream", plain,
                 at_least=4.0),
        compared(QUESTION, "as a load of 64 records", "throughput", "changes/s", [grouped], "unnest without a queue",
                 unnest, at_least=0.5),
        compared(QUESTION, "as many bad ones beside", "throughput", "changes/s, good and bad",
                 [2 * rate for rate in beside], "good ones alone", list(good), at_least=0.5,
                 note=f"{mixed} good and {mixed} bad, one change a message: until the last good one is written"),
    ]  # fmt: skip


def _ours(rig: BenchmarkRig, changes: int, per_message: int, *, bad: bool = False) -> float:
    rig.purge()
    before = rig.count_orders()
    run_async(_fill(rig, changes, per_message, bad=bad))
    # Not until it is ready: its fences stand in line behind what it is to drain.
    worker = rig.service("worker", wait=False)
    try:
        rig.until(lambda: rig.count_orders() > before, "the first commit")
        began, first = time.monotonic(), rig.count_orders() - before
        rig.until(lambda: rig.count_orders() - before >= changes, "every change in PostgreSQL", within=300)
        return (changes - first) / (time.monotonic() - began)
    finally:
        worker.stop()


def _plain(rig: BenchmarkRig, messages: int) -> float:
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


async def _fill(rig: BenchmarkRig, changes: int, per_message: int, *, bad: bool = False) -> None:
    """Through the exchange, as the orders service does. `bad`: after each message one of as many changes that break the
    contract, into the lane alone: what the mirror makes of them is not measured here."""
    async with await aio_pika.connect(rig.rabbitmq_url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        exchange = await channel.get_exchange(CHANGES, ensure=False)
        lane = lane_queue(Lane.CRITICAL)
        for start in range(0, changes, per_message * 128):
            sent = []
            for at in range(start, min(changes, start + per_message * 128), per_message):
                made = encoded_orders(rig.restaurants, min(per_message, changes - at))
                sent.append(exchange.publish(_message(made), Lane.CRITICAL.value))
                if bad:
                    sent.append(channel.default_exchange.publish(_message([_broken(one) for one in made]), lane))
            await asyncio.gather(*sent)


def _message(made: list[bytes]) -> aio_pika.Message:
    return aio_pika.Message(
        encode_batch(made), content_type=CONTENT_TYPE, delivery_mode=aio_pika.DeliveryMode.PERSISTENT
    )


def _broken(event: bytes) -> bytes:
    return event.replace(b'"total":', b'"total":-')
