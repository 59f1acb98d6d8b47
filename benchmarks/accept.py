"""How many orders per second does one server process accept, and how long does a client wait?

The load is a closed loop over 64 connections to one orders process. 10 % of the traces are kept, and there are no rate
limits.

    burst      the sync worker is frozen, so only the accept path is measured. The orders go to 50 restaurants in turn,
               then to one hot restaurant
    sustained  everything runs for a minute: every order must reach PostgreSQL, the mirror and a subscriber's screen,
               and no queue may grow

Peers, the most comparable first:

    dual write              one PostgreSQL transaction, the mirror, a confirmed publish (peers/dual_write.py): the same
                            work as the rail. In the sustained case a notifier also pushes to a screen
    Litestar + PostgreSQL   the bare transaction (peers/direct.py): no mirror, no push
    Express + pg            the bare transaction in Node (peers/express)

The peers share the machine with our idle servers. Only one system is under load at a time.
"""

import time
from collections.abc import Callable

from msgspec import Struct
from redis import Redis

from benchmarks.accept_peers import DualWrite, PushScreen, direct_peer, express_peer
from benchmarks.load import LoadResult, ProgramMissing, posts, wrk
from benchmarks.question import BenchmarkPlan, ResultRow, compared, interleave, median, not_run
from benchmarks.rig import BenchmarkRig, RunningProgram, cpu_seconds

QUESTION = "accept"
_DUAL, _DIRECT, _EXPRESS = DualWrite.label, "Litestar + PostgreSQL", "Express + pg"
_CONNECTIONS = 64
_SETTLE_TIMEOUT_SECONDS = 20.0
"""The time limit for the three stores of the dual write to agree after the load."""


class AcceptSlice(Struct):
    result: LoadResult
    cpu_ms: dict[str, float]
    """CPU milliseconds per order, by process."""


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    dual, direct = DualWrite(rig), direct_peer(rig)
    missing = ""
    express: RunningProgram | None = None
    try:
        express = express_peer(rig)
    except ProgramMissing as error:
        missing = str(error)
    try:
        return [*burst(rig, plan, dual, direct, express, missing), *sustained(rig, plan, dual, direct)]
    finally:
        dual.stop()
        for running in filter(None, (direct, express)):
            running.stop()


# -- burst -------------------------------------------------------------------------------------------------------


def burst(
    rig: BenchmarkRig,
    plan: BenchmarkPlan,
    dual: DualWrite,
    direct: RunningProgram,
    express: RunningProgram | None,
    missing: str,
) -> list[ResultRow]:
    """Measures bursts against each peer. `missing`: the reason why `express` is None."""
    many, hot = posts(rig.restaurants), posts(rig.restaurants[:1])
    brokers = {"rabbitmq": rig.rabbitmq.pid, "redis": rig.redis.pid}
    with rig.rail() as (orders, worker):

        def ours(script: str) -> Callable[[], AcceptSlice]:
            def measure() -> AcceptSlice:
                found = _measure_slice(orders, script, plan.seconds, {"orders": orders.pid, **brokers})
                rig.drain(worker)
                return found

            return measure

        def theirs(peer: RunningProgram, script: str, processes: dict[str, int | None]) -> Callable[[], AcceptSlice]:
            return lambda: _measure_slice(peer, script, plan.seconds, {"server": peer.pid, **processes})

        postgres = {"postgres": rig.postgres.pid}
        for peer in filter(None, (orders, dual.program, direct, express)):
            wrk(peer.url, many, seconds=1)  # loads menus, prepares statements and opens connections
        worker.freeze()
        cases = {
            "rail": ours(many),
            _DUAL: theirs(dual.program, many, {**postgres, **brokers}),
            _DIRECT: theirs(direct, many, postgres),
        }
        if express is not None:
            cases[_EXPRESS] = theirs(express, many, postgres)
        spread = interleave(plan.rounds, cases)
        hottest = interleave(
            plan.rounds,
            {
                "rail": ours(hot),
                _DUAL: theirs(dual.program, hot, {**postgres, **brokers}),
                _DIRECT: theirs(direct, hot, postgres),
            },
        )
        worker.thaw()

    def row(case: str, found: dict[str, list[AcceptSlice]], peer: str, at_least: float | None) -> ResultRow:
        note = f"CPU ms per order: rail {_cpu(found['rail'])}; {peer} {_cpu(found[peer])}"
        return compared(QUESTION, case, "throughput", "orders/s", _per_second(found["rail"]), peer,
                        _per_second(found[peer]), at_least=at_least, note=note)  # fmt: skip

    def p99_row(peer: str) -> ResultRow:
        return compared(QUESTION, "burst", "p99", "ms", _p99(spread["rail"]), peer, _p99(spread[peer]), at_most=0.7)

    rows = [
        row("burst", spread, _DUAL, 2.3),
        p99_row(_DUAL),
        row("burst", spread, _DIRECT, 2.5),
        p99_row(_DIRECT),
    ]
    if express is not None:
        rows.append(row("burst", spread, _EXPRESS, 3.5))
    else:
        rows.append(not_run(QUESTION, "burst", _EXPRESS, missing, "≥ 3.5×"))
    return [
        *rows,
        row("one hot restaurant", hottest, _DUAL, None),
        row("one hot restaurant", hottest, _DIRECT, 4.0),
    ]


def _measure_slice(
    running: RunningProgram, script: str, seconds: float, processes: dict[str, int | None]
) -> AcceptSlice:
    before = {name: cpu_seconds(pid) for name, pid in processes.items()}
    result = wrk(running.url, script, connections=_CONNECTIONS, seconds=seconds)
    spent = {name: cpu_seconds(pid) - before[name] for name, pid in processes.items()}
    return AcceptSlice(result, {name: 1000 * used / result.requests for name, used in spent.items()})


def _per_second(slices: list[AcceptSlice]) -> list[float]:
    return [one.result.per_second for one in slices]


def _p99(slices: list[AcceptSlice]) -> list[float]:
    return [one.result.p99_ms for one in slices]


def _cpu(slices: list[AcceptSlice]) -> str:
    return ", ".join(f"{name} {median([one.cpu_ms[name] for one in slices]):.2f}" for name in slices[0].cpu_ms)


# -- sustained ---------------------------------------------------------------------------------------------------


class SustainedRun(Struct):
    slices: list[LoadResult]
    complete_and_stable: bool
    """True if every accepted order reached all stores and the screen, and no queue grew."""
    note: str


def sustained(rig: BenchmarkRig, plan: BenchmarkPlan, dual: DualWrite, direct: RunningProgram) -> list[ResultRow]:
    """Measures the rail with everything running. Each peer runs twice for a third of
    that time: before the rail and after it."""
    script = posts(rig.restaurants)
    third = plan.sustained_seconds / 3
    duals = [_sustained_dual_write(rig, dual, script, third)]
    directs = [wrk(direct.url, script, connections=_CONNECTIONS, seconds=third)]
    ours = _sustained_rail(rig, plan, script)
    directs.append(wrk(direct.url, script, connections=_CONNECTIONS, seconds=third))
    duals.append(_sustained_dual_write(rig, dual, script, third))
    samples = [one.per_second for one in ours.slices]
    dual_note = "; ".join(one.note for one in duals)
    rows = [
        compared(QUESTION, "sustained", "throughput", "orders/s", samples, _DUAL,
                 [one.per_second for slice_ in duals for one in slice_.slices], at_least=1.6,
                 note=f"rail: {ours.note}. Dual write: {dual_note}"),
        compared(QUESTION, "sustained", "throughput", "orders/s", samples, _DIRECT,
                 [one.per_second for one in directs], at_least=1.5),
    ]  # fmt: skip
    for row in rows:
        row.met = bool(row.met) and ours.complete_and_stable
    if not all(one.complete_and_stable for one in duals):
        rows[0].met = None
    return rows


def _sustained_rail(rig: BenchmarkRig, plan: BenchmarkPlan, script: str) -> SustainedRun:
    with rig.rail() as (orders, worker):
        notifier = rig.service("notifier")
        screen = PushScreen(rig, notifier)
        before, in_mirror_before = rig.count_orders(), _count_in_mirror(rig)
        processes = {
            "orders": orders.pid, "worker": worker.pid, "notifier": notifier.pid, "postgres": rig.postgres.pid,
            "rabbitmq": rig.rabbitmq.pid, "redis": rig.redis.pid,
        }  # fmt: skip
        cpu_before = {name: cpu_seconds(pid) for name, pid in processes.items()}
        depths, slices = [], []
        began = time.monotonic()
        while time.monotonic() - began < plan.sustained_seconds:
            slices.append(wrk(orders.url, script, connections=_CONNECTIONS, seconds=plan.sustained_seconds / 6))
            depths.append(rig.depth())
        accepted = sum(one.requests for one in slices)
        cpu_ms = {name: 1000 * (cpu_seconds(pid) - cpu_before[name]) / accepted for name, pid in processes.items()}
        behind = max(0, accepted - (rig.count_orders() - before))
        rig.until(lambda: rig.count_orders() - before >= accepted, "every accepted order in PostgreSQL")
        rig.until(lambda: screen.seen() >= accepted, "every accepted order on the screen")
        in_postgres = rig.count_orders() - before
        rig.until(lambda: screen.seen() >= in_postgres, "every order of PostgreSQL on the screen")
        in_mirror = _count_in_mirror(rig) - in_mirror_before
        screen.close()
        notifier.stop()
    complete = _complete(accepted, in_postgres, screen.last_count, in_mirror, len(slices))
    note = (
        f"{_counts_note(accepted, in_postgres, screen.last_count, in_mirror, complete)}; messages queued"
        f" after each sixth: {depths}; {behind} not yet in PostgreSQL at the end; CPU ms per order: "
        + ", ".join(f"{name} {value:.2f}" for name, value in cpu_ms.items())
    )
    grew = depths[-1] > max(200, 2 * max(depths[: len(depths) // 2]))
    return SustainedRun(slices, complete and not grew, note)


def _sustained_dual_write(rig: BenchmarkRig, dual: DualWrite, script: str, seconds: float) -> SustainedRun:
    with dual.open_screen() as screen:
        before, in_mirror_before = dual.count_orders(), dual.count_in_mirror()
        result = wrk(dual.program.url, script, connections=_CONNECTIONS, seconds=seconds)

        def counts() -> tuple[int, int, int]:
            return dual.count_orders() - before, screen.seen(), dual.count_in_mirror() - in_mirror_before

        # If a client disconnects between two of the three writes, its order stays incomplete and the counts differ. The
        # note then reports it.
        rig.reached(lambda: len(set(counts())) == 1, _SETTLE_TIMEOUT_SECONDS)
        in_postgres, on_screen, in_mirror = counts()
    complete = _complete(result.requests, in_postgres, on_screen, in_mirror, 1)
    return SustainedRun([result], complete, _counts_note(result.requests, in_postgres, on_screen, in_mirror, complete))


def _complete(accepted: int, in_postgres: int, on_screen: int, in_mirror: int, slices: int) -> bool:
    """Returns whether PostgreSQL, the mirror and the screen have the same orders, and all that were accepted.

    wrk does not count the replies that it had not read when a slice ended: at most one per connection.
    """
    return accepted <= in_postgres <= accepted + _CONNECTIONS * slices and on_screen == in_postgres == in_mirror


def _counts_note(accepted: int, in_postgres: int, on_screen: int, in_mirror: int, complete: bool) -> str:
    return (
        f"{accepted} accepted, {in_postgres} in PostgreSQL, {on_screen} on the screen, {in_mirror} in the mirror"
        f" ({'complete' if complete else 'THE COUNTS DIFFER'})"
    )


def _count_in_mirror(rig: BenchmarkRig) -> int:
    """Returns the number of orders in the live windows of the mirror."""
    with Redis.from_url(rig.redis_url) as redis:
        return sum(int(redis.zcard(f"{{{one.id}}}:live:order")) for one in rig.restaurants)
