"""`replay --from-log` writes the changes that the log has and PostgreSQL lacks, for example after a restore."""

from typing import Any

import asyncpg
import pytest

from services.sync.failures import dead_letter_store
from services.sync.failures.parsing import parse_dead_letters
from services.sync.maintenance.from_log import LogReplay, LogReplayReport
from shared.entities.contract import Change, Lane, encode, now
from shared.messaging import topology
from tests.rigs.builders import change, message, order, payment
from tests.rigs.postgres_writer import Rig
from tests.rigs.servers import Servers


async def forget(rig: Rig, servers: Servers, *changes: Change) -> None:
    """Deletes the changes and everything that they wrote, as a restore of an older backup does."""
    name = rig.settings.database_url.rpartition("/")[2]
    superuser = await asyncpg.connect(servers.postgres.superuser_url.rpartition("/")[0] + f"/{name}")
    try:
        for one in changes:
            await superuser.execute("delete from changes where change_id = $1", one.id)
            for table, column in (
                ("orders", "id"),
                ("order_items", "order_id"),
                ("payments", "order_id"),
                ("conflicts", "entity_id"),
            ):
                await superuser.execute(f"delete from {table} where {column} = $1", one.entity_id)
    finally:
        await superuser.close()


async def replay(rig: Rig, **options: Any) -> LogReplayReport:
    return await LogReplay(rig.settings, rig.postgres, rig.publisher, **options).run()


async def test_missing_changes_are_written_once_with_every_payment_and_no_version_goes_down(
    rig: Rig, servers: Servers
) -> None:
    kept, paid = order(), payment()
    first = change(kept)
    lost = order(id=kept.id, items=kept.items, notes="two", payments=(paid,))
    second = change(lost, base=first, before=kept)
    whole = change(order())
    await rig.publish(first, second)
    await rig.publish(whole)
    await rig.written(first, second, whole)
    await forget(rig, servers, second, whole)
    # The order changed after the restore, so its versions have a gap.
    third = change(order(id=kept.id, items=kept.items, notes="three"), base=second, before=lost)
    await rig.publish(third)
    await rig.written(third)

    report = await replay(rig)

    assert (report.missing, report.written, report.failed) == (2, 2, 0)
    assert await rig.count("changes") == 4
    assert await rig.database.fetchval("select version from orders where id = $1", kept.id) == 3
    assert await rig.database.fetchval("select notes from orders where id = $1", kept.id) == "three"
    assert await rig.database.fetchval("select id::text from payments") == paid.id
    assert await rig.count("conflicts") == 0
    again = await replay(rig)
    assert (again.read, again.missing, again.written) == (4, 0, 0)


async def test_dry_run_counts_and_changes_nothing(rig: Rig, servers: Servers) -> None:
    one = change(order())
    await rig.publish(one)
    await rig.written(one)
    await forget(rig, servers, one)
    report = await replay(rig, dry_run=True)
    assert (report.read, report.missing, report.written, report.entities["order"]) == (1, 1, 0, 1)
    assert await rig.count("changes") == 0


@pytest.mark.parametrize("kept", [True, False], ids=["kept before the backup", "kept after the backup"])
async def test_discarded_dead_letter_is_skipped_and_a_lost_one_is_dead_lettered_again(
    rig: Rig, servers: Servers, kept: bool
) -> None:
    good = change(order())
    poison = encode({"id": "no change at all"})
    discarded = change(order())
    await rig.publish(good, poison, discarded)
    await rig.written(good, discarded)
    await forget(rig, servers, good, discarded)
    (dead_letter,) = await rig.dead_letters(1)
    await rig.database.execute("delete from dead_letters")
    queue = topology.dead_queue(Lane.CRITICAL)
    if kept:
        async with rig.postgres.connection() as connection:
            dead_letters = parse_dead_letters(queue, Lane.CRITICAL, dead_letter.body, dead_letter.headers, now())
            dead_letters += parse_dead_letters(queue, Lane.CRITICAL, message(discarded), {}, now())
            await dead_letter_store.keep(connection, dead_letters)
            await connection.execute("update dead_letters set status = 'discarded'")

    report = await replay(rig)

    assert report.unreadable == 1
    if kept:
        assert (report.written, report.dead, report.failed) == (1, 1, 0)
        assert await rig.depth(queue) == 0
    else:
        assert (report.written, report.dead, report.failed) == (2, 0, 1)
        (again,) = await rig.dead(Lane.CRITICAL)
        assert again.body == dead_letter.body
