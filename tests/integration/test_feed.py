"""The feed on real servers: paging, running transactions, failovers without the last commits, restored files and
dumps."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from shared.postgres.feed import (
    BEGINNING,
    FeedPosition,
    ForeignDatabase,
    PositionLost,
    VisibleFeed,
    find_end,
    read_page,
)
from shared.postgres.migrate import migrate
from tests.rigs.builders import RESTAURANT
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.servers.standby import Replication

Connection = Any

_INSERT = """
insert into changes (restaurant_id, change_id, entity, entity_id, version, type, source, lane, accepted_at, data)
values ($1, $2, 'order', gen_random_uuid(), 1, 'ticketrail.order.created.v1', 'orders', 'critical', now(), '{}')
"""


async def write(connection: Connection, count: int = 1) -> list[str]:
    """Commits changes, each in a transaction of its own unless one is open. Returns their ids."""
    ids = [str(uuid4()) for _ in range(count)]
    for id_ in ids:
        await connection.execute(_INSERT, RESTAURANT, id_)
    return ids


async def checkpoint(connection: Connection, *, age_seconds: float = 60.0) -> str:
    """Writes a checkpoint of this age."""
    id_: str = await connection.fetchval(
        "insert into checkpoints (log_low, log_low_crc, log_at, log_at_crc, feed_xid, feed_seq, at)"
        " values (-1, 0, -1, 0, '0', 0, now() - make_interval(secs => $1)) returning id::text",
        age_seconds,
    )
    return id_


async def read_all(connection: Connection, position: FeedPosition, limit: int = 3) -> tuple[list[str], FeedPosition]:
    """Reads page after page to the end."""
    found: list[str] = []
    while True:
        page = await read_page(connection, position, limit=limit)
        found += [one.change_id for one in page.changes]
        position = page.position
        if len(page.changes) < limit:
            return found, position


async def read_visible(feed: VisibleFeed, connection: Connection) -> list[str]:
    found = []
    async with aclosing(feed.read(connection)) as pages:
        async for page in pages:
            found += [one.change_id for one in page.changes]
    return found


async def read_some(kept: FeedPosition, connection: Connection, chance: random.Random, seen: set[str]) -> FeedPosition:
    """A reader begins at the position that was kept, and dies after some pages. Returns the position that it kept."""
    async with aclosing(VisibleFeed(kept, page_changes=2).read(connection)) as pages:
        async for page in pages:
            seen.update(one.change_id for one in page.changes)
            kept = page.position
            if chance.random() < 0.3:
                break
    return kept


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    made: Rig = await make_rig()
    return made


@pytest.fixture
async def another(rig: Rig) -> AsyncIterator[Connection]:
    """Another connection of the writer role."""
    connection = await asyncpg.connect(rig.settings.database_writer_url)
    yield connection
    await connection.close()


@pytest.fixture
def replication(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replication]:
    folder = tmp_path_factory.mktemp("replication")
    for path in (folder, folder.parent):
        path.chmod(0o755)  # root starts PostgreSQL as another user
    made = Replication(folder)
    made.primary.start()
    yield made
    made.discard()


async def test_pages_hold_every_change_once_in_order(rig: Rig) -> None:
    written = await write(rig.database, 10)
    found, position = await read_all(rig.database, BEGINNING)
    assert found == written
    later = await write(rig.database, 2)
    assert (await read_all(rig.database, FeedPosition.decode(position.encode())))[0] == later


@pytest.mark.parametrize("role", ["database_writer_url", "database_api_url", "database_ops_url"])
async def test_every_role_can_prove_a_position(rig: Rig, role: str) -> None:
    connection = await asyncpg.connect(getattr(rig.settings, role))
    try:
        assert (await read_page(connection, BEGINNING, limit=1)).position.timeline
    finally:
        await connection.close()


async def test_running_transaction_stalls_pages_and_only_the_position_of_the_visible_feed(
    rig: Rig, another: Connection
) -> None:
    feed = VisibleFeed(await find_end(rig.database))
    await read_visible(feed, rig.database)
    assert feed.stalled_seconds == 0.0
    start = feed.position
    transaction = another.transaction()
    await transaction.start()
    slow = await write(another)
    fast = await write(rig.database, 2)
    assert (await read_all(rig.database, start))[0] == []
    assert await read_visible(feed, rig.database) == fast
    assert await read_visible(feed, rig.database) == []
    assert (feed.position.xid, feed.position.seq) == (start.xid, start.seq)
    assert feed.stalled_seconds > 0.0
    await transaction.commit()
    assert await read_visible(feed, rig.database) == slow
    assert (await read_all(rig.database, start))[0] == slow + fast
    assert feed.position.change_id == fast[-1]
    await read_visible(feed, rig.database)
    assert feed.stalled_seconds == 0.0


@pytest.mark.parametrize("seed", range(8))
async def test_no_interleaving_of_transactions_hides_a_change(rig: Rig, seed: int) -> None:
    """Readers stop at any point and go on from the position that they kept."""
    chance = random.Random(seed)
    connections = [await asyncpg.connect(rig.settings.database_writer_url) for _ in range(4)]
    under_way: dict[int, tuple[Any, list[str]]] = {}
    committed: set[str] = set()
    feed, seen = VisibleFeed(BEGINNING, page_changes=2), set[str]()
    position, paged = BEGINNING, list[str]()
    for _ in range(120):
        at, what = chance.randrange(4), chance.random()
        if what < 0.25 and at not in under_way:
            transaction = connections[at].transaction()
            await transaction.start()
            under_way[at] = (transaction, await write(connections[at], chance.randrange(1, 4)))
        elif what < 0.5 and at in under_way:
            transaction, ids = under_way.pop(at)
            if chance.random() < 0.2:
                await transaction.rollback()
            else:
                await transaction.commit()
                committed.update(ids)
        elif what < 0.65:
            feed = VisibleFeed(await read_some(feed.position, rig.database, chance, seen), page_changes=2)
        elif what < 0.75:
            seen.update(await read_visible(feed, rig.database))
            assert committed <= seen
        else:
            page = await read_page(rig.database, position, limit=3)
            paged += [one.change_id for one in page.changes]
            position = page.position
    for transaction, ids in under_way.values():
        await transaction.commit()
        committed.update(ids)
    for connection in connections:
        await connection.close()
    seen.update(await read_visible(feed, rig.database))
    paged += (await read_all(rig.database, position))[0]
    assert seen == committed
    assert len(paged) == len(set(paged))
    assert set(paged) == committed


async def test_position_whose_row_is_gone_begins_again_at_its_checkpoint(rig: Rig) -> None:
    before = await write(rig.database, 2)
    named = await checkpoint(rig.database)
    kept = await write(rig.database, 2)
    lost = await write(rig.database, 1)
    feed = VisibleFeed(BEGINNING)
    assert await read_visible(feed, rig.database) == before + kept + lost
    assert feed.position.checkpoint == named
    await rig.as_owner(
        "alter table changes no force row level security;"
        f" delete from changes where change_id = '{lost[0]}'; alter table changes force row level security"
    )
    new = await write(rig.database, 1)
    page = await read_page(rig.database, feed.position, limit=10)
    assert page.restarted
    assert [one.change_id for one in page.changes] == kept + new
    async with aclosing(feed.read(rig.database)) as pages:
        again = [page async for page in pages]
    assert [page.restarted for page in again] == [True, False]
    assert [one.change_id for one in again[0].changes] == kept + new


async def test_position_without_a_checkpoint_in_the_database_is_lost(rig: Rig) -> None:
    gone = FeedPosition("", 1, 1, str(uuid4()), str(uuid4()))
    with pytest.raises(PositionLost):
        await read_page(rig.database, gone, limit=1)
    with pytest.raises(PositionLost):
        await read_visible(VisibleFeed(gone), rig.database)


async def test_young_checkpoint_is_not_named_because_a_standby_may_lack_it(rig: Rig) -> None:
    old = await checkpoint(rig.database, age_seconds=31.0)
    await checkpoint(rig.database, age_seconds=29.0)
    await write(rig.database)
    assert (await find_end(rig.database)).checkpoint == old


async def test_row_alone_proves_a_position_where_the_timeline_is_hidden(rig: Rig) -> None:
    first = await write(rig.database)
    position = (await read_page(rig.database, BEGINNING, limit=10)).position
    await rig.as_owner("create or replace function feed_timeline() returns text language sql as $$ select '' $$")
    later = await write(rig.database)
    assert (await read_all(rig.database, position))[0] == later
    with pytest.raises(PositionLost):
        await read_page(rig.database, FeedPosition("", position.xid, position.seq, str(uuid4())), limit=1)
    assert (await read_all(rig.database, BEGINNING))[0] == first + later


async def test_restored_dump_is_refused_until_migrate_has_forgotten_its_xids(rig: Rig) -> None:
    """Another server gave the xids, so they may be larger than any xid of this one."""
    restored = await write(rig.database, 3)
    await checkpoint(rig.database)
    await rig.as_owner(
        "alter table changes no force row level security;"
        " update changes set xid = (xid::text::int8 + 1000000)::text::xid8;"
        " alter table changes force row level security; update database_server set system_identifier = '1'"
    )
    with pytest.raises(ForeignDatabase, match="migrate"):
        await read_page(rig.database, BEGINNING, limit=1)
    await migrate(rig.settings)
    later = await write(rig.database)
    assert (await read_all(rig.database, BEGINNING))[0] == restored + later
    assert await rig.count("checkpoints") == 0
    forced = "select relforcerowsecurity from pg_class where relname = 'changes'"
    assert await rig.database.fetchval(forced)


async def _begin(replication: Replication) -> tuple[VisibleFeed, set[str], list[str]]:
    """Writes changes and a checkpoint between them. Returns a reader at the end, what it has read, and the later
    changes."""
    await migrate(replication.settings())
    connection = await replication.connect()
    await write(connection, 3)
    await checkpoint(connection)
    kept = await write(connection, 2)
    feed = VisibleFeed(BEGINNING)
    seen = set(await read_visible(feed, connection))
    await connection.close()
    return feed, seen, kept


async def _visible(connection: Connection) -> set[str]:
    return {row[0] for row in await connection.fetch("select change_id::text from changes")}


async def _pages_reach_the_end(connection: Connection, position: FeedPosition, expected: list[str]) -> None:
    page = await read_page(connection, position, limit=1_000)
    assert page.restarted
    assert {one.change_id for one in page.changes} >= set(expected)
    assert not (await read_page(connection, page.position, limit=10)).restarted


async def test_failover_to_a_standby_without_the_last_commits_hides_nothing(replication: Replication) -> None:
    standby = await asyncio.to_thread(replication.standby)
    feed, seen, kept = await _begin(replication)
    await replication.caught_up(standby)
    await asyncio.to_thread(standby.stop)
    connection = await replication.connect()
    lost = await write(connection, 5)
    seen.update(await read_visible(feed, connection))
    assert set(lost) <= seen
    await connection.close()
    position = feed.position

    await asyncio.to_thread(replication.fail_over, standby)
    connection = await replication.connect()
    new = await write(connection, 2)  # with the xids and the numbers of lost changes
    assert set(new) <= set(await read_visible(feed, connection))
    assert set(kept) <= await _visible(connection)
    await _pages_reach_the_end(connection, position, [*kept, *new])
    await connection.close()


async def test_restored_files_with_the_same_timeline_hide_nothing(replication: Replication) -> None:
    feed, seen, kept = await _begin(replication)
    copy = await asyncio.to_thread(replication.copy_files)
    connection = await replication.connect()
    await write(connection, 5)
    seen.update(await read_visible(feed, connection))
    await connection.close()
    position = feed.position

    await asyncio.to_thread(replication.put_back, copy)
    connection = await replication.connect()
    new = await write(connection, 7)
    found = set(await read_visible(feed, connection))
    assert set(new) <= found
    assert await _visible(connection) <= seen | found
    await _pages_reach_the_end(connection, position, [*kept, *new])
    await connection.close()


async def test_second_standby_with_the_same_timeline_number_hides_nothing(replication: Replication) -> None:
    first, second = [await asyncio.to_thread(replication.standby) for _ in range(2)]
    feed, seen, kept = await _begin(replication)
    for standby in (first, second):
        await replication.caught_up(standby)
    await asyncio.to_thread(second.stop)
    await asyncio.to_thread(replication.fail_over, first)
    connection = await replication.connect()
    await write(connection, 4)
    seen.update(await read_visible(feed, connection))
    timeline, position = feed.position.timeline, feed.position
    await connection.close()

    await asyncio.to_thread(replication.fail_over, second)
    connection = await replication.connect()
    new = await write(connection, 6)
    found = set(await read_visible(feed, connection))
    # Only the start of the server is another one.
    assert feed.position.timeline.rpartition("-")[0] == timeline.rpartition("-")[0]
    assert set(new) <= found
    assert await _visible(connection) <= seen | found
    await _pages_reach_the_end(connection, position, [*kept, *new])
    await connection.close()


async def test_timeline_reveals_a_lost_commit_before_the_row_of_the_position(replication: Replication) -> None:
    """The smaller transaction id committed last, so that the standby has the row of the position and lacks an earlier
    one."""
    standby = await asyncio.to_thread(replication.standby)
    feed, _, _ = await _begin(replication)
    slow, fast = await replication.connect(), await replication.connect()
    transaction = slow.transaction()
    await transaction.start()
    (lost,) = await write(slow)
    (last,) = await write(fast)
    await replication.caught_up(standby)
    await asyncio.to_thread(standby.stop)
    await transaction.commit()
    assert set(await read_visible(feed, fast)) == {lost, last}
    assert feed.position.change_id == last
    for connection in (slow, fast):
        await connection.close()
    await asyncio.to_thread(replication.fail_over, standby)
    connection = await replication.connect()
    assert await _visible(connection) >= {last}
    assert lost not in await _visible(connection)
    assert (await read_page(connection, feed.position, limit=10)).restarted
    await connection.close()


async def test_restart_of_the_server_begins_at_the_checkpoint_as_it_may_be_a_restored_snapshot(
    replication: Replication,
) -> None:
    feed, _, kept = await _begin(replication)
    await asyncio.to_thread(replication.primary.stop)
    await asyncio.to_thread(replication.primary.start)
    connection = await replication.connect()
    page = await read_page(connection, feed.position, limit=10)
    assert page.restarted
    assert [one.change_id for one in page.changes] == kept
    await connection.close()
