"""Measures the cost of traces.

Two orders services run side by side, and the load goes to them in turn. One keeps 10 % of the traces in files, as by
default in production; the other keeps none. The sync worker is frozen meanwhile.
"""

from benchmarks.load import posts, wrk
from benchmarks.question import BenchmarkPlan, ResultRow, compared, interleave
from benchmarks.rig import BenchmarkRig, RunningProgram

QUESTION = "tracing"


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    script = posts(rig.restaurants)
    with rig.rail() as (on, worker):
        off = rig.service("orders", trace_sample=0)
        for one in (on, off):
            wrk(one.url, script, seconds=1)
        worker.freeze()

        def measure(one: RunningProgram) -> float:
            found = wrk(one.url, script, seconds=plan.seconds).per_second
            rig.drain(worker)
            return found

        found = interleave(plan.rounds, {"on": lambda: measure(on), "off": lambda: measure(off)})
        worker.thaw()
        off.stop()
    return [
        compared(
            QUESTION,
            "default sampling",
            "throughput",
            "orders/s",
            found["on"],
            "tracing off",
            found["off"],
            at_least=0.9,
        )
    ]
