"""Reads the orders of a CSV file: one order in each row, or one item in each row.

Guarantee: an order of several rows is imported as a whole, or refused as a whole with its lines, wherever its rows are
in the file. So the file is read twice. `survey` finds the separator, checks the heading once, and counts the rows of
each order; then `groups` yields each order when its last row has been read. The rows of an order repeat the cells of
the order or leave them empty; if two rows differ, the order is refused. If a run of its rows repeats an earlier run,
the order is refused too, because a file that contains the same rows twice would double it.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from uuid import UUID

from msgspec import Struct

from services.sync.imports.columns import ITEM_FIELDS, NAMES, heading_fault
from services.sync.imports.text_files import MAX_LINE_CHARS, TextFile, changed
from shared.errors import InvalidInput
from shared.http.texts import nfc

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t"}
_MAX_SCATTERED_ROWS = 100_000
"""The limit for scattered rows: rows of orders whose rows are not adjacent. They are kept in memory until the last row
of their order."""
_MAX_ITEMS = 1_000
_MAX_HEADING_CHARS = 10_000
_MAX_LISTED = 10
_SPREADSHEET_SEPARATOR = re.compile(r'"?sep=(.)"?\s*')
_NAMES = {sign: name for name, sign in SEPARATORS.items()}


class Record(Struct):
    """One record of a CSV file: column -> cell, without empty cells."""

    line: int
    number: int
    """The number of the record in the file, from 0."""
    cells: dict[str, str]
    error: str = ""

    @property
    def item(self) -> dict[str, str]:
        return {column: cell for column, cell in self.cells.items() if column in ITEM_FIELDS}


class CsvFile(Struct, frozen=True):
    file: TextFile
    restaurant: str | None
    """The id for rows without restaurant_id."""
    separator: str
    heading_line: int
    heading: tuple[str, ...]
    orders: int
    """The number of groups."""
    rows_of: dict[int, int]
    """hash of an order -> number of its rows; empty if each row is an order."""
    spoiled: dict[int, int]
    """hash of an order, or of its name alone -> line of a record that may belong to the order and is refused"""

    @property
    def items_in_rows(self) -> bool:
        return "items" not in self.heading


def survey(
    file: TextFile,
    separator: str | None,
    restaurant: str | None,
    *,
    max_scattered_rows: int = _MAX_SCATTERED_ROWS,
) -> CsvFile:
    """Reads the whole file. Raises InvalidInput if the separator is not found, if the heading is wrong, or if too many
    rows are scattered."""
    line, first, told = _first_line(file, separator)
    found = told or _found_separator(line, first)
    heading = tuple(name.strip() for name in _heading(line, first, found))
    if fault := heading_fault(heading, restaurant_told=restaurant is not None):
        shown = _NAMES.get(found, repr(found))
        raise _refused(f"line {line}: {fault} (columns are separated by {shown}; --separator names another)")
    empty = CsvFile(file, restaurant, found, line, heading, 0, {}, {})
    if not empty.items_in_rows:
        return CsvFile(file, restaurant, found, line, heading, sum(1 for _ in _records(empty)), {}, {})
    rows_of: dict[int, int] = {}
    spoiled: dict[int, int] = {}
    scattered: dict[int, int] = {}
    orders, last, unclear_line = 0, 0, 0
    for record in _records(empty):
        order = _order(record, restaurant)
        if order is None:
            orders += 1
            unclear_line = record.line
            if last:
                spoiled.setdefault(last, record.line)
            last = 0
            continue
        key = hash(order) or 1
        if not order[0]:
            spoiled.setdefault(hash(order[1]), record.line)
        if unclear_line:
            spoiled.setdefault(key, unclear_line)
            unclear_line = 0
        if key not in rows_of:
            orders += 1
        elif key != last:
            scattered.setdefault(key, record.line)
        rows_of[key] = rows_of.get(key, 0) + 1
        last = key
    if sum(rows_of[key] for key in scattered) > max_scattered_rows:
        raise _refused(
            f"more than {max_scattered_rows:,} rows are not next to the other rows of their order, the first one in"
            f" line {min(scattered.values())}; sort the file by external_id"
        )
    return CsvFile(file, restaurant, found, line, heading, orders, rows_of, spoiled)


def groups(file: CsvFile) -> Iterator[list[Record]]:
    """Yields the records of each order as soon as its last record is read. If an order cannot be imported, its first
    record has the error."""
    if not file.items_in_rows:
        for record in _records(file):
            yield [record]
        return
    held: dict[int, list[Record]] = {}
    left: dict[int, int] = {}
    for record in _records(file):
        order = _order(record, file.restaurant)
        if order is None:
            yield [record]
            continue
        key = hash(order) or 1
        if key not in file.rows_of:
            raise changed()
        group = held.setdefault(key, [])
        if len(group) <= _MAX_ITEMS:  # an order with more items is refused, so they need not be held
            group.append(record)
        left[key] = left.get(key, file.rows_of[key]) - 1
        if left[key] == 0:
            del held[key], left[key]
            _check(group, file.spoiled.get(key) or (order[0] and file.spoiled.get(hash(order[1]))) or 0)
            yield group
    if held:
        raise changed()


def _order(record: Record, restaurant: str | None) -> tuple[str, str] | None:
    """Returns (restaurant, name) of the order, in the form that later comparisons use, or None if the record names no
    order. Without this form, the rows of one order could count as two orders, and the second would replace the
    first."""
    name = (record.cells.get("external_id") or record.cells.get("convex_id") or "").strip()
    if not name:
        return None
    told = record.cells.get("restaurant_id") or restaurant or ""
    try:
        return str(UUID(told)), nfc(name)
    except ValueError:
        return told, nfc(name)


def cells_of(group: Sequence[Record]) -> dict[str, str]:
    """Returns the cells of the order in a group without an error, apart from those of its items."""
    return {column: cell for record in group for column, cell in record.cells.items() if column not in ITEM_FIELDS}


def with_lines(error: str, group: Sequence[Record]) -> str:
    """Returns the error of an order with the lines of its rows."""
    if len(group) == 1:
        return error
    lines = ", ".join(str(record.line) for record in group[:_MAX_LISTED])
    more = f" and {len(group) - _MAX_LISTED} more" if len(group) > _MAX_LISTED else ""
    return f"{error}; the rows of the order are in lines {lines}{more}"


def _check(group: list[Record], spoiled_line: int) -> None:
    """Stores the error of the order in its first record."""
    first = group[0]
    error = next((f"line {one.line}: {one.error}" if one is not first else one.error for one in group if one.error), "")
    if spoiled_line:
        error = error or f"line {spoiled_line} may belong to this order and is refused"
    if len(group) > _MAX_ITEMS:
        error = f"the order has more than {_MAX_ITEMS:,} rows"
    first.error = error or _difference(group) or _repetition(group)


def _difference(group: Sequence[Record]) -> str:
    """Returns an error if two rows differ in a cell of the order, else an empty text."""
    known: dict[str, tuple[str, int]] = {}
    for record in group:
        for column, cell in record.cells.items():
            if column not in ITEM_FIELDS and known.setdefault(column, (cell, record.line))[0] != cell:
                return f"{column}: lines {known[column][1]} and {record.line} differ, and an order has one value"
    return ""


def _repetition(group: Sequence[Record]) -> str:
    """Returns an error if a run of adjacent rows repeats an earlier run, else an empty text."""
    runs: list[list[Record]] = []
    for record in group:
        if runs and record.number == runs[-1][-1].number + 1:
            runs[-1].append(record)
        else:
            runs.append([record])
    known: dict[str, int] = {}
    for run in runs:
        line = known.setdefault(repr([record.cells for record in run]), run[0].line)
        if line != run[0].line:
            return (
                f"the rows from line {run[0].line} on repeat those from line {line} on, as if the file had the"
                " same rows twice; if the items were ordered twice, put the rows next to one another"
            )
    return ""


# -- the heading -----------------------------------------------------------------------------------------------------


def _first_line(file: TextFile, separator: str | None) -> tuple[int, str, str | None]:
    """Returns (number, text) of the line with the heading, and the separator if the option or a line such as `sep=;` of
    a spreadsheet names it. Raises InvalidInput."""
    for number, line in enumerate(file.lines(), start=1):
        if told := _SPREADSHEET_SEPARATOR.fullmatch(line):
            separator = separator or told[1]
        elif len(line) > _MAX_HEADING_CHARS:
            raise _refused(f"line {number}: the heading has more than {_MAX_HEADING_CHARS:,} characters")
        elif line.strip():
            return number, line, separator
    raise _refused("the file is empty: it has no names of columns")


def _found_separator(number: int, line: str) -> str:
    """Returns the separator that gives the most known columns. Raises InvalidInput if another character gives more, and
    names it."""

    def known(sign: str) -> int:
        return sum(1 for name in _split(line, sign) if name.strip() in NAMES)

    best = max(SEPARATORS.values(), key=lambda sign: (known(sign), line.count(sign)))
    others = [sign for sign in dict.fromkeys(line) if not sign.isalnum() and sign not in '_"\r\n' and sign != best]
    other = max(others, key=known, default="")
    if other and known(other) > max(known(best), 1):
        raise _refused(f"line {number}: the columns are separated by {other!r}; add --separator {other!r}")
    return best


def _split(line: str, sign: str) -> list[str]:
    return [name.strip('" ') for name in line.rstrip("\r\n").split(sign)]


def _heading(number: int, line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True, delimiter=separator))
    except (csv.Error, ValueError, TypeError) as error:
        raise _refused(f"line {number}: not CSV: {error}") from error


# -- records ---------------------------------------------------------------------------------------------------------


def _records(file: CsvFile) -> Iterator[Record]:
    """Yields the records after the heading, without empty ones."""
    csv.field_size_limit(MAX_LINE_CHARS)
    lines = file.file.lines()
    for _ in range(file.heading_line):
        next(lines)
    reader = csv.reader(lines, strict=True, delimiter=file.separator)
    number = 0
    while True:
        line = file.heading_line + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(line, number, {}, f"not CSV: {error}")
        else:
            if not any(cells):
                continue
            found = {column: cell for column, cell in zip(file.heading, cells, strict=False) if column and cell}
            yield Record(line, number, found, _surplus(file.heading, cells))
        number += 1


def _surplus(heading: Sequence[str], cells: Sequence[str]) -> str:
    if any(cells[len(heading) :]):
        return "more cells than the heading has columns"
    for place, (name, cell) in enumerate(zip(heading, cells, strict=False), start=1):
        if cell and not name:
            return f"column {place} has a cell and no name in the heading"
    return ""


def _refused(why: str) -> InvalidInput:
    return InvalidInput(why, field="source")
