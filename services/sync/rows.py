"""Where an import reads from: a JSON-lines file, a CSV file, or a query on another PostgreSQL. A row at a time, in an
order that is the same the next time, so that an import goes on where it stopped.

CSV and query: a column for each field of `ExternalOrder`; `items` and `payments` hold JSON. A CSV without `items` has a
row for each item (`item_name`, `item_quantity`, `item_unit_price`), those of an order one after the other.
"""

import csv
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
from msgspec import Struct

from services.sync.external import ExternalOrder
from shared.errors import InvalidInput
from shared.http import read_body

_INTS = ("tip_amount", "discount_amount", "deposit_used", "tax_amount", "total")
_JSON = ("items", "payments")
_ITEM = {"item_name": "name", "item_quantity": "quantity", "item_unit_price": "unit_price"}
_QUERY = "select * from orders order by 1"


class Row(Struct, frozen=True):
    line: int
    """In the file, from 1; of a query the row."""
    order: ExternalOrder | None
    error: str = ""


class Source(Struct, frozen=True):
    name: str
    kind: str
    """jsonl, csv or postgres"""
    query: str = _QUERY

    @property
    def digest(self) -> str:
        """Which source it is: for a file its content. Of a database the query, without the password in the URL."""
        if self.kind == "postgres":
            host = self.name.rpartition("@")[2]
            return hashlib.sha256(f"{host}|{self.query}".encode()).hexdigest()
        with Path(self.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def shown(self) -> str:
        """Without a password."""
        if self.kind == "postgres":
            return "postgres://" + self.name.rpartition("@")[2]
        return self.name


def source_of(name: str, query: str | None) -> Source:
    """Raises InvalidInput."""
    if name.startswith(("postgres://", "postgresql://")):
        return Source(name, "postgres", query or _QUERY)
    suffix = Path(name).suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".csv"):
        raise InvalidInput("a .jsonl or .csv file, or a postgres:// URL", field="source")
    if not Path(name).is_file():
        raise InvalidInput(f"no such file: {name}", field="source")
    return Source(name, "csv" if suffix == ".csv" else "jsonl")


def count(source: Source) -> int | None:
    """How many rows there are, for a progress bar; None where it is not known beforehand."""
    if source.kind == "jsonl":
        with Path(source.name).open("rb") as file:
            return sum(1 for line in file if line.strip())
    return sum(1 for _ in _csv_groups(source.name)) if source.kind == "csv" else None


async def rows(source: Source, restaurant: str | None) -> AsyncIterator[Row]:
    """`restaurant`: for rows that name none."""
    if source.kind == "postgres":
        async for row in _from_postgres(source, restaurant):
            yield row
        return
    found = _from_jsonl(source.name, restaurant) if source.kind == "jsonl" else _from_csv(source.name, restaurant)
    for row in found:
        yield row


def _from_jsonl(name: str, restaurant: str | None) -> Iterator[Row]:
    with Path(name).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                yield Row(number, None, f"not JSON: {error}")
                continue
            yield _row(number, value, restaurant)


def _csv_groups(name: str) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """(line, rows of one order)"""
    csv.field_size_limit(min(sys.maxsize, 10_000_000))
    with Path(name).open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        group: list[dict[str, str]] = []
        began, key = 0, None
        each_alone = "items" in (reader.fieldnames or ())
        for row in reader:
            present = row.get("external_id") or row.get("convex_id")
            if group and (each_alone or present != key or not present):
                yield began, group
                group = []
            if not group:
                began, key = reader.line_num, present
            group.append(row)
        if group:
            yield began, group


def _from_csv(name: str, restaurant: str | None) -> Iterator[Row]:
    for line, group in _csv_groups(name):
        value: dict[str, Any] = {key: text for key, text in group[0].items() if text not in ("", None) and key}
        if None in group[0]:
            yield Row(line, None, "more cells than the heading has columns")
            continue
        try:
            for field in _JSON:
                if field in value:
                    value[field] = json.loads(value[field])
            for field in _INTS:
                if field in value:
                    value[field] = int(value[field])
            if "items" not in value:
                value["items"] = [_item(one) for one in group]
                for column in _ITEM:
                    value.pop(column, None)
        except ValueError as error:
            yield Row(line, None, f"{field}: {error}")
            continue
        yield _row(line, value, restaurant)


def _item(row: dict[str, str]) -> dict[str, Any]:
    """Raises ValueError."""
    found: dict[str, Any] = {field: row[column] for column, field in _ITEM.items() if row.get(column)}
    for field in ("quantity", "unit_price"):
        if field in found:
            found[field] = int(found[field])
    return found


async def _from_postgres(source: Source, restaurant: str | None) -> AsyncIterator[Row]:
    connection = await asyncpg.connect(source.name, timeout=10)
    try:
        async with connection.transaction(readonly=True):
            number = 0
            async for record in connection.cursor(source.query, prefetch=500):
                number += 1
                value = {key: cell for key, cell in record.items() if cell is not None}
                try:
                    for field in _JSON:
                        if isinstance(value.get(field), str):
                            value[field] = json.loads(value[field])
                except ValueError as error:
                    yield Row(number, None, f"{field}: {error}")
                    continue
                yield _row(number, value, restaurant)
    finally:
        await connection.close()


def _row(line: int, value: Any, restaurant: str | None) -> Row:
    if isinstance(value, dict) and restaurant is not None:
        value.setdefault("restaurant_id", restaurant)
    try:
        order = read_body(msgspec.json.encode(value), ExternalOrder)
        _ = order.name
    except InvalidInput as error:
        return Row(line, None, f"{error.details['field']}: {error.message}")
    except (TypeError, UnicodeEncodeError, RecursionError) as error:
        return Row(line, None, str(error))
    return Row(line, order)
