"""How many orders a second does one server process accept, and how long does a client wait?

Closed loop, 64 connections, one orders process, 10 % of the traces kept.

    burst      the sync worker is stopped: what the accept path alone can do. 50 restaurants in turn, and one hot one
    sustained  everything runs for a minute: every order must reach PostgreSQL, the mirror and a subscriber's screen,
               and no queue may grow

Peers: Litestar with one PostgreSQL transaction per order (peers/direct.py), Express with pg doing the same. They share
the machine with idle servers of ours; nothing of ours runs while a peer is measured, except in turn.
"""

import json
import os
import sys
import time
from collections.abc import Callable

from msgspec import Struct
from redis import Redis

from benchmarks.load import LoadResult, ProgramMissing, here, posts, wrk
from benchmarks.peers.node import prepared
from benchmarks.question import BenchmarkPlan, ResultRow, compared, interleave, median, not_run
from benchmarks.rig import ROOT, BenchmarkRig, RunningProgram, cpu_seconds
from deploy.local.child import Child
from deploy.local.ports import find_free

QUESTION = "accept"


class AcceptSlice(Struct):
    result: LoadResult
    cpu_ms: dict[str, float]
    """Per order, by process."""


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    rows: list[ResultRow] = []
    direct = direct_peer(rig)
    try:
        express: RunningProgram | None = express_peer(rig)
    except ProgramMissing as error:
        express, missing = None, str(error)
    many, hot = posts(rig.restaurants), posts(rig.restaurants[:1])

    with rig.rail() as (orders, worker):

        def ours(script: str) -> Callable[[], AcceptSlice]:
            def measure() -> AcceptSlice:
                found = measured(rig, orders, script, plan.seconds, {"orders": orders.pid, **_servers(rig)})
                rig.purge()
                return found

            return measure

        def theirs(peer: RunningProgram, script: str) -> Callable[[], AcceptSlice]:
            processes = {"server": peer.pid, "postgres": rig.postgres.pid}
            return lambda: measured(rig, peer, script, plan.seconds, processes)

        for peer in filter(None, (orders, direct, express)):
            wrk(peer.url, many, seconds=1)  # menus, prepared statements, connections
        worker.freeze()
        cases = {"rail": ours(many), "direct": theirs(direct, many)}
        if express is not None:
            cases["express"] = theirs(express, many)
        burst = interleave(plan.rounds, cases)
        hottest = interleave(plan.rounds, {"rail": ours(hot), "direct": theirs(direct, hot)})
        rig.purge()
        worker.thaw()

    per_second = {name: [one.result.per_second for one in found] for name, found in burst.items()}
    p99 = {name: [one.result.p99_ms for one in found] for name, found in burst.items()}
    said = {name: _cpu(found) for name, found in burst.items()}
    note = f"CPU ms per order: rail {said['rail']}; direct {said['direct']}"
    rows += [
        compared(QUESTION, "burst", "throughput", "orders/s", per_second["rail"], "Litestar + PostgreSQL",
                 per_second["direct"], at_least=2.5, note=note),
        compared(QUESTION, "burst", "p99", "ms", p99["rail"], "Litestar + PostgreSQL", p99["direct"], at_most=0.7),
    ]  # fmt: skip
    if express is not None:
        rows.append(
            compared(QUESTION, "burst", "throughput", "orders/s", per_second["rail"], "Express + pg",
                     per_second["express"], at_least=3.5, note=f"CPU ms per order: Express {said['express']}")
        )  # fmt: skip
    else:
        rows.append(not_run(QUESTION, "burst", "Express + pg", missing, "≥ 3.5×"))
    rows.append(
        compared(QUESTION, "one hot restaurant", "throughput", "orders/s",
                 [one.result.per_second for one in hottest["rail"]], "Litestar + PostgreSQL",
                 [one.result.per_second for one in hottest["direct"]], at_least=4.0)
    )  # fmt: skip
    rows += sustained(rig, plan, direct)
    for running in filter(None, (direct, express)):
        running.stop()
    return rows


def measured(
    rig: BenchmarkRig, running: RunningProgram, script: str, seconds: float, processes: dict[str, int | None]
) -> AcceptSlice:
    before = {name: cpu_seconds(pid) for name, pid in processes.items()}
    result = wrk(running.url, script, seconds=seconds)
    spent = {name: cpu_seconds(pid) - before[name] for name, pid in processes.items()}
    return AcceptSlice(result, {name: 1000 * used / result.requests for name, used in spent.items()})


def _servers(rig: BenchmarkRig) -> dict[str, int | None]:
    return {"rabbitmq": rig.rabbitmq.pid, "redis": rig.redis.pid}


def _cpu(slices: list[AcceptSlice]) -> str:
    return ", ".join(f"{name} {median([one.cpu_ms[name] for one in slices]):.2f}" for name in slices[0].cpu_ms)


# -- sustained ---------------------------------------------------------------------------------------------------


def sustained(rig: BenchmarkRig, plan: BenchmarkPlan, direct: RunningProgram) -> list[ResultRow]:
    """A minute with everything running; the direct peer for a third of it before and after, in the same run."""
    script = posts(rig.restaurants)
    theirs = [wrk(direct.url, script, seconds=plan.sustained_seconds / 3)]
    with rig.rail() as (orders, worker):
        notifier = rig.service("notifier")
        screen = _ScreenProcess(rig, notifier)
        before, mirrored_before = rig.count_orders(), _mirrored(rig)
        processes = {
            "orders": orders.pid, "worker": worker.pid, "notifier": notifier.pid, "postgres": rig.postgres.pid,
            **_servers(rig),
        }  # fmt: skip
        spent = {name: cpu_seconds(pid) for name, pid in processes.items()}
        depths, slices = [], []
        began = time.monotonic()
        while time.monotonic() - began < plan.sustained_seconds:
            slices.append(wrk(orders.url, script, seconds=plan.sustained_seconds / 6))
            depths.append(rig.depth())
        accepted = sum(one.requests for one in slices)
        used = {name: 1000 * (cpu_seconds(pid) - spent[name]) / accepted for name, pid in processes.items()}
        behind = max(0, accepted - (rig.count_orders() - before))
        rig.until(lambda: rig.count_orders() - before >= accepted, "every accepted order in PostgreSQL")
        rig.until(lambda: screen.seen() >= accepted, "every accepted order on the screen")
        stored = rig.count_orders() - before
        rig.until(lambda: screen.seen() >= stored, "every stored order on the screen")
        mirrored = _mirrored(rig) - mirrored_before
        screen.close()
        notifier.stop()
    theirs.append(wrk(direct.url, script, seconds=plan.sustained_seconds / 3))
    # wrk does not count what it had not read yet when a slice ended: at most 64 a slice.
    sound = accepted <= stored <= accepted + 64 * len(slices) and screen.last == stored == mirrored
    note = (
        f"{accepted} accepted, {stored} in PostgreSQL, {screen.last} on the screen, {mirrored} in the mirror"
        f" ({'all there' if sound else 'NOT THE SAME'}); messages queued after each sixth: {depths};"
        f" {behind} not yet in PostgreSQL at the end; CPU ms per order: "
        + ", ".join(f"{name} {value:.2f}" for name, value in used.items())
    )
    row = compared(
        QUESTION, "sustained", "throughput", "orders/s", [one.per_second for one in slices], "Litestar + PostgreSQL",
        [one.per_second for one in theirs], at_least=1.5, note=note,
    )  # fmt: skip
    grew = depths[-1] > max(200, 2 * max(depths[: len(depths) // 2]))
    row.met = bool(row.met) and sound and not grew
    return [row]


class _ScreenProcess:
    """A subscriber of every restaurant's event stream, in a process of its own, that counts the orders it sees."""

    def __init__(self, rig: BenchmarkRig, notifier: RunningProgram) -> None:
        self._counted = rig.folder / "screen"
        tokens = rig.folder / "tokens.json"
        tokens.write_text(json.dumps([one.token for one in rig.restaurants]))
        self._child = Child.spawn(
            [sys.executable, "-m", "benchmarks.screen", notifier.url, tokens, self._counted],
            log=rig.folder / "logs" / "screen.log",
            env=dict(os.environ),
            cwd=ROOT,
        )
        self.last = 0
        rig.until(self._counted.exists, "the screen to be connected")

    def seen(self) -> int:
        self.last = int(self._counted.read_text() or 0)
        return self.last

    def close(self) -> None:
        self._child.terminate(5)


def _mirrored(rig: BenchmarkRig) -> int:
    """Orders in the live windows of the mirror."""
    with Redis.from_url(rig.redis_url) as redis:
        return sum(int(redis.zcard(f"{{{one.id}}}:live:order")) for one in rig.restaurants)  # type: ignore[arg-type]


# -- peers -------------------------------------------------------------------------------------------------------


def direct_peer(rig: BenchmarkRig) -> RunningProgram:
    (port,) = find_free(1)
    env = _peer_environment(rig, port, rig.make_database("bench_direct"))
    return rig.program([sys.executable, "-m", "benchmarks.peers.direct"], env, port, name="direct")


def express_peer(rig: BenchmarkRig) -> RunningProgram:
    """Raises ProgramMissing without Node. Uses the tables of the direct peer in a database of its own."""
    folder = here("express")
    node = prepared(folder)
    (port,) = find_free(1)
    url = rig.make_database("bench_express")
    _schema(url)
    env = {**_peer_environment(rig, port, url), "NODE_ENV": "production"}
    return rig.program([node, "server.js"], env, port, name="express", cwd=folder)


def _schema(url: str) -> None:
    from benchmarks.peers.direct import SCHEMA
    from benchmarks.rig import execute

    execute(url, SCHEMA)


def _peer_environment(rig: BenchmarkRig, port: int, database_url: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")},
        "BENCH_PORT": str(port),
        "BENCH_DATABASE_URL": database_url,
        "BENCH_RESTAURANTS": str(rig.restaurants_file),
    }
