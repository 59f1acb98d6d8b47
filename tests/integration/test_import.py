"""`ticketrail import` on a running system: from files and from another PostgreSQL, interrupted anywhere."""

import asyncio
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
from services.sync.imports.sources import source_of
from shared.errors import NotFound
from tests.rigs.command_line import ticketrail
from tests.rigs.link import link_to
from tests.rigs.restaurant import Shop, open_shop
from tests.rigs.system import ROOT, System, eventually, settings_of

LAST_YEAR = datetime(2025, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
async def shop(system: System) -> Shop:
    return await open_shop(system, tax_basis_points=0)


def names(count: int) -> list[str]:
    prefix = f"i{uuid4().hex[:8]}"
    return [f"{prefix}-{number:05d}" for number in range(count)]


def line_of(name: str, number: int = 0, **fields: Any) -> bytes:
    """An order of last year, with a number of its own."""
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


async def bring(
    shop: Shop, name: str, *, query: str | None = None, again: bool = False, **urls: str
) -> tuple[ImportReport, list[RefusedRow]]:
    """In this process."""
    async with CommandSession(settings_of(shop.system, **urls)) as session:
        upserts = ExternalOrderUpserts(session.postgres, session.mirror, session.rail, source="import", window_days=3)
        return await Importer(session.postgres, upserts).run(
            source_of(name, query), shop.restaurant, again=again, progress=lambda _: None
        )


def counts(report: ImportReport) -> dict[str, int]:
    return {name: getattr(report, name) for name in report.__struct_fields__ if getattr(report, name)}


async def stored(shop: Shop) -> list[dict[str, Any]]:
    async with shop.system.database() as connection:
        rows = await connection.fetch(
            "select external_id, order_number, status, version, total, created_at from orders where restaurant_id = $1"
            " order by external_id",
            shop.restaurant,
        )
    return [dict(row) for row in rows]


async def all_there(shop: Shop, expected: Sequence[str], *, within: float = 30.0) -> None:
    """Each of them once, in PostgreSQL, written once, through the background lane."""

    async def look() -> list[str]:
        return [row["external_id"] for row in await stored(shop)]

    await eventually(look, within=within, what="all orders", until=lambda found: found == sorted(expected))
    assert {row["version"] for row in await stored(shop)} == {1}
    async with shop.system.database() as connection:
        ways = await connection.fetch(
            "select lane, source, count(*) from changes where restaurant_id = $1 and entity = 'order' group by 1, 2",
            shop.restaurant,
        )
        assert (
            await connection.fetchval("select count(*) from conflicts where restaurant_id = $1", shop.restaurant) == 0
        )
    assert [tuple(row) for row in ways] == [("background", "import", len(expected))]


async def done(system: System, name: str) -> int:
    """How many rows of a source are noted as done."""
    async with system.database() as connection:
        return int(await connection.fetchval("select coalesce(max(done), 0) from imports where source = $1", name))


# -- files ---------------------------------------------------------------------------------------------------------


async def test_a_file_comes_in_through_the_background_lane_and_each_refused_row_is_told(
    shop: Shop, tmp_path: Path
) -> None:
    known = names(303)
    lines = [line_of(name, number) for number, name in enumerate(known)]
    lines[7:7] = [b"{", b'{"external_id": "\xff"}']
    lines[250:250] = [line_of("elsewhere", restaurant_id=str(uuid4())), line_of("nul", **{"a\x00b": 1})]
    source, told = jsonl(tmp_path / "orders.jsonl", lines), tmp_path / "refused.jsonl"
    arguments = ("import", source, "--restaurant", shop.restaurant, "--refused", str(told))
    first = await ticketrail(shop.system, *arguments, "--json")
    refusals = first.told.pop("refusals")
    assert {name: n for name, n in first.told.items() if name != "refusals"} == {
        "read": 307, "skipped": 0, "created": 303, "updated": 0, "unchanged": 0, "refused": 4,
    }  # fmt: skip
    assert [(one["line"], one["reason"].partition(":")[0]) for one in refusals] == [
        (8, "body"),
        (9, "external_id"),
        (251, "restaurant_id"),
        (252, "a?b"),
    ]
    assert [json.loads(line) for line in told.read_bytes().splitlines()] == refusals
    assert first.code == 1, "rows were refused"
    assert "━" not in first.err, "no bar where there is no terminal"
    await all_there(shop, known)

    again = await ticketrail(shop.system, *arguments)
    assert again.code == 1
    assert again.out.splitlines()[-1] == (
        "0 created, 0 updated, 0 unchanged, 4 refused, 307 imported by an earlier run"
    )
    assert again.out.startswith("line 8: body: ")
    assert "line 251: restaurant_id: no such restaurant" in again.out
    assert "━" not in again.err
    report, why = await bring(shop, source, again=True)
    assert counts(report) == {"read": 307, "unchanged": 303, "refused": 4}
    assert [one.line for one in why] == [8, 9, 251, 252]
    await all_there(shop, known)


async def test_what_is_not_final_and_has_no_number_gets_one_of_its_day(shop: Shop, tmp_path: Path) -> None:
    known = names(3)
    lines = [line_of(name, order_number="", status="ready") for name in known]
    await bring(shop, jsonl(tmp_path / "orders.jsonl", lines))
    await all_there(shop, known)
    assert sorted(row["order_number"] for row in await stored(shop)) == ["0001", "0002", "0003"]


async def test_a_file_that_has_changed_is_read_from_its_beginning(shop: Shop, tmp_path: Path) -> None:
    known = names(4)
    path = tmp_path / "orders.jsonl"
    assert counts((await bring(shop, jsonl(path, [line_of(name) for name in known[:3]])))[0]) == {
        "read": 3,
        "created": 3,
    }
    changed = [line_of(known[3]), line_of(known[0], notes="changed"), *(line_of(name) for name in known[1:3])]
    report, _ = await bring(shop, jsonl(path, changed))
    assert counts(report) == {"read": 4, "created": 1, "updated": 1, "unchanged": 2}


async def test_rows_of_one_order_count_in_the_order_of_the_file(shop: Shop, tmp_path: Path) -> None:
    (known,) = names(1)
    wanted = [f"note {number}" for number in range(20)]
    lines = [line_of(known, notes=note, created_at=None, status="ready") for note in wanted]
    report, _ = await bring(shop, jsonl(tmp_path / "orders.jsonl", lines))
    assert counts(report) == {"read": 20, "created": 1, "updated": 19}

    async def notes() -> list[str]:
        async with shop.system.database() as connection:
            rows = await connection.fetch(
                "select data->'after'->>'notes' from changes where restaurant_id = $1 order by version",
                shop.restaurant,
            )
        return [row[0] for row in rows]

    await eventually(notes, what="one after the other", until=lambda found: found == wanted)


async def test_both_shapes_of_csv_make_the_same_orders(shop: Shop, tmp_path: Path) -> None:
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
        assert counts((await bring(shop, str(tmp_path / name)))[0]) == {"read": 1, "created": 1}
    await all_there(shop, [one, other])
    assert [(row["total"], row["created_at"]) for row in await stored(shop)] == [(1240, LAST_YEAR)] * 2


async def test_an_unknown_restaurant_ends_it_at_once(system: System, tmp_path: Path, shop: Shop) -> None:
    source = jsonl(tmp_path / "orders.jsonl", [line_of("x")])
    ended = await ticketrail(system, "import", source, "--restaurant", str(uuid4()))
    assert (ended.code, "no such restaurant" in ended.err) == (1, True)
    assert "Traceback" not in ended.err
    nobody = Shop(system, str(uuid4()), "", "", "", "")
    with pytest.raises(NotFound):
        await bring(nobody, source)
    # Registered since: nothing was noted, so nothing is skipped.
    assert counts((await bring(shop, source))[0]) == {"read": 1, "created": 1}


# -- another database ----------------------------------------------------------------------------------------------

QUERY = (
    "select external_id, created_at, table_id, total, tax_amount, tip_amount, status, items, payments"
    " from till order by created_at, external_id"
)


async def test_orders_of_another_postgresql(shop: Shop) -> None:
    """Its numerics, times, uuids and JSON; what changed between is seen, what did not is left alone."""
    database = f"till{uuid4().hex[:8]}"
    url = await asyncio.to_thread(shop.system.servers.postgres.make_database, database)
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
        report, why = await bring(shop, url, query=QUERY)
        assert counts(report) == {"read": 3, "created": 2, "refused": 1}
        assert [(one.line, one.reason) for one in why] == [(2, "total: Expected `int | null`, got `float`")]
        await all_there(shop, known[:2])
        assert [(row["total"], row["created_at"]) for row in await stored(shop)] == [
            (700, LAST_YEAR),
            (700, LAST_YEAR + timedelta(minutes=2)),
        ]
        await add(known[2], 3)
        assert counts((await bring(shop, url, query=QUERY))[0]) == {
            "read": 4, "skipped": 3, "created": 1, "refused": 1,
        }  # fmt: skip
        await add(known[3], -1)  # comes first: to skip the first four would miss it
        assert counts((await bring(shop, url, query=QUERY))[0]) == {
            "read": 5, "created": 1, "unchanged": 3, "refused": 1,
        }  # fmt: skip
        await till.execute("delete from till where external_id = any($1)", known[:2])
        await add(known[4], 4)
        assert counts((await bring(shop, url, query=QUERY))[0]) == {
            "read": 4, "created": 1, "unchanged": 2, "refused": 1,
        }  # fmt: skip
        await all_there(shop, known)
        wrong = await ticketrail(shop.system, "import", url, "--query", "select * from nowhere")
        assert (wrong.code, 'relation "nowhere" does not exist' in wrong.err) == (1, True)
        password = url.partition("//")[2].partition("@")[0].partition(":")[2]
        async with shop.system.database() as connection:
            noted = await connection.fetchval("select string_agg(source, ' ') from imports")
        assert f":{password}@" not in noted
        await till.close()
    finally:
        await asyncio.to_thread(shop.system.servers.postgres.drop_database, database)


# -- interrupted ---------------------------------------------------------------------------------------------------


async def test_killed_in_the_middle_it_goes_on_where_it_stopped(shop: Shop, tmp_path: Path) -> None:
    known = names(700)
    lines = [b"{", *(line_of(name, number) for number, name in enumerate(known))]
    source = jsonl(tmp_path / "orders.jsonl", lines)
    command = [sys.executable, "-m", "services.sync.cli", "import", source, "--restaurant", shop.restaurant]
    # Its way to the broker leads through this process: while that stands still, it does not come to its end.
    async with link_to(shop.system.rabbitmq_url) as broker:
        env = {**shop.system.env, "TICKETRAIL_RABBITMQ_URL": broker.url}
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await eventually(lambda: done(shop.system, source), what="some rows done")
        process.kill()
        await process.wait()
    so_far = await done(shop.system, source)
    assert 0 < so_far < len(lines), "it was killed in the middle"

    ended = await ticketrail(shop.system, *command[3:], "--json")
    told = ended.told
    assert told["skipped"] == so_far
    assert told["created"] + told["unchanged"] == len(lines) - so_far
    assert [one["line"] for one in told["refusals"]] == [1], "what the run before refused is told as well"
    assert ended.code == 1
    await all_there(shop, known)


@pytest.mark.parametrize("away", ["rabbitmq", "redis", "postgresql"])
async def test_while_a_backend_is_away_it_waits_and_goes_on(shop: Shop, tmp_path: Path, away: str) -> None:
    known = names(320)
    source = jsonl(tmp_path / "orders.jsonl", [line_of(name, order_number="") for name in known])
    async with AsyncExitStack() as stack:
        links = {
            "rabbitmq": ("rabbitmq_url", await stack.enter_async_context(link_to(shop.system.rabbitmq_url))),
            "redis": ("redis_url", await stack.enter_async_context(link_to(shop.system.redis.url))),
            "postgresql": (
                "database_writer_url",
                await stack.enter_async_context(link_to(shop.system.database_url("ticketrail_writer"))),
            ),
        }
        running = asyncio.create_task(bring(shop, source, **{name: link.url for name, link in links.values()}))  # type: ignore[arg-type]
        await eventually(lambda: done(shop.system, source), what="some rows done")
        link = links[away][1]
        await link.cut()
        before = await _still(lambda: done(shop.system, source))
        assert not running.done(), "it waits"
        await link.restore()
        report, why = await running
    assert 0 < before < len(known)
    assert (report.refused, why) == (0, [])
    assert report.created + report.unchanged == len(known)
    await all_there(shop, known)


async def _still(look: Callable[[], Any], seconds: float = 1.0) -> int:
    """What is seen when it has not moved for a while."""
    seen, since = -1, asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() - since < seconds:
        now = await look()
        if now != seen:
            seen, since = now, asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)
    return seen


async def test_on_a_terminal_there_is_a_progress_bar(shop: Shop, tmp_path: Path) -> None:
    known = names(150)
    source = jsonl(tmp_path / "orders.jsonl", [line_of(name) for name in known])
    ours, theirs = pty.openpty()
    arguments = ["import", source, "--restaurant", shop.restaurant]

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
        env={**shop.system.env, "TERM": "xterm", "COLUMNS": "120"},
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
