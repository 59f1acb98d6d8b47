"""Draws the plots of the README from the rows of the last run."""

from collections.abc import Sequence

import matplotlib as mpl

from benchmarks.question import ResultRow
from benchmarks.report import DOCS

mpl.use("svg")
mpl.rcParams.update(
    {"svg.hashsalt": "ticketrail", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
)

import matplotlib.pyplot as plt  # noqa: E402  (matplotlib must know the backend before this import)

_OURS, _DIRECT, _OTHER = "#d9480f", "#868e96", "#ced4da"
_ACCEPT_BARS = (
    ("burst", "accept", "burst", "dual write"),
    ("burst", "accept", "burst", "Litestar + PostgreSQL"),
    ("burst", "accept", "burst", "Express + pg"),
    ("one hot restaurant", "accept", "one hot restaurant", None),
    ("sustained, everything\nrunning", "accept", "sustained", "dual write"),
    ("sustained, everything\nrunning", "accept", "sustained", "Litestar + PostgreSQL"),
    ("PostgreSQL frozen", "unavailable", "PostgreSQL frozen", None),
)


def draw(rows: Sequence[ResultRow]) -> None:
    """Writes docs/plots/*.svg. A row without both figures has no bar; a plot without bars is not written."""
    (DOCS / "plots").mkdir(exist_ok=True)
    bars = []
    for label, question, case, peer in _ACCEPT_BARS:
        row = _throughput(rows, question, case, peer)
        if row is not None and row.ours is not None:
            bars.append((label, row.ours, row.theirs, row.peer))
    _draw_bars("accept.svg", "Orders accepted per second, 64 connections, one server process", bars)
    _draw_bars(
        "push_drain.svg",
        "Throughput against peers (ours = 1)",
        [
            (f"{row.question}\n{row.case}", 1.0, row.theirs / row.ours, row.peer)
            for row in rows
            if row.question in ("drain", "push", "read") and row.theirs and row.ours and row.unit.endswith("/s")
        ],
    )


def _throughput(rows: Sequence[ResultRow], question: str, case: str, peer: str | None) -> ResultRow | None:
    """Returns the throughput row of a case, or None if a figure of it is missing. `peer` None accepts any peer."""
    for row in rows:
        if (row.question, row.case, row.metric) == (question, case, "throughput") and peer in (None, row.peer):
            return row if row.ours and row.theirs else None
    return None


def _draw_bars(name: str, title: str, groups: Sequence[tuple[str, float, float | None, str]]) -> None:
    """Draws a bar of ours and of the peer for each group: label, our figure, the peer's figure, the peer's name."""
    if not groups:
        return
    figure, axes = plt.subplots(figsize=(8.5, 0.75 * len(groups) + 1.0))
    for place, (_, ours, theirs, peer) in enumerate(groups):
        axes.barh(place - 0.19, ours, 0.36, color=_OURS)
        axes.text(ours, place - 0.19, f" {ours:,.0f}" if ours >= 10 else f" {ours:.2f}", va="center")
        if theirs:
            color = _OTHER if "Express" in peer else _DIRECT
            axes.barh(place + 0.19, theirs, 0.36, color=color)
            figure_text = f"{theirs:,.0f}" if ours >= 10 else f"{theirs:.2f}"
            axes.text(theirs, place + 0.19, f" {figure_text}  {peer}", va="center", color="#495057")
    axes.set_yticks(range(len(groups)), [label for label, *_ in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(max(ours, theirs or 0) for _, ours, theirs, _ in groups))
    axes.set_title(title, loc="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(DOCS / "plots" / name, metadata={"Date": None})
    plt.close(figure)
