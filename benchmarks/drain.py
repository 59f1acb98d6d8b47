"""How fast does the worker write queued changes to PostgreSQL?

The lanes are filled first, then the worker starts; the rate counts from its first commit to its last. Two fillings: one
change per message, and 27 per message, the mean that a load of 64 connections records. The peers write to the same
tables, orders with three items and the log of changes:

    plain FastStream         a handler with one transaction per message and a pool of 20 (peers/faststream_plain.py). It
                             is slow and drains fewer messages, for the same rate
    unnest without a queue   batches by unnest, from memory (peers/unnest_batches.py)

How much do bad changes cost? One change that breaks the contract after each good one, against good ones alone.
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
_PEER_CHANGES = 10_000
_MIXED_CHANGES = 10_000
_CHANGES_PER_MESSAGE = 27
_MESSAGES_IN_FLIGHT = 128
"""While the lanes are filled."""
_DRAIN_SECONDS = 300.0
"""Time limit of one drain."""
_STOP_SECONDS = 10.0


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    many, fewer, mixed = (_CHANGES, _PEER_CHANGES, _MIXED_CHANGES) if not plan.quick else (5_000, 1_000, 1_000)
    plain = [_plain(rig, fewer) for _ in range(1 if plan.quick else 2)]
    alone = _ours(rig, many, 1)
    plain.append(_plain(rig, fewer))
    grouped = _ours(rig, many, _CHANGES_PER_MESSAGE)
    unnest = [run_async(unnest_batches.rate(rig, many // 5)) for _ in range(3)]
    rounds = range(1 if plan.quick else 3)
    good_rates, mixed_rates = zip(
        *((_ours(rig, mixed, 1), _ours(rig, mixed, 1, bad=True)) for _ in rounds), strict=True
    )
    note = f"ours: {many} changes once; FastStream: {fewer} three times; unnest: {many // 5} three times"
    return [
        compared(QUESTION, "one change a message", "throughput", "changes/s", [alone], "plain FastStream", plain,
                 at_least=4.0, note=note),
        compared(QUESTION, "as a load of 64 records", "throughput", "changes/s", [grouped], "plain FastStream", plain,
                 at_least=4.0),
        compared(QUESTION, "as a load of 64 records", "throughput", "changes/s", [grouped], "unnest without a queue",
                 unnest, at_least=0.5),
        # The unit keeps this row out of the plot of peers.
        compared(QUESTION, "one bad change per good one", "throughput", "changes/s, good and bad",
                 [2 * rate for rate in mixed_rates], "good changes alone", list(good_rates), at_least=0.5,
                 note=f"{mixed} good and {mixed} bad, one change a message, until the last good one is written"),
    ]  # fmt: skip


def _ours(rig: BenchmarkRig, changes: int, per_message: int, *, bad: bool = False) -> float:
    """Changes per second of the worker; with `bad`, the good ones alone."""
    rig.purge()
    before = rig.count_orders()
    run_async(_fill(rig, changes, per_message, bad=bad))
    # Do not wait until it is ready: its heartbeats queue behind the changes that it is to drain.
    worker = rig.service("worker", wait=False)
    try:
        rig.until(lambda: rig.count_orders() > before, "the first commit")
        began, first = time.monotonic(), rig.count_orders() - before
        rig.until(lambda: rig.count_orders() - before >= changes, "every change in PostgreSQL", _DRAIN_SECONDS)
        return (changes - first) / (time.monotonic() - began)
    finally:
        worker.stop()


def _plain(rig: BenchmarkRig, messages: int) -> float:
    """Changes per second of the plain FastStream handler."""
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
        rig.until(lambda: rig.count_orders() - before >= messages, "every message in PostgreSQL", _DRAIN_SECONDS)
        return (messages - first) / (time.monotonic() - began)
    finally:
        child.terminate(_STOP_SECONDS)


async def _fill(rig: BenchmarkRig, changes: int, per_message: int, *, bad: bool = False) -> None:
    """Publishes through the exchange, as the orders service does.

    With `bad`, each message is followed by as many changes that break the contract. They go to the lane's queue alone,
    because what the mirror does with them is not measured here.
    """
    async with await aio_pika.connect(rig.rabbitmq_url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        exchange = await channel.get_exchange(CHANGES, ensure=False)
        queue = lane_queue(Lane.CRITICAL)
        for start in range(0, changes, per_message * _MESSAGES_IN_FLIGHT):
            sent = []
            for at in range(start, min(changes, start + per_message * _MESSAGES_IN_FLIGHT), per_message):
                events = encoded_orders(rig.restaurants, min(per_message, changes - at))
                sent.append(exchange.publish(_message(events), Lane.CRITICAL.value))
                if bad:
                    sent.append(channel.default_exchange.publish(_message([_broken(one) for one in events]), queue))
            await asyncio.gather(*sent)


def _message(events: list[bytes]) -> aio_pika.Message:
    return aio_pika.Message(
        encode_batch(events), content_type=CONTENT_TYPE, delivery_mode=aio_pika.DeliveryMode.PERSISTENT
    )


def _broken(event: bytes) -> bytes:
    """The event with a negative total, which the contract forbids."""
    return event.replace(b'"total":', b'"total":-')
