"""CSV files of spreadsheets and tills: separators are found, headings are checked once, and an order is never imported
in part."""

import asyncio
import gzip
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sync.imports import csv_files, text_files
from services.sync.imports.columns import COLUMNS, ITEM_FIELDS, NAMES, table
from services.sync.imports.external_orders import ExternalOrder
from shared.errors import InvalidInput
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT
from tests.rigs.system import ROOT
from tests.unit.test_import_sources import read, refusal, results

HEADING = "external_id,item_name,item_quantity,item_unit_price"
ROWS = "a,Soup,1,620\na,Bread,2,450\nb,Soup,3,620\n"


async def orders(path: Path, content: bytes | str, **options: Any) -> dict[str, list[tuple[str, int, int]]]:
    """Returns the items of each order; asserts that no row is refused."""
    found = await read(path, content, **options)
    assert [row.error for row in found if row.order is None] == []
    return {
        row.order.name: [(item.name, item.quantity, item.unit_price) for item in row.order.items]
        for row in found
        if row.order is not None
    }


WHOLE = {"a": [("Soup", 1, 620), ("Bread", 2, 450)], "b": [("Soup", 3, 620)]}


# -- separators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
async def test_the_separator_of_a_spreadsheet_is_found(tmp_path: Path, sign: str, end: str) -> None:
    content = f"{HEADING}\n{ROWS}".replace(",", sign).replace("\n", end)
    assert await orders(tmp_path / "o.csv", content) == WHOLE
    assert await orders(tmp_path / "o.csv", f"sep={sign}{end}{end}{content}") == WHOLE
    quoted = f'"external_id"{sign}"item_name"' + content[len("external_id,item_name") :]
    assert await orders(tmp_path / "o.csv.gz", gzip.compress(quoted.encode("utf-16"))) == WHOLE


async def test_an_unusual_separator_is_named_and_can_be_given(tmp_path: Path) -> None:
    content = f"{HEADING}\n{ROWS}".replace(",", "|")
    assert await refusal(tmp_path / "o.csv", content) == (
        "line 1: the columns are separated by '|'; add --separator '|'"
    )
    assert await orders(tmp_path / "o.csv", content, separator="|") == WHOLE
    told = await refusal(tmp_path / "o.csv", f"{HEADING}\n{ROWS}", separator=";")
    assert "(columns are separated by semicolon; --separator names another)" in told


# -- headings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "begins"),
    [
        ("extrenal_id,items", "line 1: unknown column 'extrenal_id'; the nearest known one is external_id ("),
        ("external_id,items,Tip Amount", "line 1: unknown column 'Tip Amount'; the nearest known one is tip_amount ("),
        ("external_id,items,qqq", "line 1: unknown column 'qqq'; the nearest known one is "),
        ("external_id,items,notes,items", "line 1: the column items occurs 2 times, in columns 2 and 4 ("),
        ("items,notes", "line 1: the column external_id (or convex_id) is missing ("),
        ("external_id,item_name,item_quantity", "line 1: the column item_unit_price is missing ("),
        (
            "external_id,notes",
            "line 1: the column items, or item_name, item_quantity and item_unit_price, is missing (",
        ),
        ("external_id,items,item_name", "line 1: the columns items and item_name exclude each other ("),
        ("external_id", "line 1: the column items, or"),
    ],
)
async def test_a_wrong_heading_is_refused_in_one_sentence_before_any_row(
    tmp_path: Path, heading: str, begins: str
) -> None:
    for content in (f"{heading}\n", f"{heading}\nx,y\n", f"\n{heading}\n"):
        line = "line 2" if content.startswith("\n") else "line 1"
        assert (await refusal(tmp_path / "o.csv", content)).startswith(begins.replace("line 1", line))


async def test_a_file_without_a_heading_is_refused_in_a_short_sentence(tmp_path: Path) -> None:
    for content in ('{"external_id": "\x1b[31m' + "a" * 9_000 + '"}\n', "x" * 10_001 + "\n"):
        told = await refusal(tmp_path / "o.csv", content)
        assert told.startswith("line 1: ")
        assert len(told) < 250
        assert "\x1b" not in told
    assert "more than 10,000 characters" in await refusal(tmp_path / "o.csv", "x" * 10_001 + "\n")


async def test_without_a_restaurant_the_heading_needs_one(tmp_path: Path) -> None:
    told = await refusal(tmp_path / "o.csv", f"{HEADING}\n{ROWS}", None)
    assert told.startswith("line 1: the column restaurant_id is missing; name it in the file, or give --restaurant")
    found = await read(tmp_path / "o.csv", f"restaurant_id,{HEADING}\n{OTHER_RESTAURANT},a,Tea,1,5\n,b,Tea,1,5\n", None)
    assert [row.error.partition(":")[0] for row in found] == ["", "restaurant_id"]


async def test_empty_columns_and_empty_rows_of_a_spreadsheet_are_not_read(tmp_path: Path) -> None:
    content = f" {HEADING.replace(',', ' , ')},,\na,Soup,1,620,,\n,,,,,\na,Bread,2,450,,\n\nb,Soup,3,620,,\n,,,,,\n"
    assert await orders(tmp_path / "o.csv", content) == WHOLE
    found = await read(tmp_path / "o.csv", f"{HEADING},,\na,Soup,1,620,,lost\n")
    assert results(found) == [(2, "column 6 has a cell and no name in the heading")]


# -- amounts and times -----------------------------------------------------------------------------------------------


async def test_amounts_of_all_columns_are_in_major_units_with_the_given_decimal_sign(tmp_path: Path) -> None:
    heading = f"restaurant_id;{HEADING.replace(',', ';')};tip_amount;total"
    found = await read(
        tmp_path / "o.csv",
        f"{heading}\n;a;Soup;2;6,20;0,5;12,90\n{OTHER_RESTAURANT};b;Sushi;1;1250;;\n;c;Soup;1_0;6,20;;\n;d;Soup;1;6.20;;\n",
        decimal="comma",
    )
    read_orders = [row.order for row in found if row.order]
    assert [(one.items[0].unit_price, one.tip_amount, one.total) for one in read_orders] == [
        (620, 50, 1290),
        (1250, 0, None),
    ]
    assert results(found)[2:] == [
        (4, "items[0].quantity: '1_0' is not a whole number"),
        (5, "items[0].unit_price: '6.20' is not an amount such as 12,50; thousands have no separator"),
    ]


async def test_an_underscore_in_a_number_refuses_the_order(tmp_path: Path) -> None:
    found = await read(tmp_path / "o.csv", f"{HEADING},total\na,Soup,1,1_250,\nb,Soup,1,620,1_250\nc,Soup,١,620,\n")
    assert [error.partition(" is not a whole number")[0] for _, error in results(found)] == [
        "items[0].unit_price: '1_250'",
        "total: '1_250'",
        "items[0].quantity: '١'",
    ]


async def test_times_without_a_zone_are_in_the_zone_of_the_restaurant_of_the_row(tmp_path: Path) -> None:
    found = await read(
        tmp_path / "o.csv",
        f"restaurant_id,{HEADING},created_at\n,a,Soup,1,620,2026-07-01 12:00\n,b,Soup,1,620,2026-03-29 02:30\n"
        "33333333-3333-4333-8333-333333333333,c,Soup,1,620,2026-07-01 12:00\nx,d,Soup,1,620,2026-07-01 12:00\n",
    )
    assert found[0].order is not None
    assert str(found[0].order.created_at) == "2026-07-01 10:00:00+00:00"
    assert [error for _, error in results(found)[1:]] == [
        "created_at: 2026-03-29 02:30:00 does not exist in Europe/Berlin, because the clocks skipped it",
        "restaurant_id: no such restaurant",
        "restaurant_id: 'x' is not an id",
    ]


# -- rows of one order -----------------------------------------------------------------------------------------------


async def test_scattered_rows_of_one_order_make_one_whole_order(tmp_path: Path) -> None:
    content = (
        f"{HEADING},status\nO1,Soup,1,620,ready\nO2,Tea,1,260,\nO1,Cake,1,450,\nO3,Tea,2,260,\nO1,Tea,1,260,ready\n"
    )
    found = await read(tmp_path / "o.csv", content)
    assert results(found) == [(3, "O2"), (5, "O3"), (2, "O1")]
    assert found[2].order is not None
    assert [item.name for item in found[2].order.items] == ["Soup", "Cake", "Tea"]
    assert found[2].order.status == "ready"


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 9_999)), min_size=1, unique_by=lambda row: row[1]))
def test_an_order_is_whole_in_any_sequence_of_rows(rows: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "o.csv"
        content = "".join(f"{name},Dish,1,{price}\n" for name, price in rows)
        found = asyncio.run(orders(path, f"{HEADING}\n{content}"))
    assert {name: [price for _, _, price in items] for name, items in found.items()} == {
        name: [price for other, price in rows if other == name] for name, _ in rows
    }


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (
            "a,Soup,1,620,ready\nb,Tea,1,260,\na,Cake,one,450,\n",
            "items[1].quantity: 'one' is not a whole number; the rows of the order are in lines 2, 4",
        ),
        (
            "a,Soup,1,620,ready\nb,Tea,1,260,\na,Cake,1,450,completed\n",
            "status: lines 2 and 4 differ, and an order has one value; the rows of the order are in lines 2, 4",
        ),
        (
            'a,Soup,1,620,\nb,Tea,1,260,\n"x"y,Cake,1,450,\na,Cake,1,450,\n',
            "line 4 may belong to this order and is refused; the rows of the order are in lines 2, 5",
        ),
        (
            "a,Soup,1,620,\na,Tea,1,260,\nb,Tea,1,260,\na,Soup,1,620,\na,Tea,1,260,\n",
            "the rows from line 5 on repeat those from line 2 on, as if the file had the same rows twice;"
            " if the items were ordered twice, put the rows next to one another; the rows of the order are in lines"
            " 2, 3, 5, 6",
        ),
    ],
)
async def test_an_order_with_scattered_rows_is_refused_as_a_whole_with_its_lines(
    tmp_path: Path, rows: str, error: str
) -> None:
    found = await read(tmp_path / "o.csv", f"{HEADING},status\n{rows}")
    assert [row.error for row in found if row.line == 2] == [error]
    assert [row.order.name for row in found if row.order] in (["b"], [])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"{RESTAURANT},a,", ",a,"),
        (f"{RESTAURANT},a,", f"{RESTAURANT.replace('-', '')},a,"),
        (",a,", ",,a"),
        (",a,", ",a ,"),
        (",\u00e9,", ",e\u0301,"),
    ],
)
async def test_one_order_whose_id_is_written_in_two_ways_is_not_two_orders(
    tmp_path: Path, first: str, second: str
) -> None:
    """As two orders, the second one would replace the first, and the items of the first would be lost."""
    heading = "restaurant_id,external_id,convex_id,item_name,item_quantity,item_unit_price"
    content = f"{heading}\n{first},Soup,1,620\n,other,,Tea,1,260\n{second},Cake,1,450\n"
    found = [row for row in await read(tmp_path / "o.csv", content) if row.line != 3]
    assert [(row.line, len(row.order.items) if row.order else 0) for row in found] in ([(2, 2)], [(2, 0)])
    if found[0].order is None:
        assert "lines 2 and 4 differ" in found[0].error


async def test_a_row_without_a_restaurant_refuses_all_orders_with_its_id(tmp_path: Path) -> None:
    content = f"restaurant_id,{HEADING}\n{RESTAURANT},a,Soup,1,620\n{RESTAURANT},b,Tea,1,260\n,a,Cake,1,450\n"
    assert [
        (line, error.partition(" and")[0]) for line, error in results(await read(tmp_path / "o.csv", content, None))
    ] == [
        (2, "line 4 may belong to this order"),
        (3, "b"),
        (4, "restaurant_id: is missing; give it in the row, or --restaurant for all rows"),
    ]


async def test_an_order_with_its_id_only_in_the_first_row_is_not_imported_in_part(tmp_path: Path) -> None:
    found = await read(tmp_path / "o.csv", f"{HEADING}\na,Soup,1,620\n,Bread,1,450\nb,Tea,1,260\nc,Tea,1,260\n")
    assert [(line, error.partition(" and")[0]) for line, error in results(found)] == [
        (2, "line 3 may belong to this order"),
        (3, "external_id: external_id or convex_id is required"),
        (4, "line 3 may belong to this order"),
        (5, "c"),
    ]


async def test_equal_adjacent_rows_are_two_items(tmp_path: Path) -> None:
    found = await orders(tmp_path / "o.csv", f"{HEADING}\na,Beer,1,400\na,Beer,1,400\n\na,Beer,1,400\n")
    assert found == {"a": [("Beer", 1, 400)] * 3}


def test_too_many_scattered_rows_are_refused_before_any_row(tmp_path: Path) -> None:
    """Scattered rows are kept in memory until the last row of their order."""
    path = tmp_path / "o.csv"
    path.write_text(f"{HEADING}\na,Soup,1,620\nb,Tea,1,260\na,Cake,1,450\nb,Cake,1,450\nc,Tea,1,260\nc,Tea,1,260\n")
    file = text_files.survey(str(path), None)
    with pytest.raises(InvalidInput, match="the first one in line 4; sort the file by external_id"):
        csv_files.survey(file, None, RESTAURANT, max_scattered_rows=3)
    # Adjacent rows do not count.
    assert csv_files.survey(file, None, RESTAURANT, max_scattered_rows=4).orders == 3


async def test_an_order_with_more_than_a_thousand_rows_is_refused_without_keeping_them(tmp_path: Path) -> None:
    found = await read(tmp_path / "o.csv", f"{HEADING}\n" + "a,Tea,1,260\n" * 1_500 + "b,Tea,1,260\n")
    assert [(line, error[:34]) for line, error in results(found)] == [
        (2, "the order has more than 1,000 rows"),
        (1502, "b"),
    ]


# -- documents -------------------------------------------------------------------------------------------------------


def test_the_columns_are_the_fields_of_an_external_order() -> None:
    assert set(NAMES) - set(ITEM_FIELDS) == set(ExternalOrder.__struct_fields__)
    assert len(NAMES) == len(set(NAMES))
    assert all(column.meaning for column in COLUMNS)


def test_the_document_lists_the_columns_of_the_code() -> None:
    assert table() in (ROOT / "docs/import.md").read_text(), f"put this table into docs/import.md:\n{table()}"
