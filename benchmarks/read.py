"""How fast is an order read by its id, from the mirror and from PostgreSQL?

The load is a closed loop over 64 connections, without rate limits. A second orders service has no reachable mirror, so
it reads everything from PostgreSQL. The peer is a bare Litestar route that returns the same bytes (peers/bare.py).
"""

import os
import sys
import urllib.request

from benchmarks.load import gets, order_body, wrk
from benchmarks.question import BenchmarkPlan, ResultRow, compared, interleave
from benchmarks.rig import BenchmarkRig
from deploy.local.port_check import find_free

QUESTION = "read"


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    with rig.rail() as (orders, _):
        one = rig.restaurants[0]
        headers = {"Authorization": f"Bearer {one.token}"}
        placed = urllib.request.Request(f"{orders.url}/api/orders", data=order_body(one), headers=headers)  # noqa: S310
        with urllib.request.urlopen(placed) as reply:  # noqa: S310
            body = reply.read()
        id_ = body[body.index(b'"id":"') + 6 :][:36].decode()
        path = f"/api/orders/{id_}"
        unused_port, port = find_free(2)
        without_mirror = rig.service("orders", redis_url=f"redis://127.0.0.1:{unused_port}/0")

        def read(url: str) -> bytes:
            request = urllib.request.Request(url + path, headers=headers)  # noqa: S310
            with urllib.request.urlopen(request) as reply:  # noqa: S310
                return bytes(reply.read())

        rig.until(lambda: b'"synced"' in read(orders.url), "the order in PostgreSQL")
        body_file = rig.folder / "body.json"
        body_file.write_bytes(read(orders.url))
        env = {**os.environ, "BENCH_BODY": str(body_file), "BENCH_PORT": str(port)}
        bare = rig.program([sys.executable, "-m", "benchmarks.peers.bare"], env, port, name="bare")
        script = gets(path, one.token)
        found = interleave(
            plan.rounds,
            {
                running.url: lambda running=running: wrk(running.url, script, seconds=plan.seconds).per_second  # type: ignore[misc]
                for running in (orders, without_mirror, bare)
            },
        )
        for running in (without_mirror, bare):
            running.stop()
    peer = "bare Litestar route"
    return [
        compared(QUESTION, "from the mirror", "throughput", "reads/s", found[orders.url], peer, found[bare.url],
                 at_least=0.6),
        compared(QUESTION, "from PostgreSQL", "throughput", "reads/s", found[without_mirror.url], peer,
                 found[bare.url]),
    ]  # fmt: skip
