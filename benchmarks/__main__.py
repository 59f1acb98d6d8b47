"""`python -m benchmarks [QUESTION …] [--rounds 5] [--quick]`: measures the rail against its peers.

After each question, it prints a table and writes results.json, the plots and the table of docs/benchmarks.md. A run
that is stopped keeps the answers that it has. A run replaces only the rows of the questions that it asks. A program
that is not installed is reported in its row. A question that fails is reported too, the others still run, and the
command ends with status 1.
"""

import argparse
import importlib
import platform
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any

import psutil
from rich.console import Console

from benchmarks.load import ProgramMissing
from benchmarks.question import BenchmarkPlan, ResultRow, not_run
from benchmarks.report import fill_in, terminal_table
from benchmarks.results import RESULTS, merged, read_rows, write_rows
from benchmarks.rig import BenchmarkRig

QUESTIONS = (
    "accept",
    "unavailable",
    "tracing",
    "end_to_end",
    "read",
    "large",
    "warm_up",
    "drain",
    "importing",
    "push",
    "start",
)
_PIPE_COLUMNS = 150
"""Width of the tables when the output is not a terminal."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--rounds", type=int, default=5, help="number of slices of each case")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one slice of load in seconds")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs; write nothing")
    arguments = parser.parse_args()
    plan = BenchmarkPlan(rounds=arguments.rounds, seconds=arguments.seconds)
    if arguments.quick:
        plan = BenchmarkPlan(rounds=1, seconds=1.0, sustained_seconds=6.0, quick=True)
    console = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
    console.print("All systems run without rate limits: neither the services nor the peers answer 429.")
    began = time.monotonic()
    rows: list[ResultRow] = []
    failed: list[str] = []
    rig = BenchmarkRig()
    try:
        rig.start()
        for name in arguments.questions or QUESTIONS:
            rig.wait_until_idle()
            question_began = time.monotonic()
            answers = answer(name, rig, plan, failed)
            rows += answers
            console.print(terminal_table(name, answers, time.monotonic() - question_began))
            if not arguments.quick:
                write(rows, console)
    finally:
        rig.stop()
    console.print(f"{time.monotonic() - began:.0f} s in total; targets missed: {sum(row.met is False for row in rows)}")
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/]")
    return 1 if failed else 0


def answer(name: str, rig: BenchmarkRig, plan: BenchmarkPlan, failed: list[str]) -> list[ResultRow]:
    """Returns the rows of one question. Adds its name to `failed` if it raises anything but ProgramMissing."""
    try:
        rows: list[ResultRow] = importlib.import_module(f"benchmarks.{name}").run(rig, plan)
    except ProgramMissing as error:
        return [not_run(name, "", "", str(error))]
    except Exception as error:  # noqa: BLE001  (a failure must not lose the figures of the other questions)
        traceback.print_exc()
        failed.append(name)
        return [not_run(name, "", "", f"{type(error).__name__}: {error}")]
    return rows


def write(rows: list[ResultRow], console: Console) -> None:
    from benchmarks import plots  # matplotlib is needed only here

    all_rows = merged(read_rows(RESULTS, lambda sentence: console.print(f"[yellow]{sentence}[/]")), rows, QUESTIONS)
    machine: dict[str, Any] = {
        "at": datetime.now(UTC).date().isoformat(),
        "cores": psutil.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GB",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "rate limits": "off",
    }
    write_rows(RESULTS, all_rows, machine)
    plots.draw(all_rows)
    fill_in(all_rows, machine)


if __name__ == "__main__":
    sys.exit(main())
