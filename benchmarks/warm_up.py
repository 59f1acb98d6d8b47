"""How long does a wiped mirror stay cold, and how soon does an order count as synced?

Orders, worker and 100 orders per second, which are accepted all the time. Each round empties Redis (FLUSHALL) and sends
one change of an order every 20 ms until the orders service accepts it: it refuses changes until the mirror is warm.

Synced: between the rounds, the time from the reply of an order until it leaves the pending orders of the mirror. The
lists of all restaurants are read every 20 ms, so a figure is up to 20 ms too large.
"""

import asyncio
import json
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from redis.asyncio import Redis

from benchmarks.load import SentOrder, open_loop, order_body, percentile
from benchmarks.question import BenchmarkPlan, ResultRow, compared
from benchmarks.rig import BenchmarkRig, RunningProgram
from benchmarks.rig import run as run_async
from shared.mirror import keys

QUESTION = "warm_up"
_CASE = "100 orders/s"
_ORDERS_PER_SECOND = 100
_LOOK_INTERVAL_SECONDS = 0.02
_HTTP_TIMEOUT_SECONDS = 5.0
_LIMIT_SECONDS = 120.0


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    with rig.rail() as (orders, worker):
        rig.warm(worker)
        synced: list[float] = []
        warm: list[float] = []
        for _ in range(plan.rounds):
            synced += run_async(_synced(rig, orders, plan.seconds))
            warm.append(run_async(_warm_again(rig, orders)))
            rig.until(lambda: rig.depth() == 0, "an empty lane")
    return [
        compared(QUESTION, _CASE, "warm after a wipe", "s", warm, at_most=6.0),
        compared(QUESTION, _CASE, "warm after a wipe, slowest", "s", [max(warm)], at_most=6.0),
        compared(QUESTION, _CASE, "pending to synced, p50", "s", [percentile(synced, 0.5)]),
        compared(QUESTION, _CASE, "pending to synced, p99", "s", [percentile(synced, 0.99)], at_most=1.0),
    ]


def _load(rig: BenchmarkRig, orders: RunningProgram, seconds: float, into: list[SentOrder]) -> "asyncio.Task[object]":
    address = urlsplit(orders.url)
    host, port = str(address.hostname), int(address.port or 0)
    return asyncio.create_task(
        open_loop(host, port, rig.restaurants, per_second=_ORDERS_PER_SECOND, seconds=seconds, into=into)
    )


async def _synced(rig: BenchmarkRig, orders: RunningProgram, seconds: float) -> list[float]:
    """Returns the seconds from the reply of each order until it is synced."""
    sent: list[SentOrder] = []
    took: list[float] = []
    noted = 0
    unsynced: dict[str, float] = {}
    load = _load(rig, orders, seconds, sent)
    deadline = time.monotonic() + seconds + _LIMIT_SECONDS
    async with Redis.from_url(rig.redis_url) as redis:
        while not load.done() or unsynced or noted < len(sent):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(unsynced)} orders were not synced in time")
            known, noted = noted, len(sent)  # the orders that had a reply before this look
            unsynced |= {one.order_id: one.answered for one in sent[known:noted]}
            async with redis.pipeline(transaction=False) as pipeline:
                for one in rig.restaurants:
                    pipeline.zrange(keys.pending(one.id, "order"), 0, -1)
                pending = {id_.decode() for ids in await pipeline.execute() for id_ in ids}
            at = time.monotonic()
            took += [at - unsynced.pop(id_) for id_ in unsynced.keys() - pending]
            await asyncio.sleep(_LOOK_INTERVAL_SECONDS)
    await load
    return took


async def _warm_again(rig: BenchmarkRig, orders: RunningProgram) -> float:
    """Empties Redis under load, and returns the seconds until the orders service accepts a change."""
    load = _load(rig, orders, _LIMIT_SECONDS, [])
    try:
        status, body = await _ask(rig, orders, "POST", "/api/orders", order_body(rig.restaurants[0]))
        if status != 201:
            raise RuntimeError(f"{status} {body!r}")
        path, number = f"/api/orders/{json.loads(body)['data']['id']}", 0
        async with Redis.from_url(rig.redis_url) as redis:
            await redis.flushall()
        began = time.monotonic()
        while (status := (await _ask(rig, orders, "PUT", path, b'{"notes": "%d"}' % number))[0]) != 200:
            if status != 503 or load.done():
                raise RuntimeError(f"a change got {status}") from (load.exception() if load.done() else None)
            number += 1
            await asyncio.sleep(_LOOK_INTERVAL_SECONDS)
        return time.monotonic() - began
    finally:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)


async def _ask(rig: BenchmarkRig, orders: RunningProgram, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """Sends a request of the first restaurant. Returns the status and the body of the reply."""
    request = urllib.request.Request(  # noqa: S310
        orders.url + path,
        data=body,
        headers={"Authorization": f"Bearer {rig.restaurants[0].token}", "Content-Type": "application/json"},
        method=method,
    )

    def answered() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(request, timeout=_HTTP_TIMEOUT_SECONDS) as reply:  # noqa: S310
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    return await asyncio.to_thread(answered)
