"""Formats result rows as tables: one for the terminal, one for docs/benchmarks.md."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.question import ResultRow

DOCS = Path(__file__).resolve().parents[1] / "docs"
_RESULTS_REGION = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)
_COLUMNS = (
    ("case", "left"), ("metric", "left"), ("ours", "right"), ("peer", "left"), ("theirs", "right"), ("ratio", "right"),
    ("target", "right"), ("", "left"), ("note", "left"),
)  # fmt: skip


def terminal_table(question: str, rows: Sequence[ResultRow], seconds: float) -> Table:
    """Returns the table of a question. `seconds` is the time that the question took."""
    table = Table(title=f"{question}  ({seconds:.0f} s)", title_justify="left", expand=True)
    for column, justify in _COLUMNS:
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        met = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[row.met]
        table.add_row(
            row.case, f"{row.metric} {row.unit}", number(row.ours), row.peer, number(row.theirs), _ratio(row),
            row.target, met, row.note,
        )  # fmt: skip
    return table


def number(value: float | None) -> str:
    if value is None or value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def _ratio(row: ResultRow) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f}×"


def fill_in(rows: Sequence[ResultRow], machine: dict[str, Any]) -> None:
    """Replaces the table between the two HTML comments in docs/benchmarks.md."""
    page = DOCS / "benchmarks.md"
    table = markdown_table(rows, machine)
    page.write_text(_RESULTS_REGION.sub(lambda found: found[1] + table + found[2], page.read_text()))


def markdown_table(rows: Sequence[ResultRow], machine: dict[str, Any]) -> str:
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = [f"Machine: {described}.", "", "| question | case | metric | ours | peer | theirs | ratio | target | |"]
    lines.append("|---|---|---|---:|---|---:|---:|---:|---|")
    for row in rows:
        met = {True: "met", False: "**missed**", None: ""}[row.met]
        lines.append(
            f"| {row.question} | {row.case} | {row.metric} {row.unit} | {number(row.ours)} | {row.peer}"
            f" | {number(row.theirs)} | {_ratio(row)} | {row.target} | {met} |"
        )
    notes = [f"- *{row.question}, {row.case}*: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, "", *notes]) + "\n"
