"""`python -m benchmarks [QUESTION …] [--rounds 5] [--quick]`: asks, prints a table as each answer comes, and writes
results.json and the plots. Questions asked alone replace their own rows only."""

import argparse
import importlib
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from benchmarks.load import Missing
from benchmarks.question import Plan, Row, not_run
from benchmarks.rig import Rig

QUESTIONS = ("accept", "away", "tracing", "end_to_end", "read", "large", "drain", "importing", "push", "start")
RESULTS = Path(__file__).parent / "results.json"


class Results(Struct):
    machine: dict[str, Any]
    rows: list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one slice of load")
    parser.add_argument("--quick", action="store_true", help="see that it runs; nothing is written")
    chosen = parser.parse_args()
    plan = Plan(rounds=chosen.rounds, seconds=chosen.seconds)
    if chosen.quick:
        plan = Plan(rounds=1, seconds=1.0, sustained_seconds=6.0, quick=True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    began = time.monotonic()
    rows: list[Row] = []
    rig = Rig()
    try:
        rig.start()
        for name in chosen.questions or QUESTIONS:
            rig.rest()
            asked = time.monotonic()
            try:
                found = importlib.import_module(f"benchmarks.{name}").run(rig, plan)
            except Missing as error:
                found = [not_run(name, "", "", str(error))]
            rows += found
            console.print(table_of(name, found, time.monotonic() - asked))
    finally:
        rig.stop()
    console.print(f"{time.monotonic() - began:.0f} s in all; missed: {sum(row.met is False for row in rows)}")
    if not chosen.quick:
        write(rows)


def table_of(name: str, rows: list[Row], seconds: float) -> Table:
    table = Table(title=f"{name}  ({seconds:.0f} s)", title_justify="left", expand=True)
    for column, justify in (
        ("case", "left"), ("what", "left"), ("ours", "right"), ("peer", "left"), ("theirs", "right"),
        ("ratio", "right"), ("target", "right"), ("", "left"), ("note", "left"),
    ):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        met = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[row.met]
        table.add_row(
            row.case, f"{row.metric} {row.unit}", number(row.ours), row.peer, number(row.theirs),
            "" if row.ratio is None else f"{row.ratio:.2f}×", row.target, met, row.note,
        )  # fmt: skip
    return table


def number(value: float | None) -> str:
    if value is None or value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def write(rows: list[Row]) -> None:
    from benchmarks import plots  # matplotlib: only where something is drawn

    before: list[Row] = []
    if RESULTS.exists():
        before = msgspec.json.decode(RESULTS.read_bytes(), type=Results).rows
    asked = {row.question for row in rows}
    kept = [row for row in before if row.question not in asked]
    order = {name: place for place, name in enumerate(QUESTIONS)}
    every = sorted([*kept, *rows], key=lambda row: order.get(row.question, len(order)))
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GB"
    machine = {
        "at": datetime.now(UTC).date().isoformat(),
        "cores": psutil.cpu_count(),
        "memory": memory,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(Results(machine, every)), indent=1) + b"\n")
    plots.draw(every)
    plots.fill_in(every, machine)


if __name__ == "__main__":
    main()
