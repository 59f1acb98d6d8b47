"""How fast does the worker write queued changes to PostgreSQL?

The benchmark fills the lanes first and then starts the worker. The rate covers the time from the first commit to the
last one. There are two cases: one change per message, and 27 changes per message, the mean under a load of 64
connections. The peers write to the same tables: orders with three items, and `changes`.

    plain FastStream         one transaction per message, with a pool of 20 (peers/faststream_plain.py). It is slow, so
                             it drains fewer messages
    unnest without a queue   batches from memory, with unnest (peers/unnest_batches.py)

A last case shows what bad changes cost: one change that breaks the contract follows each good one. It is compared with
good changes only.
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
"""Messages that wait for their confirms while the lanes are filled."""
_DRAIN_TIMEOUT_SECONDS = 300.0
_STOP_TIMEOUT_SECONDS = 10.0


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    many, fewer, mixed = (_CHANGES, _PEER_CHANGES, _MIXED_CHANGES) if not plan.quick else (5_000, 1_000, 1_000)
    plain = [_plain(rig, fewer) for _ in range(1 if plan.quick else 2)]
    single = _ours(rig, many, 1)
    plain.append(_plain(rig, fewer))
    grouped = _ours(rig, many, _CHANGES_PER_MESSAGE)
    unnest = [run_async(unnest_batches.rate(rig, many // 5)) for _ in range(3)]
    rounds = range(1 if plan.quick else 3)
    good_rates, mixed_rates = zip(
        *((_ours(rig, mixed, 1), _ours(rig, mixed, 1, bad=True)) for _ in rounds), strict=True
    )
    note = (
        f"changes drained: ours {many:,} (1 run), FastStream {fewer:,} ({len(plain)} runs), "
        f"unnest {many // 5:,} ({len(unnest)} runs)"
    )
    return [
        compared(QUESTION, "one change per message", "throughput", "changes/s", [single], "plain FastStream", plain,
                 at_least=4.0, note=note),
        compared(QUESTION, "27 changes per message", "throughput", "changes/s", [grouped], "plain FastStream", plain,
                 at_least=4.0),
        compared(QUESTION, "27 changes per message", "throughput", "changes/s", [grouped], "unnest without a queue",
                 unnest, at_least=0.5),
        # The unit keeps this row out of the plot of peers.
        compared(QUESTION, "one bad change per good one", "throughput", "changes/s, good and bad",
                 [2 * rate for rate in mixed_rates], "good changes only", list(good_rates), at_least=0.5,
                 note=f"{mixed} good and {mixed} bad, one change per message, until the last good one is written"),
    ]  # fmt: skip


def _ours(rig: BenchmarkRig, changes: int, per_message: int, *, bad: bool = False) -> float:
    """Returns how many changes per second the worker writes; with `bad`, it counts only the good ones."""
    rig.purge()
    before = rig.count_orders()
    run_async(_fill(rig, changes, per_message, bad=bad))
    # The worker cannot become ready before it has drained the changes, because its heartbeats queue behind them.
    worker = rig.service("worker", wait=False)
    try:
        rig.until(lambda: rig.count_orders() > before, "the first commit")
        began, first = time.monotonic(), rig.count_orders() - before
        rig.until(lambda: rig.count_orders() - before >= changes, "every change in PostgreSQL", _DRAIN_TIMEOUT_SECONDS)
        return (changes - first) / (time.monotonic() - began)
    finally:
        worker.stop()


def _plain(rig: BenchmarkRig, messages: int) -> float:
    """Returns how many changes per second the plain FastStream handler writes."""
    rig.purge()
    before = rig.count_orders()
    run_async(_fill(rig, messages, 1, in_log=False))
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
        rig.until(
            lambda: rig.count_orders() - before >= messages, "every message in PostgreSQL", _DRAIN_TIMEOUT_SECONDS
        )
        return (messages - first) / (time.monotonic() - began)
    finally:
        child.terminate(_STOP_TIMEOUT_SECONDS)


async def _fill(rig: BenchmarkRig, changes: int, per_message: int, *, bad: bool = False, in_log: bool = True) -> None:
    """Publishes through the exchange, as the orders service does. Without `in_log`, it publishes only to the lane: the
    ledger would send again what another program takes from the lane.

    With `bad`, each message is followed by one with as many changes that break the contract. Those go only to the queue
    of the lane, because this benchmark does not measure what the mirror does with them.
    """
    async with await aio_pika.connect(rig.rabbitmq_url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        exchange = await channel.get_exchange(CHANGES, ensure=False)
        queue = lane_queue(Lane.CRITICAL)
        for start in range(0, changes, per_message * _MESSAGES_IN_FLIGHT):
            sent = []
            for at in range(start, min(changes, start + per_message * _MESSAGES_IN_FLIGHT), per_message):
                events = encoded_orders(rig.restaurants, min(per_message, changes - at))
                if in_log:
                    sent.append(exchange.publish(_message(events), Lane.CRITICAL.value))
                else:
                    sent.append(channel.default_exchange.publish(_message(events), queue))
                if bad:
                    sent.append(channel.default_exchange.publish(_message([_broken(one) for one in events]), queue))
            await asyncio.gather(*sent)


def _message(events: list[bytes]) -> aio_pika.Message:
    return aio_pika.Message(
        encode_batch(events), content_type=CONTENT_TYPE, delivery_mode=aio_pika.DeliveryMode.PERSISTENT
    )


def _broken(event: bytes) -> bytes:
    """Returns the event with a negative total, which the contract forbids."""
    return event.replace(b'"total":', b'"total":-')
