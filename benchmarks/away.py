"""Does accepting orders care that a store is away?

Everything runs; before a slice PostgreSQL or the mirror is killed (nothing listens), or stopped like a frozen machine
(SIGSTOP: connections stay, nothing answers). Of a frozen one the first two seconds of load are not counted: what is
under way when it freezes pays its timeout, once; then the breaker is open. Between slices the writer catches up and the
mirror is filled again. The bounds are against our own normal slices.
"""

from collections.abc import Callable

from benchmarks.load import LoadResult, posts, wrk
from benchmarks.question import BenchmarkPlan, ResultRow, compared, interleave
from benchmarks.rig import BenchmarkRig

QUESTION = "away"
# p99 against normal.
_MOST = {"PostgreSQL": 1.5, "the mirror": 3.0}
_FIRST = 2.0


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    script = posts(rig.restaurants)
    with rig.rail() as (orders, worker):
        wrk(orders.url, script, seconds=1)

        def normal() -> LoadResult:
            rig.until(lambda: rig.depth() == 0, "the lane to be empty")
            rig.warm(worker)
            return wrk(orders.url, script, seconds=plan.seconds)

        def without(
            stop: Callable[[], object], back: Callable[[], object], first: float = 0.0
        ) -> Callable[[], LoadResult]:
            def measured() -> LoadResult:
                rig.until(lambda: rig.depth() == 0, "the lane to be empty")
                rig.warm(worker)
                stop()
                try:
                    if first:
                        wrk(orders.url, script, seconds=first)
                    return wrk(orders.url, script, seconds=plan.seconds)
                finally:
                    back()

            return measured

        cases: dict[str, Callable[[], LoadResult]] = {"normal": normal}
        for name, server in (("PostgreSQL", rig.postgres), ("the mirror", rig.redis)):
            cases[f"{name} down"] = without(server.kill, server.start)
            cases[f"{name} frozen"] = without(server.freeze, server.thaw, _FIRST)
        found = interleave(plan.rounds, cases)
        rig.until(lambda: rig.depth() == 0, "the lane to be empty")
    rows = []
    for case in cases:
        name = case.rpartition(" ")[0]
        if not name:
            continue
        peer = "the rail, all well"
        rows += [
            compared(
                QUESTION,
                case,
                "throughput",
                "orders/s",
                [one.per_second for one in found[case]],
                peer,
                [one.per_second for one in found["normal"]],
                at_least=0.9 if name == "PostgreSQL" else None,
            ),
            compared(
                QUESTION,
                case,
                "p99",
                "ms",
                [one.p99_ms for one in found[case]],
                peer,
                [one.p99_ms for one in found["normal"]],
                at_most=_MOST[name],
            ),
        ]
    return rows
