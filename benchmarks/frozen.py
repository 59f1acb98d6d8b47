"""Does accepting orders care that PostgreSQL hangs?

Everything runs; PostgreSQL is stopped like a frozen machine (SIGSTOP: connections stay, nothing answers) for every
second slice. Between slices the writer catches up. The bound on throughput and p99 is against our own normal slices.
"""

from benchmarks.load import Result, posts, wrk
from benchmarks.question import Plan, Row, compared, interleave
from benchmarks.rig import Rig

QUESTION = "frozen"


def run(rig: Rig, plan: Plan) -> list[Row]:
    script = posts(rig.restaurants)
    with rig.rail() as (orders, _):
        wrk(orders.url, script, seconds=1)

        def normal() -> Result:
            rig.until(lambda: rig.depth() == 0, "the lane to be empty")
            return wrk(orders.url, script, seconds=plan.seconds)

        def frozen() -> Result:
            rig.until(lambda: rig.depth() == 0, "the lane to be empty")
            rig.postgres.freeze()
            try:
                return wrk(orders.url, script, seconds=plan.seconds)
            finally:
                rig.postgres.thaw()

        found = interleave(plan.rounds, {"frozen": frozen, "normal": normal})
        rig.until(lambda: rig.depth() == 0, "the lane to be empty")
    return [
        compared(
            QUESTION,
            "PostgreSQL frozen",
            "throughput",
            "orders/s",
            [one.per_second for one in found["frozen"]],
            "the rail, all well",
            [one.per_second for one in found["normal"]],
            at_least=0.9,
        ),
        compared(
            QUESTION,
            "PostgreSQL frozen",
            "p99",
            "ms",
            [one.p99_ms for one in found["frozen"]],
            "the rail, all well",
            [one.p99_ms for one in found["normal"]],
            at_most=1.5,
        ),
    ]
