"""`results.json`: the rows of the last run of each question, and the machine that measured them.

A run replaces the rows of the questions that it asked and keeps the others. Rows of an earlier version must not stop
this: a row that cannot be read is dropped with a warning, and so are the rows of a question that no longer exists.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw, Struct

from benchmarks.question import ResultRow

RESULTS = Path(__file__).parent / "results.json"

Warn = Callable[[str], object]


class ResultsFile(Struct):
    machine: dict[str, Any]
    rows: list[ResultRow]


class _UncheckedResults(Struct):
    """The file before its rows are checked one by one."""

    rows: list[Raw] = []


def read_rows(path: Path, warn: Warn) -> list[ResultRow]:
    """The rows of `path`; none if the file does not exist. `warn` gets one sentence for everything that is dropped."""
    if not path.exists():
        return []
    try:
        unchecked = msgspec.json.decode(path.read_bytes(), type=_UncheckedResults).rows
    except msgspec.DecodeError as error:
        warn(f"{path} is not a results file ({error}): earlier rows are dropped")
        return []
    rows = []
    for place, raw in enumerate(unchecked):
        try:
            rows.append(msgspec.json.decode(raw, type=ResultRow))
        except msgspec.DecodeError as error:
            warn(f"{path}: row {place} cannot be read ({error}) and is dropped")
    return rows


def merged(earlier: Sequence[ResultRow], new: Sequence[ResultRow], questions: Sequence[str]) -> list[ResultRow]:
    """`new`, and the `earlier` rows of those `questions` that `new` does not answer, in the order of `questions`."""
    place = {name: number for number, name in enumerate(questions)}
    answered = {row.question for row in new}
    kept = [row for row in earlier if row.question in place and row.question not in answered]
    return sorted([*kept, *new], key=lambda row: place[row.question])


def write_rows(path: Path, rows: Sequence[ResultRow], machine: dict[str, Any]) -> None:
    encoded = msgspec.json.encode(ResultsFile(machine, list(rows)))
    path.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
