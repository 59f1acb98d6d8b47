"""Reads the rows of an import from a JSON-lines file, a CSV file, or a query on another PostgreSQL.

Guarantee: `check_source` reads a whole file before its first row is imported, and refuses one that cannot be read to
its end. Rows come one at a time and always in the same order, so that an import can continue where it stopped.

A CSV file and the result of a query have a column for each field of `ExternalOrder` (columns.py).
"""

import hashlib
import math
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct

from services.sync.imports import cells, csv_files, text_files
from services.sync.imports.columns import FORMS, ITEM_FIELDS, heading_fault
from services.sync.imports.csv_files import CsvFile, Record
from services.sync.imports.external_orders import ExternalOrder
from services.sync.imports.text_files import TextFile
from shared.errors import InvalidInput, NotFound, described
from shared.http.bodies import MAX_BODY_BYTES, read_body
from shared.postgres.pool import UNAVAILABLE
from shared.restaurants import Restaurant

_QUERY = "select * from orders order by 1"
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")

FindRestaurant = Callable[[str], Awaitable[Restaurant]]
"""Id -> restaurant. Raises NotFound."""


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


class SourceOptions(Struct, frozen=True):
    """Properties of a file that its content does not tell."""

    encoding: str | None = None
    """One of text_files.ENCODINGS; None means UTF-8, or UTF-16 if the file has a byte order mark of it."""
    separator: str | None = None
    """The character between the columns of a CSV file; None means that `survey` finds it."""
    decimal: cells.Decimal | None = None
    """None: the amounts of a CSV file are in minor units. Else they are in major units, with this decimal sign."""


class ImportSource(Struct, frozen=True):
    name: str
    kind: str
    """`jsonl`, `csv` or `postgres`."""
    query: str = _QUERY
    options: SourceOptions = SourceOptions()

    @property
    def shown(self) -> str:
        """The name to show to people, without a password."""
        return _without_password(self.name) if self.kind == "postgres" else self.name


class CheckedSource(Struct, frozen=True):
    """A source that can be read to its end."""

    source: ImportSource
    restaurant: str | None
    """The id for rows without restaurant_id."""
    digest: str
    """Identifies the rows: a hash and the restaurant. The hash covers the content and the options of a file, or the
    query and the URL without the password."""
    rows: int | None = None
    """The number of rows; None for a query."""
    file: TextFile | None = None
    csv: CsvFile | None = None


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    options = [(key, value) for key, value in parse_qsl(parts.query) if "pass" not in key and key != "user"]
    return urlunsplit(("postgres", parts.netloc.rpartition("@")[2], parts.path, urlencode(sorted(options)), ""))


def named_source(argument: str) -> str:
    """Returns the source that a command-line argument names: the argument itself, the content of a file (`@FILE`), or
    an environment variable (`env:NAME`). Raises InvalidInput, also for a URL with a password, because the list of
    processes would show it."""
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
            "the list of processes would show the password: put the URL into a file or an environment variable, and"
            " pass @FILE or env:NAME",
            field="source",
        )
    return argument


def _has_password(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.password) or any("pass" in key and key != "passfile" for key, _ in parse_qsl(parts.query))


def source_of(name: str, query: str | None, options: SourceOptions = SourceOptions()) -> ImportSource:  # noqa: B008
    """Returns the source with this file name or URL. Raises InvalidInput."""
    if name.startswith(_SCHEMES):
        if options != SourceOptions():
            raise InvalidInput("a query needs no --encoding, --separator or --decimal", field="source")
        return ImportSource(name, "postgres", query or _QUERY)
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if suffix in _SPREADSHEETS:
        raise InvalidInput(f"{suffix} files are not supported; save the sheet as CSV in UTF-8", field="source")
    if suffix not in _KINDS:
        raise InvalidInput("must be a .jsonl or .csv file, also with .gz, or a postgres:// URL", field="source")
    if query is not None:
        raise InvalidInput("only a postgres:// source has a query", field="query")
    if _KINDS[suffix] != "csv" and (options.separator, options.decimal) != (None, None):
        raise InvalidInput("only CSV files have --separator and --decimal", field="source")
    if not Path(name).is_file():
        raise InvalidInput(f"no such file: {name}", field="source")
    if not os.access(name, os.R_OK):
        raise InvalidInput(f"not readable: {name}", field="source")
    return ImportSource(name, _KINDS[suffix], options=options)


def check_source(source: ImportSource, restaurant: str | None) -> CheckedSource:
    """Reads a whole file, but no row of a query. Raises InvalidInput if the source cannot be read to its end, or if the
    heading of a CSV file is wrong."""
    if source.kind == "postgres":
        digest = hashlib.sha256(f"{_without_password(source.name)}|{source.query}".encode()).hexdigest()
        return CheckedSource(source, restaurant, f"{digest}:{restaurant or ''}")
    file = text_files.survey(source.name, source.options.encoding)
    found = (file.sha256, source.kind, file.codec, source.options.separator, source.options.decimal)
    digest = f"{hashlib.sha256(repr(found).encode()).hexdigest()}:{restaurant or ''}"
    if source.kind == "jsonl":
        return CheckedSource(source, restaurant, digest, sum(1 for line in file.lines() if line.strip()), file)
    csv = csv_files.survey(file, source.options.separator, restaurant)
    return CheckedSource(source, restaurant, digest, csv.orders, file, csv)


async def rows(checked: CheckedSource, find: FindRestaurant) -> AsyncGenerator[ImportRow, None]:
    """Yields the rows of the source. Raises InvalidInput if the source cannot be read, and the errors of `find` apart
    from NotFound."""
    if checked.csv is not None:
        reader = _CellReader(checked.restaurant, find, checked.source.options.decimal)
        for group in csv_files.groups(checked.csv):
            yield await _csv_row(group, checked.csv.items_in_rows, reader)
    elif checked.file is not None:
        for row in _from_jsonl(checked.file, checked.restaurant):
            yield row
    else:
        async for row in _from_postgres(checked.source, _CellReader(checked.restaurant, find, None)):
            yield row


def _from_jsonl(file: TextFile, restaurant: str | None) -> Iterator[ImportRow]:
    for number, line in enumerate(file.lines(), start=1):
        if line.strip():
            yield _row(number, line.encode(), restaurant)


# -- cells -----------------------------------------------------------------------------------------------------------


class _CellReader:
    """Reads the cells of a row. Amounts in major units and times without a zone need the restaurant of the row."""

    def __init__(self, default: str | None, find: FindRestaurant, decimal: cells.Decimal | None) -> None:
        self.default = default
        self._find = find
        self._decimal = decimal

    async def restaurant(self, told: Any) -> Restaurant | None:
        """Returns the restaurant of a row, or None if the row names none. Raises ValueError if it is unknown."""
        if not (id_ := str(told or self.default or "")):
            return None
        try:
            return await self._find(str(UUID(id_)))
        except NotFound as error:
            raise ValueError(f"restaurant_id: {error.message}") from error
        except ValueError:
            raise ValueError(f"restaurant_id: {cells.shown(id_)} is not an id") from None

    async def read(self, told: dict[str, str], items: Sequence[dict[str, str]]) -> dict[str, Any]:
        """Returns the fields of an order. `told`: the cells of the order. `items`: the cells of its items, or nothing
        if one cell of the order has all items. Raises ValueError with the name of the field."""
        restaurant = None
        if self._decimal is not None or any(FORMS[column] == "time" for column in told):
            restaurant = await self.restaurant(told.get("restaurant_id"))
        value = {column: self._value(column, column, cell, restaurant) for column, cell in told.items()}
        if items:
            value["items"] = [
                {
                    ITEM_FIELDS[column]: self._value(f"items[{place}].{ITEM_FIELDS[column]}", column, cell, restaurant)
                    for column, cell in item.items()
                }
                for place, item in enumerate(items)
            ]
        return value

    def _value(self, field: str, column: str, cell: str, restaurant: Restaurant | None) -> Any:
        match FORMS[column]:
            case "JSON":
                return _named(field, _json, cell)
            case "number":
                return _named(field, cells.whole_number, cell)
            case "time":
                return _named(field, cells.moment, cell, restaurant)
            case "amount" if self._decimal is None:
                return _named(field, cells.minor_units, cell)
            case "amount" if restaurant is not None:
                return _named(field, cells.major_units, cell, self._decimal, restaurant.currency)
        return cell


def _named(field: str, read: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `read`. Raises its ValueError with the name of the field."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


async def _csv_row(group: list[Record], items_in_rows: bool, reader: _CellReader) -> ImportRow:
    """Builds one row from the records of an order."""
    error = group[0].error
    if not error:
        items = [record.item for record in group] if items_in_rows else []
        try:
            row = _encoded_row(group[0].line, await reader.read(csv_files.cells_of(group), items), reader.default)
        except ValueError as fault:
            error = str(fault)
        else:
            if row.order is not None:
                return row
            error = row.error
    return ImportRow(group[0].line, None, csv_files.with_lines(error, group))


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text.encode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error


# -- a query -----------------------------------------------------------------------------------------------------


async def _from_postgres(source: ImportSource, reader: _CellReader) -> AsyncGenerator[ImportRow, None]:
    connection = await asyncpg.connect(source.name, timeout=10)
    try:
        async with connection.transaction(readonly=True):
            statement = await connection.prepare(source.query)
            heading = [attribute.name for attribute in statement.get_attributes()]
            if fault := heading_fault(heading, restaurant_told=reader.default is not None):
                raise InvalidInput(fault, field="query")
            if "items" not in heading:
                raise InvalidInput("the column items is missing; a query has one row for each order", field="query")
            number = 0
            async for record in statement.cursor(prefetch=500):
                number += 1
                yield await _query_row(number, {key: json_value(cell) for key, cell in record.items()}, reader)
    except UNAVAILABLE:
        raise
    except asyncpg.PostgresError as error:
        raise InvalidInput(f"the source refuses the query: {error}", field="query") from error
    finally:
        await connection.close(timeout=5)


async def _query_row(number: int, value: dict[str, Any], reader: _CellReader) -> ImportRow:
    value = {column: cell for column, cell in value.items() if cell is not None}
    try:
        for column, cell in value.items():
            if FORMS[column] == "JSON" and isinstance(cell, str):
                value[column] = _named(column, _json, cell)
            elif isinstance(cell, datetime) and cell.tzinfo is None:
                restaurant = await reader.restaurant(value.get("restaurant_id"))
                value[column] = _named(column, cells.moment, str(cell), restaurant)
    except ValueError as error:
        return ImportRow(number, None, str(error))
    return _encoded_row(number, value, reader.default)


def json_value(cell: Any) -> Any:
    """Converts a `numeric`, which is the type of a sum of integers in PostgreSQL, to int or float. NaN and infinity are
    returned as text, which the decoder refuses."""
    if not isinstance(cell, (Decimal, float)):
        return cell
    if not math.isfinite(cell):
        return str(cell)
    return int(cell) if cell == int(cell) else float(cell)


# -- a row -------------------------------------------------------------------------------------------------------


def _encoded_row(line: int, value: dict[str, Any], restaurant: str | None) -> ImportRow:
    try:
        encoded = msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return ImportRow(line, None, str(error))
    return _row(line, encoded, restaurant)


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
