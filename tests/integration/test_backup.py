"""A backup of PostgreSQL holds every table, and the ledger adds the changes that a restored database lacks."""

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from services.sync.ledger.ledger_loop import LedgerLoop
from services.sync.ledger.session import Patience
from services.sync.maintenance.backup import BackupFailed, make_backup, restore_backup
from shared.errors import Conflict
from shared.settings import Settings
from tests.rigs.builders import change, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

QUICK = Patience(look_up=0.2, missing_in_log=0.5, resend=1.0)
COUNTS = """
select table_name, (xpath('/row/n/text()', query_to_xml('select count(*) as n from ' || quote_ident(table_name), false,
    true, '')))[1]::text::int as rows
from information_schema.tables where table_schema = 'public' and table_type = 'BASE TABLE' order by 1
"""


@pytest.fixture
async def empty(servers: Servers) -> AsyncIterator[str]:
    """The name of an empty database."""
    name = f"r{uuid4().hex[:10]}"
    await asyncio.to_thread(servers.postgres.make_database, name)
    yield name
    await asyncio.to_thread(servers.postgres.drop_database, name)


def superuser_url(servers: Servers, database: str) -> str:
    return servers.postgres.superuser_url.rpartition("/")[0] + f"/{database}"


def in_database(settings: Settings, servers: Servers, name: str) -> Settings:
    roles = {"database_url": "owner", "database_writer_url": "writer", "database_api_url": "api"}
    urls = {field: servers.postgres.url(f"ticketrail_{role}", name) for field, role in roles.items()}
    return settings.model_copy(
        update={**urls, "database_ops_url": servers.postgres.url("ticketrail_ops", name), "database_backup_url": ""}
    )


def files_in(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def check_file(folder: Path, path: Path, size: int) -> None:
    assert path.stat().st_size == size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert files_in(folder) == [path.name], "a partial file is left"


async def rows(url: str) -> dict[str, int]:
    connection = await asyncpg.connect(url)
    try:
        return {row["table_name"]: row["rows"] for row in await connection.fetch(COUNTS)}
    finally:
        await connection.close()


async def test_restored_backup_has_every_row_and_the_ledger_restores_later_changes(
    make_rig: MakeRig, servers: Servers, empty: str, tmp_path: Path
) -> None:
    rig = await make_rig()
    database = rig.settings.database_url.rpartition("/")[2]
    settings = rig.settings.model_copy(
        update={"database_backup_url": superuser_url(servers, database), "database_timeout_seconds": 10.0}
    )
    ledger = LedgerLoop(rig.settings, rig.postgres, rig.publisher, patience=QUICK)
    ledger.start()
    await rig.writer.start()
    await rig.heartbeats.start()
    before = [change(order(items=2)) for _ in range(3)]
    await rig.publish(*before)
    await rig.written(*before)

    path = tmp_path / "ticketrail.dump"
    made = await make_backup(settings, path)
    assert made.changes == 3
    check_file(tmp_path, path, made.bytes)
    later = [change(order(items=1)) for _ in range(2)]
    await rig.publish(*later)
    await rig.written(*later)
    await ledger.stop()

    restored = in_database(settings, servers, empty)
    assert await restore_backup(restored, path) == []
    expected, found = await rows(superuser_url(servers, database)), await rows(superuser_url(servers, empty))
    assert found.keys() == expected.keys()
    assert {name: found[name] for name in ("orders", "order_items", "changes", "migrations")} == {
        "orders": 3,
        "order_items": 6,
        "changes": 3,
        "migrations": expected["migrations"],
    }

    # The services start on the restored database. The change log has the two orders that the backup lacks.
    another = Rig(restored.model_copy(update={"database_timeout_seconds": 2.0}))
    await rig.writer.stop()
    await rig.heartbeats.stop()
    try:
        await another.up()
        await another.writer.start()
        await another.heartbeats.start()
        continued = LedgerLoop(another.settings, another.postgres, another.publisher, patience=QUICK)
        continued.start()
        try:
            await another.written(*before, *later)
            await eventually(lambda: another.count("orders"), what="all orders", until=lambda count: count == 5)
        finally:
            await continued.stop()
    finally:
        await another.down()


async def test_restore_refuses_a_database_with_tables_and_a_broken_backup_leaves_it_empty(
    make_rig: MakeRig, servers: Servers, empty: str, tmp_path: Path
) -> None:
    rig = await make_rig()
    path = tmp_path / "broken.dump"
    path.write_bytes(b"PGDMP and nothing else")
    with pytest.raises(Conflict, match="not empty"):
        await restore_backup(rig.settings, path)
    database = rig.settings.database_url.rpartition("/")[2]
    made = tmp_path / "cut.dump"
    await make_backup(rig.settings.model_copy(update={"database_backup_url": superuser_url(servers, database)}), made)
    whole = made.read_bytes()
    made.write_bytes(whole[:-100])  # the tables can be made, and then data is missing
    restored = in_database(rig.settings, servers, empty)
    for broken in (path, made):
        with pytest.raises(BackupFailed, match="pg_restore failed"):
            await restore_backup(restored, broken)
        assert await rows(superuser_url(servers, empty)) == {}
    made.write_bytes(whole)
    assert await restore_backup(restored, made) == []


async def test_backup_by_a_role_that_cannot_see_every_restaurant_is_refused_and_leaves_no_file(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    rig = await make_rig()
    with pytest.raises(BackupFailed, match="TICKETRAIL_DATABASE_BACKUP_URL"):
        await make_backup(rig.settings, tmp_path / "ticketrail.dump")
    assert not files_in(tmp_path)
