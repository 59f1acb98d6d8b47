"""What every benchmark gives back: rows with our figure, the peer's, their ratio and the target."""

import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

from msgspec import Struct

T = TypeVar("T")


class Plan(Struct, frozen=True):
    rounds: int = 5
    seconds: float = 3.0
    """Of one slice of load."""
    sustained_seconds: float = 60.0
    quick: bool = False
    """To see that everything runs: the figures mean nothing."""


class Row(Struct):
    question: str
    case: str
    metric: str
    unit: str
    ours: float
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    """None: there is no target, or the peer could not run."""
    samples_ours: list[float] = []
    samples_theirs: list[float] = []
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
) -> Row:
    """A row of medians. With a peer the bound is on the ratio ours / theirs, without one on our own figure."""
    mine = median(ours)
    other = median(theirs) if theirs else None
    ratio = mine / other if other else None
    judged = ratio if theirs is not None else mine
    sign, unit_of_target = ("×" if theirs is not None else f" {unit}"), None
    target, met = "", unit_of_target
    if at_least is not None:
        target = f"≥ {at_least:g}{sign}"
        met = None if judged is None else judged >= at_least
    elif at_most is not None:
        target = f"≤ {at_most:g}{sign}"
        met = None if judged is None else judged <= at_most
    return Row(question, case, metric, unit, mine, peer, other, ratio, target, met, ours, theirs or [], note)


def not_run(question: str, case: str, peer: str, reason: str, target: str = "") -> Row:
    return Row(question, case, "", "", float("nan"), peer, target=target, note=f"not run: {reason}")


def interleave(rounds: int, cases: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Each case once in a round, the order rotated: a machine that slows down slows all of them."""
    found: dict[str, list[T]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            found[name].append(cases[name]())
    return found
