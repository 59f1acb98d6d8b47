"""Reads the rows of an import from a JSON-lines file, a CSV file, or a query on another PostgreSQL.

Rows come one at a time and always in the same order, so that an import can continue where it stopped.

A CSV file and the result of a query have a column for each field of `ExternalOrder`; `items` and `payments` hold JSON.
A CSV file without the column `items` has one row per item (`item_name`, `item_quantity`, `item_unit_price`). The rows
of an order must then follow one another, because an order is imported whole or not at all.
"""

import csv
import hashlib
import json
import math
import os
import sys
from codecs import BOM_UTF8
from collections.abc import AsyncGenerator, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from services.sync.imports.external_orders import ExternalOrder
from shared.errors import InvalidInput, described
from shared.http.bodies import MAX_BODY_BYTES, read_body
from shared.postgres.pool import UNAVAILABLE

_INTS = ("tip_amount", "discount_amount", "deposit_used", "tax_amount", "total")
_JSON = ("items", "payments")
_TIMES = ("created_at", "updated_at")
_ITEM = {"item_name": "name", "item_quantity": "quantity", "item_unit_price": "unit_price"}
_QUERY = "select * from orders order by 1"


class ImportRow(Struct, frozen=True):
    line: int
    """The line of the file on which the row begins, or the number of the row in the query; from 1."""
    order: ExternalOrder | None
    error: str = ""

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(msgspec.json.encode(self)).digest()


_SCHEMES = ("postgres://", "postgresql://")


class _Order(ExternalOrder, kw_only=True):
    """An order in a row. It may lack the restaurant if the import names one for all rows."""

    restaurant_id: UUID | None = None  # type: ignore[assignment]


class ImportSource(Struct, frozen=True):
    name: str
    kind: str
    """`jsonl`, `csv` or `postgres`."""
    query: str = _QUERY

    @property
    def digest(self) -> str:
        """Identifies the source: the hash of the content of a file, or of URL and query without the password."""
        if self.kind == "postgres":
            return hashlib.sha256(f"{_without_password(self.name)}|{self.query}".encode()).hexdigest()
        with Path(self.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def shown(self) -> str:
        """The name to show to people, without a password."""
        return _without_password(self.name) if self.kind == "postgres" else self.name


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    options = [(key, value) for key, value in parse_qsl(parts.query) if "pass" not in key and key != "user"]
    return urlunsplit(("postgres", parts.netloc.rpartition("@")[2], parts.path, urlencode(sorted(options)), ""))


def named_source(argument: str) -> str:
    """Returns the source that an argument of a command names: itself, the content of a file (`@FILE`), or a variable of
    the environment (`env:NAME`). Raises InvalidInput, also for a URL with a password, which the list of processes
    would show."""
    if argument.startswith("@"):
        try:
            return Path(argument[1:]).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"not readable: {argument[1:]}: {described(error)}", field="source") from error
    if argument.startswith("env:"):
        if not (found := os.environ.get(argument[4:], "").strip()):
            raise InvalidInput(f"the environment has no variable {argument[4:]}", field="source")
        return found
    if argument.startswith(_SCHEMES) and _has_password(argument):
        raise InvalidInput(
            "the list of processes would show the password: put the URL into a file or a variable of the environment,"
            " and name it as @FILE or env:NAME",
            field="source",
        )
    return argument


def _has_password(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.password) or any("pass" in key and key != "passfile" for key, _ in parse_qsl(parts.query))


def source_of(name: str, query: str | None) -> ImportSource:
    """Returns the source with this file name or URL. Raises InvalidInput."""
    if name.startswith(_SCHEMES):
        return ImportSource(name, "postgres", query or _QUERY)
    suffix = Path(name).suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".csv"):
        raise InvalidInput("must be a .jsonl or .csv file, or a postgres:// URL", field="source")
    if not Path(name).is_file():
        raise InvalidInput(f"no such file: {name}", field="source")
    if not os.access(name, os.R_OK):
        raise InvalidInput(f"not readable: {name}", field="source")
    return ImportSource(name, "csv" if suffix == ".csv" else "jsonl")


def count(source: ImportSource) -> int | None:
    """Returns the number of rows, for a progress bar; None if it is not known in advance."""
    if source.kind == "jsonl":
        with Path(source.name).open("rb") as file:
            return sum(1 for line in file if line.strip())
    return sum(1 for _ in _csv_groups(source.name)) if source.kind == "csv" else None


def rows(source: ImportSource, restaurant: str | None) -> AsyncGenerator[ImportRow, None]:
    """Yields the rows of the source. `restaurant`: the id for rows without restaurant_id. Raises InvalidInput if the
    source cannot be read."""
    return (_from_postgres if source.kind == "postgres" else _from_file)(source, restaurant)


async def _from_file(source: ImportSource, restaurant: str | None) -> AsyncGenerator[ImportRow, None]:
    if source.kind == "jsonl":
        for row in _from_jsonl(source.name, restaurant):
            yield row
        return
    for group in _csv_groups(source.name):
        yield _csv_row(group, restaurant)


def _from_jsonl(name: str, restaurant: str | None) -> Iterator[ImportRow]:
    with Path(name).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(number, line.removeprefix(BOM_UTF8) if number == 1 else line, restaurant)


# -- CSV ---------------------------------------------------------------------------------------------------------


class _Cells(Struct):
    """One record of a CSV file: column -> cell, without empty cells."""

    line: int
    cells: dict[str, str]
    error: str = ""
    """The reason why the record cannot be read; empty for a readable record."""
    unknown: bool = False
    """True if it is unknown to which order the record belongs."""

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(self.cells.get(column, "") for column in ("restaurant_id", "external_id", "convex_id"))


def _csv_records(name: str) -> Iterator[_Cells]:
    """Yields the heading, then the records."""
    csv.field_size_limit(min(sys.maxsize, 10_000_000))
    heading: list[str] | None = None
    with Path(name).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Cells(line, {}, f"not CSV: {error}", unknown=True)
                continue
            if heading is None:
                heading = cells
                yield _Cells(line, dict.fromkeys(cells, ""))
            elif cells:
                found = {column: cell for column, cell in zip(heading, cells, strict=False) if column and cell}
                error_text = "more cells than the heading has columns" if len(cells) > len(heading) else ""
                yield _Cells(line, found, error_text)


def _csv_groups(name: str) -> Iterator[list[_Cells]]:
    """Yields a list with the records of each order."""
    records = _csv_records(name)
    heading = next(records, None)
    if heading is None:
        return
    if heading.error:
        raise InvalidInput(f"line {heading.line}: {heading.error}", field="source")
    if "items" in heading.cells:
        for record in records:
            yield [record]
        return
    group: list[_Cells] = []
    seen: set[int] = set()
    unreadable_line = 0  # the line of an unreadable record, which may belong to the previous or to the next order
    for record in records:
        if record.unknown:
            if group:
                group[0].error = group[0].error or f"line {record.line} may belong to this order and cannot be read"
                yield group
            yield [record]
            group, unreadable_line = [], record.line
            continue
        named = any(record.order[1:])
        if group and (record.order != group[0].order or not named):
            yield group
            group = []
        if unreadable_line:
            record.error = record.error or f"line {unreadable_line} may belong to this order and cannot be read"
        elif not group and named and hash(record.order) in seen:
            record.error = record.error or "the rows of this order do not follow one another"
        if not group:
            seen.add(hash(record.order))
        group.append(record)
        unreadable_line = 0
    if group:
        yield group


def _csv_row(group: list[_Cells], restaurant: str | None) -> ImportRow:
    """Builds one row from the records of an order. Only the item is read from the records after the first one."""
    line = group[0].line
    for record in group:
        if record.error:
            return ImportRow(line, None, record.error if record.line == line else f"line {record.line}: {record.error}")
    value: dict[str, Any] = dict(group[0].cells)
    try:
        for field in _JSON:
            if field in value:
                value[field] = _json(field, value[field])
        for field in _INTS:
            if field in value:
                value[field] = _integer(field, value[field])
        for field in _TIMES:
            if field in value:
                value[field] = _time(value[field])
        if "items" not in value:
            value["items"] = [_item(place, record.cells) for place, record in enumerate(group)]
            for column in _ITEM:
                value.pop(column, None)
    except ValueError as error:
        return ImportRow(line, None, str(error))
    return _encoded_row(line, value, restaurant)


def _item(place: int, cells: dict[str, str]) -> dict[str, Any]:
    """Returns the item of a record. Raises ValueError."""
    found: dict[str, Any] = {field: cells[column] for column, field in _ITEM.items() if column in cells}
    for field in ("quantity", "unit_price"):
        if field in found:
            found[field] = _integer(f"items[{place}].{field}", found[field])
    return found


def _json(field: str, text: str) -> Any:
    """Decodes a cell that holds JSON. Raises ValueError, which names the field."""
    try:
        return msgspec.json.decode(text.encode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}: not JSON: {error}") from error


def _integer(field: str, text: str) -> int:
    """Converts a cell to an integer. Raises ValueError, which names the field."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{field}: {text!r} is not a whole number of minor units") from None


def _time(text: str) -> datetime | str:
    """Parses the time formats of PostgreSQL and spreadsheets. Returns other texts unchanged: the decoder refuses them
    and names the field."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return text


# -- a query -----------------------------------------------------------------------------------------------------


async def _from_postgres(source: ImportSource, restaurant: str | None) -> AsyncGenerator[ImportRow, None]:
    connection = await asyncpg.connect(source.name, timeout=10)
    try:
        async with connection.transaction(readonly=True):
            number = 0
            async for record in connection.cursor(source.query, prefetch=500):
                number += 1
                value = {key: json_value(cell) for key, cell in record.items() if cell is not None}
                try:
                    for field in _JSON:
                        if isinstance(value.get(field), str):
                            value[field] = _json(field, value[field])
                except ValueError as error:
                    yield ImportRow(number, None, str(error))
                    continue
                yield _encoded_row(number, value, restaurant)
    except UNAVAILABLE:
        raise
    except asyncpg.PostgresError as error:
        raise InvalidInput(f"the source refuses the query: {error}", field="query") from error
    finally:
        await connection.close(timeout=5)


def json_value(cell: Any) -> Any:
    """Converts a `numeric`, which is the type of a sum of integers in PostgreSQL, to int or float. The decoder refuses
    NaN and infinity, which are returned as text."""
    if not isinstance(cell, (Decimal, float)):
        return cell
    if not math.isfinite(cell):
        return str(cell)
    return int(cell) if cell == int(cell) else float(cell)


# -- a row -------------------------------------------------------------------------------------------------------


def _encoded_row(line: int, value: dict[str, Any], restaurant: str | None) -> ImportRow:
    try:
        encoded = msgspec.json.encode(value)
    except UnicodeEncodeError:
        return ImportRow(line, None, f"{_unreadable(value)}: text that is not UTF-8")
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return ImportRow(line, None, str(error))
    return _row(line, encoded, restaurant)


def _unreadable(value: dict[str, Any]) -> str:
    """Returns the name of the field whose text is not UTF-8."""
    for field, content in value.items():
        try:
            field.encode()
            json.dumps(content, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            return field.encode(errors="replace").decode()
    return "body"


def _row(line: int, encoded: bytes, restaurant: str | None) -> ImportRow:
    if len(encoded) > MAX_BODY_BYTES:
        return ImportRow(line, None, f"the row is larger than {MAX_BODY_BYTES:,} bytes")
    try:
        order = read_body(encoded, _Order)
        if order.restaurant_id is None:
            if restaurant is None:
                raise InvalidInput(
                    "is missing; give it in the row, or --restaurant for all rows", field="restaurant_id"
                )
            order.restaurant_id = UUID(restaurant)
        _ = order.name
    except InvalidInput as error:
        return ImportRow(line, None, f"{error.details['field']}: {error.message}")
    except RecursionError as error:
        return ImportRow(line, None, str(error))
    return ImportRow(line, order)
