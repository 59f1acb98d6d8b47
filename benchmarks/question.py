"""The parts that every benchmark shares: its plan, its result rows, and the order in which cases take turns."""

import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

from msgspec import Struct

T = TypeVar("T")


class BenchmarkPlan(Struct, frozen=True):
    rounds: int = 5
    seconds: float = 3.0
    """Length of one slice of load."""
    sustained_seconds: float = 60.0
    quick: bool = False
    """True for a short run, which only shows that everything works. Its figures mean nothing."""


class ResultRow(Struct):
    question: str
    case: str
    metric: str
    unit: str
    ours: float | None = None
    """Our figure; None if the case did not run."""
    peer: str = ""
    theirs: float | None = None
    """The peer's figure; None if there is no peer, or if the peer did not run."""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    """True if the target was met; None if there is no target, or if the peer did not run."""
    samples_ours: list[float | None] = []
    samples_theirs: list[float | None] = []
    note: str = ""


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def compared(
    question: str,
    case: str,
    metric: str,
    unit: str,
    ours: list[float],
    peer: str = "",
    theirs: list[float] | None = None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    note: str = "",
) -> ResultRow:
    """Returns a row of medians. The bound applies to the ratio ours / theirs, or to our figure if there is no peer."""
    our_median = median(ours)
    peer_median = median(theirs) if theirs else None
    ratio = our_median / peer_median if peer_median else None
    bounded_figure = ratio if theirs is not None else our_median
    sign = "×" if theirs is not None else f" {unit}"
    target, met = "", None
    if at_least is not None:
        target = f"≥ {at_least:g}{sign}"
        met = None if bounded_figure is None else bounded_figure >= at_least
    elif at_most is not None:
        target = f"≤ {at_most:g}{sign}"
        met = None if bounded_figure is None else bounded_figure <= at_most
    return ResultRow(
        question, case, metric, unit, our_median, peer, peer_median, ratio, target, met, [*ours], [*(theirs or [])],
        note,
    )  # fmt: skip


def not_run(question: str, case: str, peer: str, reason: str, target: str = "") -> ResultRow:
    """Returns the row of a case that did not run, with `reason` as its note."""
    return ResultRow(question, case, "", "", peer=peer, target=target, note=f"not run: {reason}")


def interleave(rounds: int, cases: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Runs each case once per round and rotates their order, so that a slow phase of the machine hits all of them.

    Returns the results of each case by its name.
    """
    found: dict[str, list[T]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            found[name].append(cases[name]())
    return found
