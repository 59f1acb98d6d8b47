"""Reading the rows of an import: each row becomes an order or an error, and an invalid row does not stop the other
rows."""

import datetime as dt
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from services.sync.imports.sources import (
    ImportRow,
    SourceOptions,
    check_source,
    json_value,
    named_source,
    rows,
    source_of,
)
from shared.errors import InvalidInput, NotFound
from shared.restaurants import Restaurant
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT

ITEMS = [{"name": "Soup", "quantity": 1, "unit_price": 620}]


def body(name: str, **fields: Any) -> dict[str, Any]:
    return {"external_id": name, "items": ITEMS, **fields}


async def find(id_: str) -> Restaurant:
    if id_ not in (RESTAURANT, OTHER_RESTAURANT):
        raise NotFound("no such restaurant", field="restaurant_id")
    currency = "EUR" if id_ == RESTAURANT else "JPY"
    return Restaurant(id=id_, slug="shop", name="Shop", time_zone="Europe/Berlin", currency=currency)


async def read(
    path: Path, content: bytes | str, restaurant: str | None = RESTAURANT, **options: Any
) -> list[ImportRow]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)  # noqa: ASYNC240  (a small file)
    checked = check_source(source_of(str(path), None, SourceOptions(**options)), restaurant)
    found = [row async for row in rows(checked, find)]
    assert checked.rows == len(found), "the progress bar does not count the rows that are read"
    return found


async def refusal(path: Path, content: bytes | str, restaurant: str | None = RESTAURANT, **options: Any) -> str:
    """Returns the message of the refusal of the whole file."""
    with pytest.raises(InvalidInput) as refused:
        await read(path, content, restaurant, **options)
    assert refused.value.details["field"] == "source"
    return refused.value.message


def results(found: list[ImportRow]) -> list[tuple[int, str]]:
    """Returns the line of each row with the name of its order or its error."""
    return [(row.line, row.error if row.order is None else row.order.name) for row in found]


# -- JSON lines --------------------------------------------------------------------------------------------------


async def test_each_line_becomes_an_order_or_is_refused_with_its_line_and_reason(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps(body("a")).encode(),
        b"",
        b"{",
        json.dumps(body("b", notes="Grüße\n")).encode(),
        b'{"external_id": "c", "items": [}',
        b'{"external_id": "d", "notes": "\\ud800", "items": [{"name": "x", "quantity": 1, "unit_price": 1}]}',
        b"[1]",
        b"[" * 100_000,
        json.dumps(body("e", total=float("nan"))).encode(),
        json.dumps(body("f", total="12")).encode(),
        json.dumps(body("g", colour="red")).encode(),
        json.dumps(body("", convex_id=None)).encode(),
        json.dumps(body("h", notes="x" * 1_000_000)).encode(),
        json.dumps(body("i", total=10**30)).encode(),
        json.dumps(body("j")).encode(),
    ]
    found = await read(tmp_path / "orders.jsonl", b"\r\n".join(lines))
    assert [row.line for row in found] == [1, *range(3, 16)]
    named = dict(results(found))
    assert {line: named[line] for line in (1, 4, 15)} == {1: "a", 4: "b", 15: "j"}
    assert {line: reason.partition(":")[0] for line, reason in named.items() if line not in (1, 4, 15)} == {
        3: "body",
        5: "body",
        6: "notes",
        7: "body",
        8: "body",
        9: "body",
        10: "total",
        11: "colour",
        12: "external_id",
        13: "the row is larger than 1,000,000 bytes",
        14: "total",
    }


async def test_json_lines_are_read_packed_and_in_the_given_encoding(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(body(name, notes="Grüße"), ensure_ascii=False) for name in ("a", "b"))
    for name, content, encoding in (
        ("o.jsonl.gz", gzip.compress(text.encode()), None),
        ("o.ndjson", text.encode("utf-16"), None),
        ("o.JSONL.GZ", gzip.compress(text.encode("cp1252")), "cp1252"),
    ):
        found = await read(tmp_path / name, content, encoding=encoding)
        assert [row.order.notes for row in found if row.order] == ["Grüße", "Grüße"]
    assert "line 1, byte " in await refusal(tmp_path / "o.jsonl", text.encode("cp1252"))


async def test_the_restaurant_comes_from_the_row_or_else_from_the_command(tmp_path: Path) -> None:
    lines = [body("a"), body("b", restaurant_id=OTHER_RESTAURANT), body("c", restaurant_id=None)]
    text = "\n".join(map(json.dumps, lines))
    found = await read(tmp_path / "orders.jsonl", text)
    assert [str(row.order.restaurant_id) for row in found if row.order] == [RESTAURANT, OTHER_RESTAURANT, RESTAURANT]
    assert [row.error.partition(":")[0] for row in await read(tmp_path / "o.jsonl", text, None)] == [
        "restaurant_id",
        "",
        "restaurant_id",
    ]


# -- CSV ---------------------------------------------------------------------------------------------------------


async def test_each_row_of_a_csv_with_items_as_json_is_an_order(tmp_path: Path) -> None:
    """The file has a byte order mark, quoted line breaks, empty cells, and times in PostgreSQL's format."""
    items = json.dumps(ITEMS).replace('"', '""')
    payments = json.dumps([{"id": "p", "amount": 620, "method": "card"}]).replace('"', '""')
    found = await read(
        tmp_path / "orders.csv",
        "\ufeffexternal_id,items,notes,total,created_at,payments\r\n"
        f'a,"{items}","first\nsecond",700,2026-03-01 12:00:00+00,"{payments}"\r\n'
        "\r\n"
        f'b,"{items}",,,2026-03-01T12:00:00.5Z,\r\n'
        f'a,"{items}",again,,,\r\n',
    )
    assert results(found) == [(2, "a"), (5, "b"), (6, "a")]
    one = found[0].order
    assert one is not None
    assert (one.notes, one.total, one.payments[0].amount) == ("first\nsecond", 700, 620)
    assert one.created_at == dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
    assert found[1].order is not None
    assert (found[1].order.total, found[1].order.notes) == (None, None)


async def test_each_row_of_a_csv_without_an_items_column_is_an_item(tmp_path: Path) -> None:
    found = await read(
        tmp_path / "orders.csv",
        "external_id,item_name,item_quantity,item_unit_price,status\n"
        "a,Soup,1,620,completed\n"
        "a,Bread,2,450,\n"
        "b,Soup,3,620,pending\n",
    )
    assert results(found) == [(2, "a"), (4, "b")]
    assert [[(i.name, i.quantity, i.unit_price) for i in row.order.items] for row in found if row.order] == [
        [("Soup", 1, 620), ("Bread", 2, 450)],
        [("Soup", 3, 620)],
    ]
    assert found[0].order is not None
    assert found[0].order.status == "completed"


async def test_the_same_name_in_two_restaurants_is_two_orders(tmp_path: Path) -> None:
    found = await read(
        tmp_path / "orders.csv",
        "restaurant_id,external_id,item_name,item_quantity,item_unit_price\n"
        f"{RESTAURANT},a,Soup,1,620\n{OTHER_RESTAURANT},a,Soup,1,620\n",
    )
    assert [str(row.order.restaurant_id) for row in found if row.order] == [RESTAURANT, OTHER_RESTAURANT]


BAD_ITEMS = [
    ("a,Soup,1,620\na,Bread,two,450\nb,Soup,1,620\n", {2: "items[1].quantity: 'two'", 4: "b"}),
    ("a,Soup,1,6.20\nb,Soup,1,620\n", {2: "items[0].unit_price: '6.20'", 3: "b"}),
    ("a,Soup,1,620\na,Bread,1,450,extra\nb,Soup,1,620\n", {2: "line 3: more cells", 4: "b"}),
    (",Soup,1,620\n,Soup,1,620\n", {2: "external_id", 3: "external_id"}),
    ("a,,1,620\n", {2: "items[0].name"}),
    (
        'a,Soup,1,620\na,"Bread"x,1,450\na,Tea,1,260\nb,Soup,1,620\n',
        {2: "line 3 may belong to this order", 3: "not CSV", 5: "b"},
    ),
    (
        'a,Soup,1,620\nx,"Bread"x,1,450\nb,Soup,1,620\nc,Soup,1,620\n',
        {2: "line 3 may belong to this order", 3: "not CSV", 4: "line 3 may belong to this order", 5: "c"},
    ),
    (
        'a,Soup,1,620\nb,"Soup,1,620\nc,Soup,1,620\n',
        {2: "line 3 may belong to this order", 3: "not CSV: unexpected end"},
    ),
]


@pytest.mark.parametrize(("text", "expected"), BAD_ITEMS, ids=lambda value: value if isinstance(value, str) else "")
async def test_an_order_of_several_rows_is_imported_completely_or_not_at_all(
    tmp_path: Path, text: str, expected: dict[int, str]
) -> None:
    found = await read(tmp_path / "orders.csv", "external_id,item_name,item_quantity,item_unit_price\n" + text)
    named = dict(results(found))
    assert named.keys() == expected.keys()
    for line, begins in expected.items():
        assert named[line].startswith(begins), (line, named[line])


async def test_an_invalid_cell_is_named_and_later_rows_are_read(tmp_path: Path) -> None:
    items = '"[{""name"": ""x"", ""quantity"": 1, ""unit_price"": 1}]"'
    heading = "external_id,items,total,notes,created_at\n"
    lines = [
        f"a,{items},12.50,,",
        "b,{,,,",
        f"c,{items},,,yesterday",
        f"d,{items},,,2026-03-01T12:00:00",
        f"e,{items},,,29.02.2026 10:00",
        f"f,{items},,,,,x",
        f"g,{items},,,",
        f'h,{items},,"never closed,',
    ]
    named = dict(results(await read(tmp_path / "orders.csv", heading + "\n".join(lines))))
    assert (named.pop(5), named.pop(8)) == ("d", "g")
    assert {line: reason.partition(":")[0] for line, reason in named.items()} == {
        2: "total",
        3: "items",
        4: "created_at",
        6: "created_at",
        7: "more cells than the heading has columns",
        9: "not CSV",
    }


async def test_a_file_without_rows_yields_no_rows(tmp_path: Path) -> None:
    assert await read(tmp_path / "orders.csv", "external_id,items\n") == []
    assert await read(tmp_path / "orders.jsonl", "\n\n") == []


async def test_an_invalid_heading_is_reported(tmp_path: Path) -> None:
    assert "line 1: not CSV" in await refusal(tmp_path / "orders.csv", 'external_id,"items"x\na,1\n')
    assert "empty" in await refusal(tmp_path / "orders.csv", "\n\n")


# -- sources -----------------------------------------------------------------------------------------------------


def test_an_unsuitable_source_is_refused(tmp_path: Path) -> None:
    for name in ("orders.xml", str(tmp_path / "missing.jsonl"), str(tmp_path), "mysql://x/y"):
        with pytest.raises(InvalidInput) as refused:
            source_of(name, None)
        assert refused.value.details["field"] == "source"


def test_options_that_a_source_does_not_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "o.jsonl").write_text("")
    (tmp_path / "o.csv").write_text("")
    lines, csv = str(tmp_path / "o.jsonl"), str(tmp_path / "o.csv")
    for name, query, options, words in (
        (lines, None, SourceOptions(separator=";"), "only CSV files"),
        (lines, None, SourceOptions(decimal="comma"), "only CSV files"),
        (csv, "select 1", SourceOptions(), "only a postgres:// source"),
        ("postgres://host/db", None, SourceOptions(encoding="cp1252"), "a query needs no --encoding"),
        (str(tmp_path / "o.xlsx"), None, SourceOptions(), "save the sheet as CSV"),
    ):
        with pytest.raises(InvalidInput, match=words):
            source_of(name, query, options)


def digest(name: str, query: str | None = None, **options: Any) -> str:
    return check_source(source_of(name, query, SourceOptions(**options)), None).digest


def test_a_file_is_identified_by_content_and_a_database_by_url_without_password(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.ndjson"
    one.write_text("x")
    other.write_text("x")
    assert digest(str(one)) == digest(str(other))
    assert digest(str(one)) != digest(str(one), encoding="cp1252"), "other options may give other rows"
    other.write_text("y")
    assert digest(str(one)) != digest(str(other))
    first = source_of("postgresql://me:first-password@host/db", "select 1")
    assert digest(first.name, "select 1") == digest("postgresql://me:second@host/db", "select 1")
    assert digest(first.name, "select 1") != digest("postgresql://me:second@host/db", "select 2")
    assert first.shown == "postgres://host/db"
    hidden = source_of("postgres://host:5433/?user=me&password=first-password&dbname=till", "select 1")
    assert hidden.shown == "postgres://host:5433/?dbname=till"
    assert digest(hidden.name, "select 1") != digest("postgres://host:5433/?dbname=other", "select 1")


def test_whole_numbers_of_a_query_become_integers_whatever_their_type() -> None:
    assert [json_value(cell) for cell in (Decimal("980.00"), 980.0, 980, Decimal("1E+3"))] == [980, 980, 980, 1000]
    assert all(type(json_value(cell)) is int for cell in (Decimal("980.00"), 980.0))
    assert json_value(Decimal("9.80")) == 9.8
    assert json_value(Decimal("NaN")) == "NaN", (
        "NaN is not kept as text: JSON makes it null, and the field counts as missing"
    )
    assert json_value(float("inf")) == "inf"


@pytest.mark.parametrize(
    "url",
    [
        "postgres://me:secret@host/db",
        "postgresql://host/db?user=me&password=secret",
        "postgres://host/db?sslpassword=x",
    ],
)
def test_password_on_the_command_line_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput) as refused:
        named_source(url)
    assert "@FILE or env:NAME" in refused.value.message
    assert "secret" not in refused.value.message
    file = tmp_path / "url"
    file.write_text(f"{url}\n")
    monkeypatch.setenv("SHOP_URL", url)
    assert named_source(f"@{file}") == named_source("env:SHOP_URL") == url


def test_source_that_an_argument_names_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOP_URL", raising=False)
    for argument in (f"@{tmp_path}/none", f"@{tmp_path}", "env:SHOP_URL", "env:"):
        with pytest.raises(InvalidInput):
            named_source(argument)
    assert named_source("orders.jsonl") == "orders.jsonl"
    assert named_source("postgres://host/db?passfile=x") == "postgres://host/db?passfile=x"
