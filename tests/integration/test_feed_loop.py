"""The feed loop on real servers: the mirror shows what PostgreSQL has, even after one of both has lost data."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from services.sync.maintenance.reconciler import Reconciler
from services.sync.writer.upsert import DecodedChange, write_batch
from shared.entities import registry
from shared.entities.contract import Change, now
from shared.entities.order import OrderStatus
from shared.mirror.mirror import Document
from shared.mirror.stored_heads import FeedNote
from shared.postgres.feed import FeedPosition, find_end
from tests.rigs.builders import RESTAURANT, change, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.rail.changes import applied
from tests.rigs.replays import REFUSE_FORBIDDEN_NOTES
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because a mirror keeps the position of one feed."""
    return servers.extra_redis()


@pytest.fixture
async def rig(make_rig: MakeRig, redis: Redis) -> AsyncIterator[Rig]:
    """A feed loop that runs on a filled mirror."""
    await redis.command("FLUSHALL")
    rig: Rig = await make_rig(redis_url=redis.url)
    await rig.mirror.keep_restaurant(RESTAURANT, b"{}")
    await fill(rig)
    rig.feed_loop.start()
    yield rig


async def fill(rig: Rig) -> None:
    """Acts like the warm-up of an empty mirror: notes the end of the feed."""
    end = await find_end(rig.database)
    await rig.mirror.settle([], note=FeedNote(end.xid, end.encode()))


async def commit(rig: Rig, *changes: Change, connection: Any = None) -> None:
    """Commits the changes in PostgreSQL, as the writer does."""
    written = []
    for one in changes:
        entity, state = registry.read(one)
        written.append(DecodedChange(entity.lane, entity, one, state))
    await write_batch(connection or rig.database, written, timeout_seconds=5.0)
    rig.feed_loop.wake()


async def reveal(rig: Rig, *changes: Change, how: str = "reveal") -> None:
    await rig.mirror.apply([applied(one, how) for one in changes])


async def document(rig: Rig, made: Change) -> Document | None:
    _, [found] = await rig.mirror.read(RESTAURANT, made.entity, [made.entity_id])
    return found


async def shows(rig: Rig, made: Change, *, pending: bool) -> Document:
    """Waits until the mirror shows this change, pending or synced."""
    found = await eventually(
        lambda: document(rig, made),
        what=f"{made.id} in the mirror",
        until=lambda found: found is not None and found.head == made.head and found.pending is pending,
    )
    assert found is not None
    return found


async def delete(rig: Rig, *changes: Change) -> None:
    """Deletes commits from PostgreSQL, as a failover to a standby without them does."""
    ids = ", ".join(f"'{one.entity_id}'" for one in changes)
    tables = (("changes", "entity_id"), ("orders", "id"), ("order_items", "order_id"))
    await rig.as_owner(
        "; ".join(
            f"alter table {table} no force row level security; delete from {table} where {column} in ({ids});"
            f" alter table {table} force row level security"
            for table, column in tables
        )
    )


async def write_checkpoint(rig: Rig) -> None:
    await rig.database.execute(
        "insert into checkpoints (log_low, log_low_crc, log_at, log_at_crc, feed_xid, feed_seq, at)"
        " values (-1, 0, -1, 0, '0', 0, now() - interval '1 minute')"
    )


async def test_pending_state_becomes_synced_when_postgres_has_it(rig: Rig) -> None:
    first, second = change(order()), change(order())
    await reveal(rig, first, second)
    await commit(rig, first)
    await shows(rig, first, pending=False)
    await shows(rig, second, pending=True)


async def test_state_that_the_mirror_lacks_or_has_older_comes_from_postgres(rig: Rig) -> None:
    lacking, older = change(order()), change(order())
    newer = change(order(id=older.entity_id, notes="newer"), base=older)
    await reveal(rig, older)
    await commit(rig, lacking, older, newer)
    await shows(rig, lacking, pending=False)
    assert msgspec.json.decode((await shows(rig, newer, pending=False)).state)["notes"] == "newer"


async def test_newer_state_than_the_one_in_postgres_stays_pending(rig: Rig) -> None:
    first = change(order())
    second = change(order(id=first.entity_id), base=first)
    await reveal(rig, second)
    await commit(rig, first)
    marker = change(order())
    await commit(rig, marker)
    await shows(rig, marker, pending=False)
    await shows(rig, second, pending=True)


async def test_commit_beside_a_transaction_that_stays_open_is_shown_at_once(rig: Rig) -> None:
    other = await asyncpg.connect(rig.settings.database_writer_url)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("select pg_current_xact_id()")
    waiting = await rig.mirror.feed_position()
    assert waiting is not None
    made = change(order())
    await reveal(rig, made)
    await commit(rig, made)
    await shows(rig, made, pending=False)
    position = await rig.mirror.feed_position()
    assert position is not None
    assert FeedPosition.decode(position).xid == FeedPosition.decode(waiting).xid
    assert rig.feed_loop.stalled_seconds > 0
    await transaction.commit()
    await other.close()

    async def noted() -> str:
        return FeedPosition.decode(await rig.mirror.feed_position() or "").change_id

    await eventually(noted, what="the position after the transaction", until=lambda found: found == made.id)


async def test_wiped_mirror_is_left_alone_until_it_is_filled(rig: Rig, redis: Redis) -> None:
    await redis.command("FLUSHALL")
    made = change(order())
    await commit(rig, made)
    turns = rig.feed_loop.loop.turns
    await rig.feed_loop.loop.turn_after(turns + 1)
    assert await rig.mirror.feed_position() is None
    assert await document(rig, made) is None
    await fill(rig)
    later = change(order())
    await commit(rig, later)
    await shows(rig, later, pending=False)


async def passes(rig: Rig, made: Change) -> None:
    """Waits until the position of the feed names this change. It waits for every transaction of the server that runs,
    also one of another database."""

    async def named() -> str:
        position = await rig.mirror.feed_position()
        return "" if position is None else FeedPosition.decode(position).change_id

    await eventually(named, what=f"a position at {made.id}", until=lambda change_id: change_id == made.id)


async def test_older_copy_of_the_mirror_gets_the_missing_states(rig: Rig, redis: Redis) -> None:
    """A failover to a replica that lagged: the copy has an older position of the feed."""
    before = await rig.mirror.feed_position()
    assert before is not None
    made = change(order())
    await commit(rig, made)
    await shows(rig, made, pending=False)
    await redis.command("DEL", f"{{{RESTAURANT}}}:order:{made.entity_id}")
    older = FeedPosition.decode(before)
    await rig.mirror.settle([], note=FeedNote(older.xid, before, again=True))
    await shows(rig, made, pending=False)


async def test_commits_that_postgres_has_lost_are_pending_again(rig: Rig) -> None:
    kept, lost = change(order()), change(order())
    await reveal(rig, kept, lost)
    await commit(rig, kept)
    await write_checkpoint(rig)
    await commit(rig, lost)
    await shows(rig, kept, pending=False)
    await shows(rig, lost, pending=False)
    await passes(rig, lost)
    await delete(rig, lost)
    rig.feed_loop.wake()
    await shows(rig, lost, pending=True)
    await shows(rig, kept, pending=False)
    later = change(order())
    await commit(rig, later)
    await shows(rig, later, pending=False)


async def test_mirror_whose_position_cannot_be_proved_is_loaded_again(rig: Rig) -> None:
    """PostgreSQL came back from a backup that is older than every checkpoint that the position names."""
    kept, lost, missed = (change(order()) for _ in range(3))
    await commit(rig, kept)
    await commit(rig, lost)
    await shows(rig, kept, pending=False)
    await passes(rig, lost)
    await delete(rig, lost)
    await rig.feed_loop.stop()
    await commit(rig, missed)
    position = FeedPosition("", 1, 1, lost.id, "")
    await rig.mirror.settle([], note=FeedNote(1, position.encode(), again=True))
    rig.feed_loop.start()
    await shows(rig, missed, pending=False)
    await shows(rig, lost, pending=True)
    await shows(rig, kept, pending=False)


async def test_failure_is_shown_and_returns_to_a_mirror_that_was_replaced(rig: Rig, redis: Redis) -> None:
    await rig.as_owner(REFUSE_FORBIDDEN_NOTES)
    await rig.writer.start()
    rig.collector.start()
    good, bad = change(order()), change(order(notes="forbidden"))
    await reveal(rig, good, bad)
    await rig.publish(good, bad)
    await shows(rig, good, pending=False)

    async def failure() -> dict[str, Any]:
        found = await document(rig, bad)
        return msgspec.json.decode(found.failure) if found and found.failure else {}

    seen = await eventually(failure, what="the failure in the mirror", until=bool)
    assert seen["error"] and seen["attempts"] >= 1 and seen["last_attempt"]
    await redis.command("FLUSHALL")
    await reveal(rig, bad)
    turns = rig.feed_loop.loop.turns
    await rig.feed_loop.loop.turn_after(turns)
    await fill(rig)
    assert await eventually(failure, what="the failure in the new mirror", until=bool) == seen


async def test_failure_of_a_change_that_the_mirror_gets_later_is_shown(rig: Rig) -> None:
    await rig.as_owner(REFUSE_FORBIDDEN_NOTES)
    await rig.writer.start()
    rig.collector.start()
    bad, good = change(order(notes="forbidden")), change(order())
    await rig.publish(bad, good)
    await rig.dead_letters(1)
    await shows(rig, good, pending=False)
    turns = rig.feed_loop.loop.turns
    await rig.feed_loop.loop.turn_after(turns + 1)
    await reveal(rig, bad)
    await eventually(
        lambda: document(rig, bad), what="the failure", until=lambda found: found is not None and bool(found.failure)
    )


async def test_old_document_that_postgres_has_lost_is_not_trimmed(rig: Rig) -> None:
    """Its commit was lost without a trace in the feed, for example with older rows of a backup."""
    at = now() - timedelta(days=30)
    fields: dict[str, Any] = {"status": OrderStatus.COMPLETED, "created_at": at, "updated_at": at}
    kept, lost = change(order(**fields)), change(order(**fields))
    await commit(rig, kept, lost)
    await shows(rig, kept, pending=False)
    await shows(rig, lost, pending=False)
    await rig.feed_loop.stop()
    await delete(rig, lost)
    nothing: Any = None
    rail: Any = type("NoRail", (), {"claim_finisher": nothing})
    assert await Reconciler(rig.settings, rig.postgres, rig.mirror, rail, rail).trim() == 1
    assert await document(rig, kept) is None
    await shows(rig, lost, pending=True)


async def test_unreadable_state_of_a_newer_release_does_not_stop_the_loop(rig: Rig) -> None:
    newer = change(order())
    await commit(rig, newer)
    await shows(rig, newer, pending=False)
    await rig.feed_loop.stop()
    await rig.as_owner(
        'alter table changes no force row level security; update changes set data = \'{"after": {"id": 1}}\';'
        " alter table changes force row level security"
    )
    before = await rig.mirror.feed_position()
    assert before is not None
    await rig.mirror.settle([], note=FeedNote(0, FeedPosition().encode(), again=True))
    await rig.mirror.trim(RESTAURANT, "order", {newer.entity_id: newer.id})
    rig.feed_loop.start()
    good = change(order())
    await commit(rig, good)
    await shows(rig, good, pending=False)
    assert await document(rig, newer) is None


async def test_two_loops_on_one_mirror_disturb_nothing(rig: Rig) -> None:
    second = type(rig.feed_loop)(rig.settings, rig.postgres, rig.mirror)
    second.start()
    try:
        made = [change(order()) for _ in range(20)]
        for one in made:
            await reveal(rig, one)
            await commit(rig, one)
            second.wake()
            await asyncio.sleep(0)
        for one in made:
            await shows(rig, one, pending=False)
    finally:
        await second.stop()
