"""`ticketrail import` on a running system: from files and from another PostgreSQL, even when it is interrupted."""

import asyncio
import gzip
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from services.sync.command_session import CommandSession
from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.importer import Importer, ImportReport, RefusedRow
from services.sync.imports.sources import SourceOptions, check_source, source_of
from shared.errors import InvalidInput, NotFound
from tests.rigs.command_line import ticketrail
from tests.rigs.link import link_to
from tests.rigs.restaurant import RestaurantRig, register_restaurant
from tests.rigs.system import ROOT, System, eventually, settings_of

LAST_YEAR = datetime(2025, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system, tax_basis_points=0)


def names(count: int) -> list[str]:
    prefix = f"i{uuid4().hex[:8]}"
    return [f"{prefix}-{number:05d}" for number in range(count)]


def line_of(name: str, number: int = 0, **fields: Any) -> bytes:
    """Returns a JSON line with an order of last year that has a number."""
    found = {
        "external_id": name,
        "order_number": name[-5:],
        "status": "completed",
        "items": [{"name": "Soup", "quantity": 1, "unit_price": 620}],
        "created_at": (LAST_YEAR + timedelta(minutes=number)).isoformat(),
        **fields,
    }
    return json.dumps(found).encode()


def jsonl(path: Path, lines: Sequence[bytes]) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def scattered(path: Path, known: Sequence[str]) -> str:
    """Writes a packed CSV whose first row is refused; the two rows of each order are 250 orders apart."""
    rows = [f"{name},completed,2025-06-01 12:00,Soup,1,620" for name in known]
    more = [f"{name},,,Bread,1,450" for name in known]
    mixed = [
        row
        for n in range(len(known) + 250)
        for row in (*rows[n : n + 1], *(more[n - 250 : n - 249] if n >= 250 else ()))
    ]
    heading = "external_id,status,created_at,item_name,item_quantity,item_unit_price"
    path.write_bytes(gzip.compress("\n".join([heading, "refused,x,,,,", *mixed]).encode()))
    return str(path)


async def import_from(
    restaurant: RestaurantRig,
    name: str,
    *,
    query: str | None = None,
    again: bool = False,
    options: SourceOptions = SourceOptions(),  # noqa: B008  (frozen)
    **urls: str,
) -> tuple[ImportReport, list[RefusedRow]]:
    """Runs an import in this process; returns (report, refused rows)."""
    checked = check_source(source_of(name, query, options), restaurant.id)
    async with CommandSession(settings_of(restaurant.system, **urls)) as session:
        upserts = ExternalOrderUpserts(session.postgres, session.mirror, session.rail, source="import", window_days=3)
        return await Importer(session.postgres, upserts).run(checked, again=again, progress=lambda _: None)


def counts(report: ImportReport) -> dict[str, int]:
    return {name: getattr(report, name) for name in report.__struct_fields__ if getattr(report, name)}


async def stored(restaurant: RestaurantRig) -> list[dict[str, Any]]:
    async with restaurant.system.database() as connection:
        rows = await connection.fetch(
            "select external_id, order_number, status, version, total, created_at from orders where restaurant_id = $1"
            " order by external_id",
            restaurant.id,
        )
    return [dict(row) for row in rows]


async def all_there(restaurant: RestaurantRig, expected: Sequence[str], *, within: float = 30.0) -> None:
    """Waits until PostgreSQL has exactly these orders; asserts one background change for each and no conflict."""

    async def look() -> list[str]:
        return [row["external_id"] for row in await stored(restaurant)]

    await eventually(look, within=within, what="all orders", until=lambda found: found == sorted(expected))
    assert {row["version"] for row in await stored(restaurant)} == {1}
    async with restaurant.system.database() as connection:
        ways = await connection.fetch(
            "select lane, source, count(*) from changes where restaurant_id = $1 and entity = 'order' group by 1, 2",
            restaurant.id,
        )
        assert await connection.fetchval("select count(*) from conflicts where restaurant_id = $1", restaurant.id) == 0
    assert [tuple(row) for row in ways] == [("background", "import", len(expected))]


async def done(system: System, name: str) -> int:
    """Returns the number of rows of a source that are stored as done."""
    async with system.database() as connection:
        return int(await connection.fetchval("select coalesce(max(done), 0) from imports where source = $1", name))


# -- files ---------------------------------------------------------------------------------------------------------


async def test_file_is_imported_through_the_background_lane_and_each_refused_row_is_reported(
    restaurant: RestaurantRig, tmp_path: Path
) -> None:
    known = names(303)
    lines = [line_of(name, number) for number, name in enumerate(known)]
    lines[7:7] = [b"{", b'{"external_id": "\\ud800"}']
    lines[250:250] = [line_of("elsewhere", restaurant_id=str(uuid4())), line_of("nul", **{"a\x00\x1bb": 1})]
    source, refused_rows = jsonl(tmp_path / "orders.jsonl", lines), tmp_path / "refused.jsonl"
    arguments = ("import", source, "--restaurant", restaurant.id, "--refused", str(refused_rows))
    first = await ticketrail(restaurant.system, *arguments, "--json")
    refusals = first.printed.pop("refusals")
    assert {name: n for name, n in first.printed.items() if name != "refusals"} == {
        "dry_run": False, "read": 307, "skipped": 0, "created": 303, "updated": 0, "unchanged": 0, "refused": 4,
    }  # fmt: skip
    assert [(one["line"], one["reason"].partition(":")[0]) for one in refusals] == [
        (8, "body"),
        (9, "external_id"),
        (251, "restaurant_id"),
        (252, "a?\x1bb"),
    ]
    assert [json.loads(line) for line in refused_rows.read_bytes().splitlines()] == refusals
    assert first.code == 1, "the exit code does not show that rows were refused"
    assert "━" not in first.err, "a progress bar was printed without a terminal"
    await all_there(restaurant, known)

    again = await ticketrail(restaurant.system, *arguments)
    assert again.code == 1
    assert again.out.splitlines()[-1] == (
        "0 created, 0 updated, 0 unchanged, 4 refused, 307 imported by an earlier run"
    )
    assert again.out.startswith("line 8: body: ")
    assert "line 251: restaurant_id: no such restaurant" in again.out
    assert "line 252: a?\ufffdb: " in again.out, "a field of the file controls the terminal"
    assert "━" not in again.err
    report, why = await import_from(restaurant, source, again=True)
    assert counts(report) == {"read": 307, "unchanged": 303, "refused": 4}
    assert [one.line for one in why] == [8, 9, 251, 252]
    await all_there(restaurant, known)


async def test_open_order_without_a_number_gets_the_next_number_of_its_day(
    restaurant: RestaurantRig, tmp_path: Path
) -> None:
    known = names(3)
    lines = [line_of(name, order_number="", status="ready") for name in known]
    await import_from(restaurant, jsonl(tmp_path / "orders.jsonl", lines))
    await all_there(restaurant, known)
    assert sorted(row["order_number"] for row in await stored(restaurant)) == ["0001", "0002", "0003"]


async def test_changed_file_is_read_from_its_beginning(restaurant: RestaurantRig, tmp_path: Path) -> None:
    known = names(4)
    path = tmp_path / "orders.jsonl"
    assert counts((await import_from(restaurant, jsonl(path, [line_of(name) for name in known[:3]])))[0]) == {
        "read": 3,
        "created": 3,
    }
    changed = [line_of(known[3]), line_of(known[0], notes="changed"), *(line_of(name) for name in known[1:3])]
    report, _ = await import_from(restaurant, jsonl(path, changed))
    assert counts(report) == {"read": 4, "created": 1, "updated": 1, "unchanged": 2}


async def test_rows_of_one_order_apply_in_file_order(restaurant: RestaurantRig, tmp_path: Path) -> None:
    (known,) = names(1)
    expected = [f"note {number}" for number in range(20)]
    lines = [line_of(known, notes=note, created_at=None, status="ready") for note in expected]
    report, _ = await import_from(restaurant, jsonl(tmp_path / "orders.jsonl", lines))
    assert counts(report) == {"read": 20, "created": 1, "updated": 19}

    async def notes() -> list[str]:
        async with restaurant.system.database() as connection:
            rows = await connection.fetch(
                "select data->'after'->>'notes' from changes where restaurant_id = $1 order by version",
                restaurant.id,
            )
        return [row[0] for row in rows]

    await eventually(notes, what="the notes in file order", until=lambda found: found == expected)


async def test_both_csv_formats_make_the_same_orders(restaurant: RestaurantRig, tmp_path: Path) -> None:
    one, other = names(2)
    items = json.dumps([{"name": "Soup", "quantity": 2, "unit_price": 620}]).replace('"', '""')
    (tmp_path / "whole.csv").write_text(
        f'\ufeffexternal_id,status,created_at,notes,items\n{one},completed,2025-06-01 12:00:00+00,"a\nb","{items}"\n'
    )
    (tmp_path / "items.csv").write_text(
        "external_id,status,created_at,item_name,item_quantity,item_unit_price\n"
        f"{other},completed,2025-06-01T12:00:00Z,Soup,1,620\n{other},,,Bread,1,620\n"
    )
    for name in ("whole.csv", "items.csv"):
        assert counts((await import_from(restaurant, str(tmp_path / name)))[0]) == {"read": 1, "created": 1}
    await all_there(restaurant, [one, other])
    assert [(row["total"], row["created_at"]) for row in await stored(restaurant)] == [(1240, LAST_YEAR)] * 2


async def test_unknown_restaurant_ends_the_import_at_once(
    system: System, tmp_path: Path, restaurant: RestaurantRig
) -> None:
    source = jsonl(tmp_path / "orders.jsonl", [line_of("x")])
    ended = await ticketrail(system, "import", source, "--restaurant", str(uuid4()))
    assert (ended.code, "no such restaurant" in ended.err) == (1, True)
    assert "Traceback" not in ended.err
    for name, words in (("postgres://u:p@host/db", "the list of processes"), ("env:NO_SHOP", "has no variable")):
        ended = await ticketrail(system, "import", name, "--restaurant", restaurant.id)
        assert (ended.code, words in ended.err, "Traceback" in ended.err) == (1, True, False), ended.err
    unregistered = RestaurantRig(system, str(uuid4()), "", "", "", "")
    with pytest.raises(NotFound):
        await import_from(unregistered, source)
    # The refused runs stored no rows as done, so a known restaurant imports the whole file.
    assert counts((await import_from(restaurant, source))[0]) == {"read": 1, "created": 1}


# -- another database ----------------------------------------------------------------------------------------------

QUERY = (
    "select external_id, created_at, table_id, total, tax_amount, tip_amount, status, items, payments"
    " from till order by created_at, external_id"
)


async def test_orders_are_imported_from_another_postgresql(restaurant: RestaurantRig, tmp_path: Path) -> None:
    """The import reads numerics, times, uuids and JSON; a later run finds new rows and leaves the others unchanged."""
    database = f"till{uuid4().hex[:8]}"
    url = await asyncio.to_thread(restaurant.system.servers.postgres.make_database, database)
    known = names(5)
    try:
        till = await asyncpg.connect(url)
        await till.execute(
            "create table till (external_id text, created_at timestamptz, table_id uuid, total numeric(12, 2),"
            " tax_amount bigint, tip_amount numeric, status text, items jsonb, payments json)"
        )
        items = json.dumps([{"name": "Soup", "quantity": 1, "unit_price": 620}])
        payments = json.dumps([{"id": "p", "amount": 700, "method": "card"}])

        async def add(name: str, minute: int, total: str = "700.00") -> None:
            await till.execute(
                f"insert into till values ($1, $2, gen_random_uuid(), {total}, 30, 50, 'completed', $3, $4)",
                *(name, LAST_YEAR + timedelta(minutes=minute), items, payments),
            )

        await add(known[0], 0)
        await add("broken", 1, "7.55")
        await add(known[1], 2)
        report, why = await import_from(restaurant, url, query=QUERY)
        assert counts(report) == {"read": 3, "created": 2, "refused": 1}
        assert [(one.line, one.reason) for one in why] == [(2, "total: Expected `int | null`, got `float`")]
        await all_there(restaurant, known[:2])
        assert [(row["total"], row["created_at"]) for row in await stored(restaurant)] == [
            (700, LAST_YEAR),
            (700, LAST_YEAR + timedelta(minutes=2)),
        ]
        await add(known[2], 3)
        assert counts((await import_from(restaurant, url, query=QUERY))[0]) == {
            "read": 4, "skipped": 3, "created": 1, "refused": 1,
        }  # fmt: skip
        await add(known[3], -1)  # it sorts first, so a run that skips the first four rows would miss it
        assert counts((await import_from(restaurant, url, query=QUERY))[0]) == {
            "read": 5, "created": 1, "unchanged": 3, "refused": 1,
        }  # fmt: skip
        await till.execute("delete from till where external_id = any($1)", known[:2])
        await add(known[4], 4)
        assert counts((await import_from(restaurant, url, query=QUERY))[0]) == {
            "read": 4, "created": 1, "unchanged": 2, "refused": 1,
        }  # fmt: skip
        await all_there(restaurant, known)
        for query, sentence in (
            ("select external_id as name, items from till", "unknown column 'name'; the nearest known one is "),
            ("select external_id, external_id, items from till", "the column external_id occurs 2 times"),
            ("select external_id, 'Tea' as item_name from till", "is missing"),
        ):
            with pytest.raises(InvalidInput, match=sentence):
                await import_from(restaurant, url, query=query)
        file = tmp_path / "url"
        file.write_text(url)
        wrong = await ticketrail(restaurant.system, "import", f"@{file}", "--query", "select * from nowhere")
        assert (wrong.code, 'relation "nowhere" does not exist' in wrong.err) == (1, True)
        # A timestamp without a zone is in the zone of the restaurant.
        async with restaurant.system.database() as connection:
            await connection.execute("update restaurants set time_zone = 'Asia/Tokyo' where id = $1", restaurant.id)
        local = "select external_id, created_at at time zone 'Asia/Tokyo' as created_at, items from till"
        assert (await import_from(restaurant, url, query=local))[0].created == 1

        async def times() -> list[datetime]:
            return [row["created_at"] for row in await stored(restaurant) if row["external_id"] == "broken"]

        expected = [LAST_YEAR + timedelta(minutes=1)]
        await eventually(times, what="the order", until=lambda found: found == expected)
        password = url.partition("//")[2].partition("@")[0].partition(":")[2]
        async with restaurant.system.database() as connection:
            noted = await connection.fetchval("select string_agg(source, ' ') from imports")
        assert f":{password}@" not in noted
        await till.close()
    finally:
        await asyncio.to_thread(restaurant.system.servers.postgres.drop_database, database)


# -- interruptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["lines", "packed-rows-of-items"])
async def test_killed_import_continues_where_it_stopped(
    restaurant: RestaurantRig, tmp_path: Path, packed: bool
) -> None:
    known = names(700)
    if packed:
        source = scattered(tmp_path / "orders.csv.gz", known)
        lines = [b"", *(b"" for _ in known)]
    else:
        lines = [b"{", *(line_of(name, number) for number, name in enumerate(known))]
        source = jsonl(tmp_path / "orders.jsonl", lines)
    command = [sys.executable, "-m", "services.sync.cli", "import", source, "--restaurant", restaurant.id]
    # The import reaches the broker through a proxy in this process. So it cannot finish while this process stalls.
    async with link_to(restaurant.system.rabbitmq_url) as broker:
        env = {**restaurant.system.env, "TICKETRAIL_RABBITMQ_URL": broker.url}
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await eventually(lambda: done(restaurant.system, source), what="some imported rows")
        process.kill()
        await process.wait()
    so_far = await done(restaurant.system, source)
    assert 0 < so_far < len(lines), "the import was not killed in the middle"

    ended = await ticketrail(restaurant.system, *command[3:], "--json")
    printed = ended.printed
    assert printed["skipped"] == so_far
    assert printed["created"] + printed["unchanged"] == len(lines) - so_far
    refused = [one["line"] for one in printed["refusals"]]
    assert refused == [2 if packed else 1], "the rows that the killed run refused are not reported"
    assert ended.code == 1
    await all_there(restaurant, known)
    if packed:
        async with restaurant.system.database() as connection:
            items = await connection.fetch(
                "select string_agg(name, ' ' order by position) from order_items where restaurant_id = $1"
                " group by order_id",
                restaurant.id,
            )
        assert {row[0] for row in items} == {"Soup Bread"}


@pytest.mark.parametrize("unavailable", ["rabbitmq", "redis", "postgresql"])
async def test_import_waits_while_a_backend_is_unavailable_and_continues_after_it(
    restaurant: RestaurantRig, tmp_path: Path, unavailable: str
) -> None:
    known = names(320)
    source = jsonl(tmp_path / "orders.jsonl", [line_of(name, order_number="") for name in known])
    async with AsyncExitStack() as stack:
        links = {
            "rabbitmq": ("rabbitmq_url", await stack.enter_async_context(link_to(restaurant.system.rabbitmq_url))),
            "redis": ("redis_url", await stack.enter_async_context(link_to(restaurant.system.redis.url))),
            "postgresql": (
                "database_writer_url",
                await stack.enter_async_context(link_to(restaurant.system.database_url("ticketrail_writer"))),
            ),
        }
        urls: dict[str, Any] = {name: link.url for name, link in links.values()}
        running = asyncio.create_task(import_from(restaurant, source, **urls))
        await eventually(lambda: done(restaurant.system, source), what="some imported rows")
        link = links[unavailable][1]
        await link.cut()
        before = await _stable_value(lambda: done(restaurant.system, source))
        assert not running.done(), "the import ended instead of waiting"
        await link.restore()
        report, why = await running
    assert 0 < before < len(known)
    assert (report.refused, why) == (0, [])
    assert report.created + report.unchanged == len(known)
    await all_there(restaurant, known)


async def _stable_value(look: Callable[[], Any], seconds: float = 1.0) -> int:
    """Returns the value once it has not changed for `seconds`."""
    seen, since = -1, asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() - since < seconds:
        now = await look()
        if now != seen:
            seen, since = now, asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)
    return seen


async def test_import_shows_a_progress_bar_on_a_terminal(restaurant: RestaurantRig, tmp_path: Path) -> None:
    known = names(150)
    source = jsonl(tmp_path / "orders.jsonl", [line_of(name) for name in known])
    ours, theirs = pty.openpty()
    arguments = ["import", source, "--restaurant", restaurant.id]

    def drain() -> bytes:
        shown = b""
        try:
            while piece := os.read(ours, 65_536):
                shown += piece
        except OSError:  # the other end is closed
            pass
        return shown

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.sync.cli", *arguments),
        cwd=ROOT,
        env={**restaurant.system.env, "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown, (out, _) = await asyncio.gather(asyncio.to_thread(drain), process.communicate())
    os.close(ours)
    assert process.returncode == 0
    assert out.decode().startswith("150 created, 0 updated, 0 unchanged, 0 refused, 0 imported by an earlier run")
    assert "150/150" in shown.decode()
    assert "━" in shown.decode()
