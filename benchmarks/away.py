"""Does an absent store slow down accepting orders?

Everything runs. Before a slice PostgreSQL or the mirror is killed (nothing listens) or stopped like a frozen machine
(SIGSTOP: connections stay open, nothing answers). The first two seconds under load after a freeze are not counted:
requests under way at that moment pay their timeout once, then the breaker is open. Between slices the writer catches up
and the mirror is filled again. The bounds are ratios to our own normal slices.
"""

from collections.abc import Callable

from benchmarks.load import LoadResult, posts, wrk
from benchmarks.question import BenchmarkPlan, ResultRow, compared, interleave
from benchmarks.rig import BenchmarkRig

QUESTION = "away"
_PEER = "the rail, all well"
_P99_AT_MOST = {"PostgreSQL": 1.5, "the mirror": 3.0}
"""Ratio to the p99 of the normal slices."""
_THROUGHPUT_AT_LEAST = {"PostgreSQL": 0.9, "the mirror": None}
_UNCOUNTED_SECONDS = 2.0
"""Load after a freeze that is not measured."""


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    script = posts(rig.restaurants)
    with rig.rail() as (orders, worker):
        wrk(orders.url, script, seconds=1)

        def normal() -> LoadResult:
            rig.until(lambda: rig.depth() == 0, "an empty lane")
            rig.warm(worker)
            return wrk(orders.url, script, seconds=plan.seconds)

        def without(
            stop: Callable[[], object], resume: Callable[[], object], uncounted_seconds: float = 0.0
        ) -> Callable[[], LoadResult]:
            def measured() -> LoadResult:
                rig.until(lambda: rig.depth() == 0, "an empty lane")
                rig.warm(worker)
                stop()
                try:
                    if uncounted_seconds:
                        wrk(orders.url, script, seconds=uncounted_seconds)
                    return wrk(orders.url, script, seconds=plan.seconds)
                finally:
                    resume()

            return measured

        cases: dict[str, Callable[[], LoadResult]] = {"normal": normal}
        for store, server in (("PostgreSQL", rig.postgres), ("the mirror", rig.redis)):
            cases[f"{store} down"] = without(server.kill, server.start)
            cases[f"{store} frozen"] = without(server.freeze, server.thaw, _UNCOUNTED_SECONDS)
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
                     normal_per_second, at_least=_THROUGHPUT_AT_LEAST[store]),
            compared(QUESTION, case, "p99", "ms", [one.p99_ms for one in slices], _PEER, normal_p99,
                     at_most=_P99_AT_MOST[store]),
        ]  # fmt: skip
    return rows
