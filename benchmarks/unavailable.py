"""Does the rail accept orders more slowly while a store is unavailable?

All services run. Before a slice, PostgreSQL or the mirror is killed (nothing listens) or frozen by SIGSTOP (connections
stay open, but nothing answers). The first two seconds of load after a freeze are not measured: requests that are in
flight then wait for their timeout once, and after that the breaker is open. Between slices the writer catches up and
the mirror is filled again. The bounds are ratios to our own slices without a fault.
"""

from collections.abc import Callable

from benchmarks.load import LoadResult, posts, wrk
from benchmarks.question import BenchmarkPlan, ResultRow, compared, interleave
from benchmarks.rig import BenchmarkRig

QUESTION = "unavailable"
_PEER = "the rail without a fault"
_MAX_P99_RATIO = {"PostgreSQL": 1.5, "the mirror": 3.0}
_MIN_THROUGHPUT_RATIO = {"PostgreSQL": 0.9, "the mirror": None}
_UNMEASURED_SECONDS = 2.0
"""Length of the load after a freeze that is not measured."""


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    script = posts(rig.restaurants)
    with rig.rail() as (orders, worker):
        wrk(orders.url, script, seconds=1)

        def normal() -> LoadResult:
            rig.until(lambda: rig.depth() == 0, "an empty lane")
            rig.warm(worker)
            return wrk(orders.url, script, seconds=plan.seconds)

        def without(
            stop: Callable[[], object], resume: Callable[[], object], unmeasured_seconds: float = 0.0
        ) -> Callable[[], LoadResult]:
            def measured() -> LoadResult:
                rig.until(lambda: rig.depth() == 0, "an empty lane")
                rig.warm(worker)
                stop()
                try:
                    if unmeasured_seconds:
                        wrk(orders.url, script, seconds=unmeasured_seconds)
                    return wrk(orders.url, script, seconds=plan.seconds)
                finally:
                    resume()

            return measured

        cases: dict[str, Callable[[], LoadResult]] = {"normal": normal}
        for store, server in (("PostgreSQL", rig.postgres), ("the mirror", rig.redis)):
            cases[f"{store} down"] = without(server.kill, server.start)
            cases[f"{store} frozen"] = without(server.freeze, server.thaw, _UNMEASURED_SECONDS)
        found = interleave(plan.rounds, cases)
        rig.until(lambda: rig.depth() == 0, "an empty lane")
    normal_per_second = [one.per_second for one in found["normal"]]
    normal_p99 = [one.p99_ms for one in found["normal"]]
    rows = []
    for case, slices in found.items():
        store = case.rpartition(" ")[0]
        if not store:
            continue
        rows += [
            compared(QUESTION, case, "throughput", "orders/s", [one.per_second for one in slices], _PEER,
                     normal_per_second, at_least=_MIN_THROUGHPUT_RATIO[store]),
            compared(QUESTION, case, "p99", "ms", [one.p99_ms for one in slices], _PEER, normal_p99,
                     at_most=_MAX_P99_RATIO[store]),
        ]  # fmt: skip
    return rows
