"""The plots of the README and the table of docs/benchmarks.md, from the rows of the last run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.question import Row

mpl.use("svg")
mpl.rcParams.update(
    {"svg.hashsalt": "ticketrail", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
)

import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

DOCS = Path(__file__).resolve().parents[1] / "docs"
_OURS, _DIRECT, _OTHER = "#d9480f", "#868e96", "#ced4da"


def draw(rows: Sequence[Row]) -> None:
    (DOCS / "plots").mkdir(exist_ok=True)
    _bars(
        "accept.svg",
        "Orders accepted a second, 64 connections, one server process",
        [
            (label, row.ours, row.theirs, row.peer)
            for label, row in (
                ("burst", _row(rows, "accept", "burst", "Litestar + PostgreSQL")),
                ("burst", _row(rows, "accept", "burst", "Express + pg")),
                ("one hot restaurant", _row(rows, "accept", "one hot restaurant")),
                ("sustained, everything\nrunning", _row(rows, "accept", "sustained")),
                ("PostgreSQL frozen", _row(rows, "away", "PostgreSQL frozen")),
            )
            if row is not None
        ],
    )
    _bars(
        "push_drain.svg",
        "Throughput against peers (ours = 1)",
        [
            (f"{row.question}\n{row.case}", 1.0, row.theirs / row.ours, row.peer)
            for row in rows
            if row.question in ("drain", "push", "read") and row.theirs and row.ours and row.unit.endswith("/s")
        ],
    )


def _row(rows: Sequence[Row], question: str, case: str, peer: str | None = None) -> Row | None:
    return next(
        (
            row
            for row in rows
            if row.question == question
            and row.case == case
            and row.metric == "throughput"
            and row.theirs
            and (peer is None or row.peer == peer)
        ),
        None,
    )


def _bars(name: str, title: str, groups: Sequence[tuple[str, float, float | None, str]]) -> None:
    if not groups:
        return
    figure, axes = plt.subplots(figsize=(8.5, 0.75 * len(groups) + 1.0))
    for place, (_, ours, theirs, peer) in enumerate(groups):
        axes.barh(place - 0.19, ours, 0.36, color=_OURS)
        axes.text(ours, place - 0.19, f" {ours:,.0f}" if ours >= 10 else f" {ours:.2f}", va="center")
        if theirs:
            color = _OTHER if "Express" in peer else _DIRECT
            axes.barh(place + 0.19, theirs, 0.36, color=color)
            said = f"{theirs:,.0f}" if ours >= 10 else f"{theirs:.2f}"
            axes.text(theirs, place + 0.19, f" {said}  {peer}", va="center", color="#495057")
    axes.set_yticks(range(len(groups)), [label for label, *_ in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(max(ours, theirs or 0) for _, ours, theirs, _ in groups))
    axes.set_title(title, loc="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(DOCS / "plots" / name, metadata={"Date": None})
    plt.close(figure)


# -- the table of docs/benchmarks.md -----------------------------------------------------------------------------

_REGION = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)


def fill_in(rows: Sequence[Row], machine: dict[str, Any]) -> None:
    page = DOCS / "benchmarks.md"
    text = _REGION.sub(lambda found: found[1] + _table(rows, machine) + found[2], page.read_text())
    page.write_text(text)


def _table(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    from benchmarks.__main__ import number

    said = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = [f"Machine: {said}.", "", "| question | case | what | ours | peer | theirs | ratio | target | |"]
    lines.append("|---|---|---|---:|---|---:|---:|---:|---|")
    for row in rows:
        met = {True: "met", False: "**missed**", None: ""}[row.met]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}×"
        lines.append(
            f"| {row.question} | {row.case} | {row.metric} {row.unit} | {number(row.ours)} | {row.peer}"
            f" | {number(row.theirs)} | {ratio} | {row.target} | {met} |"
        )
    notes = [f"- *{row.question}, {row.case}*: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, "", *notes]) + "\n"
