"""`ticketrail migrate` on a separate database and vhost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from structlog.testing import capture_logs

from deploy.local import layout
from shared.entities.contract import Lane
from shared.messaging import declare, topology
from shared.postgres import migrate
from tests.rigs.servers import Servers
from tests.rigs.system import System, eventually, settings_of


@pytest.fixture
async def empty(servers: Servers, tmp_path: Path) -> AsyncIterator[System]:
    system = System(servers, tmp_path)
    yield system
    await system.down()


async def test_migrate_may_be_repeated_and_run_concurrently(empty: System) -> None:
    first = await asyncio.gather(empty.cli("migrate"), empty.cli("migrate"))
    assert sum("0001_the_rail.sql" in output for output in first) == 1
    assert "up to date" in await empty.cli("migrate")


async def test_migrated_broker_passes_the_startup_check_of_services(empty: System) -> None:
    await empty.cli("migrate")
    async with await declare.connect(empty.rabbitmq_url) as connection:
        await declare.check(connection, settings_of(empty))


async def test_missing_queue_is_named(empty: System) -> None:
    await empty.cli("migrate")
    async with await declare.connect(empty.rabbitmq_url) as connection:
        channel = await connection.channel()
        await channel.queue_delete(topology.MIRROR_DEAD)
        with pytest.raises(declare.TopologyError, match=topology.MIRROR_DEAD):
            await declare.check(connection, settings_of(empty))


async def test_queue_with_other_arguments_is_named_and_kept(empty: System) -> None:
    connection = await aio_pika.connect(empty.rabbitmq_url)
    async with connection:
        channel = await connection.channel()
        await channel.declare_queue(topology.MIRROR_DEAD, durable=True)
    with pytest.raises(AssertionError, match=topology.MIRROR_DEAD):
        await empty.cli("migrate")


async def test_older_dead_letter_queues_are_kept_and_new_ones_never_drop_a_dead_letter(
    empty: System,
) -> None:
    connection = await aio_pika.connect(empty.rabbitmq_url)
    async with connection:
        channel = await connection.channel()
        older = topology.dead_queue(Lane.CRITICAL)
        await channel.declare_queue(older, durable=True, arguments={"x-queue-type": "quorum"})
        for _ in range(2):
            with capture_logs() as logs:
                await declare.declare(connection, settings_of(empty))
            assert [one["queue"] for one in logs if one["event"] == "queue_keeps_older_arguments"] == [older]
        for name, lane in topology.dead_queues():
            arguments: Any = {"x-queue-type": "quorum"}
            if lane is not Lane.CRITICAL:
                arguments["x-delivery-limit"] = topology.DEAD_DELIVERY_LIMIT
            await (await connection.channel()).declare_queue(name, durable=True, arguments=arguments)


async def test_missing_log_is_created_again_and_an_existing_one_is_kept(empty: System) -> None:
    assert "change log created" in await empty.cli("migrate")
    assert "topology: up to date" in await empty.cli("migrate")
    async with await declare.connect(empty.rabbitmq_url) as connection:
        channel = await connection.channel()
        await channel.queue_delete(topology.LOG)
    assert "change log created" in await empty.cli("migrate")


async def test_migration_that_changed_after_it_was_applied_is_refused(
    empty: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate.migrate(settings_of(empty))
    monkeypatch.setattr(migrate, "files", lambda: [("0001_the_rail.sql", "select 1")])
    with pytest.raises(migrate.MigrationError, match=r"0001_the_rail\.sql"):
        await migrate.migrate(settings_of(empty))


async def test_role_that_bypasses_row_level_security_is_refused(empty: System) -> None:
    superuser = settings_of(empty).model_copy(
        update={"database_api_url": "postgresql://postgres:x@127.0.0.1/ticketrail"}
    )
    with pytest.raises(migrate.MigrationError, match="row-level security"):
        await migrate.migrate(superuser)


async def test_data_of_this_layout_is_accepted_and_parts_of_another_layout_are_named(empty: System) -> None:
    settings, broker = settings_of(empty), empty.servers.rabbitmq
    await layout.check_database(settings.database_url)  # an empty database fits
    await empty.cli("migrate")
    other_steps = settings.model_copy(update={"retry_steps_ms": (77,)})
    await layout.check_database(settings.database_url)
    for known in (settings, other_steps):
        await asyncio.to_thread(layout.check_queues, broker.management_url, empty.rabbitmq_url, known)

    connection = await aio_pika.connect(empty.rabbitmq_url)
    async with connection:
        channel = await connection.channel()
        await channel.declare_queue("another.system", durable=True)
        await asyncio.to_thread(layout.check_queues, broker.management_url, empty.rabbitmq_url, settings)
        await channel.declare_queue("sync.postgres.older.v0", durable=True)

    async def named() -> str:
        try:
            await asyncio.to_thread(layout.check_queues, broker.management_url, empty.rabbitmq_url, settings)
        except layout.OtherLayout as error:
            return str(error)
        return ""  # the management API shows a new queue a moment later

    assert "sync.postgres.older.v0" in await eventually(named)

    async with empty.database("ticketrail_owner") as database:
        await database.execute("update migrations set sha256 = 'x' where name = '0001_the_rail.sql'")
        with pytest.raises(layout.OtherLayout, match=r"0001_the_rail\.sql differs from the file"):
            await layout.check_database(settings.database_url)
        await database.execute("update migrations set name = '0000_older.sql' where name = '0001_the_rail.sql'")
        with pytest.raises(layout.OtherLayout, match=r"0000_older\.sql"):
            await layout.check_database(settings.database_url)
