"""`ticketrail import` with files of spreadsheets and tills on a running system, and its dry run."""

import asyncio
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_import import LAST_YEAR, line_of, names, stored
from tests.rigs.command_line import Ended, in_terminal, ticketrail
from tests.rigs.link import link_to
from tests.rigs.restaurant import RestaurantRig, register_restaurant
from tests.rigs.system import ROOT, System, eventually


@pytest.fixture
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system, tax_basis_points=0)


async def imported(restaurant: RestaurantRig, path: Path, *options: str) -> Ended:
    return await ticketrail(restaurant.system, "import", str(path), "--restaurant", restaurant.id, *options)


async def orders_of(restaurant: RestaurantRig, expected: list[str]) -> dict[str, dict[str, Any]]:
    async def look() -> list[str]:
        return [row["external_id"] for row in await stored(restaurant)]

    await eventually(look, what="the orders", until=lambda found: found == sorted(expected))
    return {row["external_id"]: row for row in await stored(restaurant)}


async def noted(restaurant: RestaurantRig) -> int:
    """Returns the number of imports that are stored for the restaurant."""
    async with restaurant.system.database() as connection:
        return int(await connection.fetchval("select count(*) from imports where restaurant_id = $1", restaurant.id))


async def test_a_spreadsheet_with_scattered_rows_becomes_whole_orders(
    restaurant: RestaurantRig, tmp_path: Path
) -> None:
    async with restaurant.system.database() as connection:
        await connection.execute("update restaurants set time_zone = 'Europe/Berlin' where id = $1", restaurant.id)
    one, other, gap = names(3)
    path = tmp_path / "orders.csv.gz"
    rows = (
        "external_id;status;created_at;customer_name;item_name;item_quantity;item_unit_price\r\n"
        f"{one};completed;01.06.2025 14:00;Frau Müller;Crème brûlée;2;6,20\r\n"
        f"{other};completed;01.06.2025 14:00;;Tee;1;2,6\r\n"
        f"{gap};completed;30.03.2025 02:30;;Tee;1;2,60\r\n"
        f"{one};;;;Käsekuchen;1;4\r\n"
    )
    path.write_bytes(gzip.compress(rows.encode("cp1252")))
    refused = await imported(restaurant, path, "--decimal", "comma")
    assert (refused.code, "line 2, byte " in refused.err, "Traceback" in refused.err) == (1, True, False)
    assert "is 0xFC: not UTF-8; if a spreadsheet on Windows has written the file, add --encoding cp1252" in refused.err
    assert (await noted(restaurant), await stored(restaurant)) == (0, [])

    ended = await imported(restaurant, path, "--decimal", "comma", "--encoding", "CP1252")
    assert ended.out.splitlines() == [
        "line 4: created_at: 2025-03-30 02:30:00 does not exist in Europe/Berlin, because the clocks skipped it",
        "2 created, 0 updated, 0 unchanged, 1 refused, 0 imported by an earlier run",
    ]
    found = await orders_of(restaurant, [one, other])
    assert {row["external_id"]: row["total"] for row in found.values()} == {one: 1640, other: 260}
    assert {row["created_at"] for row in found.values()} == {LAST_YEAR}
    again = await imported(restaurant, path, "--decimal", "comma", "--encoding", "cp1252")
    assert again.out.splitlines()[-1].endswith(
        "0 created, 0 updated, 0 unchanged, 1 refused, 3 imported by an earlier run"
    )


@pytest.mark.parametrize(
    ("content", "options", "why"),
    [
        (b"external_id,itmes\na,x\n", (), "line 1: unknown column 'itmes'; the nearest known one is items"),
        (b"external_id|items|notes\na|x|y\n", (), "add --separator '|'"),
        (gzip.compress(b"external_id,items\n" * 9, mtime=0)[:-9], (), "the gzip file is cut off"),
        (b"external_id,items\n", ("--separator", "xy"), "must be comma, semicolon, tab, or one character"),
    ],
)
async def test_a_file_that_cannot_be_read_to_its_end_imports_nothing(
    restaurant: RestaurantRig, tmp_path: Path, content: bytes, options: tuple[str, ...], why: str
) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(content)
    ended = await imported(restaurant, path, *options)
    assert ended.code in (1, 2)
    assert why in ended.err
    assert "Traceback" not in ended.err
    assert await noted(restaurant) == 0


async def test_dry_run_reports_the_later_outcome_of_the_import_and_changes_nothing(
    restaurant: RestaurantRig, tmp_path: Path
) -> None:
    known = names(130)
    first = tmp_path / "first.jsonl"
    first.write_bytes(b"\n".join(line_of(name, n) for n, name in enumerate(known[:20])))
    assert (await imported(restaurant, first)).code == 0
    before = await orders_of(restaurant, known[:20])

    path = tmp_path / "orders.jsonl"
    lines = [line_of(name, n) for n, name in enumerate(known)]
    lines[3] = line_of(known[3], 3, notes="changed")
    # The rows of an order build on one another, also across blocks of 100.
    lines += [
        line_of(known[125], 125),
        line_of(known[50], 50, notes="changed"),
        line_of(known[50], 50, notes="changed"),
    ]
    lines += [line_of(known[0], total="1_0"), b"{", line_of(known[1], total="7"), line_of("", 0)]
    path.write_bytes(b"\n".join(lines))
    forecast = await imported(restaurant, path, "--dry-run", "--json")
    expected = {"read": 137, "skipped": 0, "created": 110, "updated": 2, "unchanged": 21, "refused": 4}
    assert {name: forecast.printed[name] for name in expected} == expected
    assert (forecast.printed["dry_run"], forecast.code) == (True, 1)
    assert await orders_of(restaurant, known[:20]) == before
    assert await noted(restaurant) == 1

    table = [line.split() for line in (await imported(restaurant, path, "--dry-run")).out.splitlines()]
    assert table[1:5] == [["new", "110"], ["changed", "2"], ["same", "21"], ["refused", "4"]]
    assert [row[:5] for row in table[5:]] == [
        ["because", "2", "134,", "136", "total:"],
        ["because", "1", "135", "body:", "not"],
        ["because", "1", "137", "external_id:", "must"],
    ]

    real = await imported(restaurant, path, "--json")
    assert {name: real.printed[name] for name in expected} == expected, "the import did something else"
    assert real.printed["refusals"] == forecast.printed["refusals"]
    await orders_of(restaurant, known)
    after = await imported(restaurant, path, "--dry-run", "--json")
    assert (after.printed["created"], after.printed["refused"]) == (0, 4)


async def test_dry_run_fits_a_terminal(restaurant: RestaurantRig, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    items = json.dumps([{"name": "Soup", "quantity": 1, "unit_price": 620}]).replace('"', '""')
    path.write_text(f'external_id,items\na,"{items}"\n')
    shown = await in_terminal(
        restaurant.system, "import", str(path), "--restaurant", restaurant.id, "--dry-run", columns=80
    )
    assert "new          1" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


async def test_dry_run_needs_no_broker(restaurant: RestaurantRig, tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_bytes(line_of("a"))
    async with link_to(restaurant.system.rabbitmq_url) as broker:
        await broker.cut()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.sync.cli", "import", str(path), "--restaurant", restaurant.id),
            *("--dry-run", "--json"),
            cwd=ROOT,
            env={**restaurant.system.env, "TICKETRAIL_RABBITMQ_URL": broker.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 30.0)
    assert process.returncode == 0, err.decode()
    assert json.loads(out)["created"] == 1
