"""Reads and writes `results.json`: the rows of the last run of each question, and the machine that measured them.

A run replaces the rows of the questions that it asked and keeps the others. It drops a row that it cannot read, with a
warning, and the rows of a question that no longer exists, so that rows of an earlier version cannot make it fail.
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
    """The contents of the file, whose rows are not yet checked."""

    rows: list[Raw] = []


def read_rows(path: Path, warn: Warn) -> list[ResultRow]:
    """Returns the rows of `path`, or none if it does not exist. `warn` gets a sentence for each row that is dropped."""
    if not path.exists():
        return []
    try:
        unchecked = msgspec.json.decode(path.read_bytes(), type=_UncheckedResults).rows
    except msgspec.DecodeError as error:
        warn(f"{path} is not a results file ({error}), so earlier rows are dropped")
        return []
    rows = []
    for index, raw in enumerate(unchecked):
        try:
            rows.append(msgspec.json.decode(raw, type=ResultRow))
        except msgspec.DecodeError as error:
            warn(f"{path}: row {index} cannot be read ({error}) and is dropped")
    return rows


def merged(earlier: Sequence[ResultRow], new: Sequence[ResultRow], questions: Sequence[str]) -> list[ResultRow]:
    """Returns `new` and the `earlier` rows of the other `questions`, in the order of `questions`."""
    position = {name: number for number, name in enumerate(questions)}
    answered = {row.question for row in new}
    kept = [row for row in earlier if row.question in position and row.question not in answered]
    return sorted([*kept, *new], key=lambda row: position[row.question])


def write_rows(path: Path, rows: Sequence[ResultRow], machine: dict[str, Any]) -> None:
    encoded = msgspec.json.encode(ResultsFile(machine, list(rows)))
    path.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
