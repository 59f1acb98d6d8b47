"""The warm-up on real servers: a lost mirror takes claims only after it has everything that was accepted before."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from services.sync.mirror.warm_up import StartPoint
from services.sync.writer.postgres_writer import PostgresWriter
from services.sync.writer.upsert import DecodedChange, write_batch
from shared.entities import registry
from shared.entities.contract import Change, Lane, Outline, encode, now
from shared.entities.inventory_item import InventoryItem
from shared.entities.job import BayJob, JobStage
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import OrderStatus, StockHold
from shared.messaging import topology
from shared.messaging.position import LogPosition
from shared.mirror import keys
from shared.mirror.claim_replies import Ask, Claimed, ClaimReply, HeadMoved
from shared.mirror.mirror import Apply
from shared.postgres.checkpoints import append_checkpoint, last_checkpoint
from shared.postgres.feed import ForeignDatabase
from tests.rigs.builders import CREATED_AT, RESTAURANT, change, new_id, order
from tests.rigs.mirror_writer import MirrorRig, replace_log
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.replays import REFUSE_FORBIDDEN_NOTES
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually
from tests.rigs.turns import whole_turn

_TURNS = 10
"""The mirror must stay cold for so many rounds of the mirror writer, each of which has a heartbeat."""


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because a mirror keeps the log state of one log."""
    return servers.extra_redis()


@pytest.fixture
async def make_mirrored(make_rig: MakeRig, redis: Redis) -> AsyncIterator[Any]:
    made: list[MirrorRig] = []

    async def make(heartbeats_again_seconds: float = 10.0, **settings: Any) -> MirrorRig:
        """Returns a new system whose mirror writer has made its mirror warm."""
        await redis.command("FLUSHALL")
        rig: Rig = await make_rig(redis_url=redis.url, **{"mirror_settle_seconds": 0.2, **settings})
        one = MirrorRig(rig, heartbeats_again_seconds=heartbeats_again_seconds)
        made.append(one)
        await rig.writer.start()
        await rig.heartbeats.start()
        one.writer.start()
        await one.warm()
        return one

    yield make
    for one in made:
        await one.writer.stop()


@pytest.fixture
async def mirrored(make_mirrored: Any) -> MirrorRig:
    made: MirrorRig = await make_mirrored()
    return made


async def written(mirrored: MirrorRig) -> Change:
    """Returns an order that both stores have."""
    made = change(order(items=1))
    await mirrored.rig.publish(made)
    await mirrored.rig.written(made)
    await mirrored.shown(made)
    return made


async def wipe(mirrored: MirrorRig, redis: Redis) -> None:
    await redis.command("FLUSHALL")
    await mirrored.cold()


async def stays_cold(mirrored: MirrorRig) -> None:
    for _ in range(_TURNS):
        await whole_turn(mirrored.writer.loop)
    assert not await mirrored.mirror.is_warm()


async def start_another_writer(rig: Rig) -> None:
    """Acts like the start of a worker after its PostgreSQL writer was stopped, which cannot start again."""
    rig.writer = PostgresWriter(
        rig.settings, rig.postgres, rig.publisher, rig.watch, rig.tracer, rig.counts, committed=rig.feed_loop.wake
    )
    await rig.writer.start()


async def commit(rig: Rig, made: Change) -> None:
    """Commits a change in PostgreSQL alone, as if the log had lost it."""
    entity, state = registry.read(made)
    await write_batch(rig.database, [DecodedChange(entity.lane, entity, made, state)], timeout_seconds=5.0)


@pytest.mark.parametrize("empty", [True, False], ids=["no data yet", "with data"])
async def test_mirror_of_a_new_system_does_not_wait_for_the_settle_period_and_a_lost_one_does(
    make_mirrored: Any, redis: Redis, empty: bool
) -> None:
    mirrored: MirrorRig = await make_mirrored(mirror_settle_seconds=3_600)
    if not empty:
        await written(mirrored)
    await wipe(mirrored, redis)
    await eventually(mirrored.mirror.feed_position, what="a filled mirror")
    await stays_cold(mirrored)


async def test_lost_mirror_stays_cold_until_a_lane_has_delivered_its_earlier_messages(
    mirrored: MirrorRig, redis: Redis
) -> None:
    made = await written(mirrored)
    await mirrored.rig.writer.stop()
    await wipe(mirrored, redis)
    await mirrored.shown(made)
    await stays_cold(mirrored)
    await start_another_writer(mirrored.rig)
    await mirrored.warm()


async def test_lost_mirror_stays_cold_until_the_log_is_read_up_to_the_heartbeats(
    mirrored: MirrorRig, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await written(mirrored)
    read_on, apply_entries = asyncio.Event(), mirrored.writer.apply_entries

    async def held(*arguments: Any) -> list[Outline]:
        await read_on.wait()
        return await apply_entries(*arguments)

    monkeypatch.setattr(mirrored.writer, "apply_entries", held)
    await wipe(mirrored, redis)
    await mirrored.shown(made)  # the mirror is filled
    for _ in range(_TURNS):
        await whole_turn(mirrored.rig.heartbeats.loop)
    assert not await mirrored.mirror.is_warm()
    read_on.set()
    await mirrored.warm()


async def test_lost_mirror_stays_cold_while_a_second_consumer_of_a_lane_holds_older_messages(
    make_mirrored: Any, redis: Redis
) -> None:
    mirrored: MirrorRig = await make_mirrored(heartbeats_again_seconds=0.5, lane_consumers=1)
    rig, held = mirrored.rig, asyncio.Queue[Any]()
    made = await written(mirrored)
    await rig.heartbeats.stop()  # only the warm-up sends heartbeats
    async with rig.channel() as channel:
        await channel.set_qos(prefetch_count=1_000)
        # The consumers of a lane get messages in turns. This one acknowledges none.
        await (await channel.get_queue(topology.lane_queue(Lane.CRITICAL))).consume(held.put)

        async def older() -> bool:
            await rig.publish(change(order(items=1)))
            return not held.empty()

        await eventually(older, what="a message that the second consumer holds")
        await wipe(mirrored, redis)
        await mirrored.shown(made)
        await stays_cold(mirrored)
    await mirrored.warm()


async def test_heartbeats_that_a_purged_lane_lost_are_sent_again(make_mirrored: Any, redis: Redis) -> None:
    mirrored: MirrorRig = await make_mirrored(heartbeats_again_seconds=1.0)
    made = await written(mirrored)
    await mirrored.rig.heartbeats.stop()
    await mirrored.rig.drained()
    await mirrored.rig.writer.stop()
    await wipe(mirrored, redis)
    await mirrored.shown(made)
    queue = topology.lane_queue(Lane.NORMAL)
    await eventually(lambda: mirrored.rig.depth(queue), what="heartbeats of the warm-up")
    async with mirrored.rig.channel() as channel:
        await (await channel.get_queue(queue)).purge()
    await start_another_writer(mirrored.rig)
    await mirrored.warm()


async def test_warm_mirror_has_the_changes_committed_while_it_was_filled(mirrored: MirrorRig, redis: Redis) -> None:
    await written(mirrored)
    await mirrored.rig.writer.stop()
    await wipe(mirrored, redis)
    await eventually(mirrored.mirror.feed_position, what="a filled mirror")
    committed = change(order(items=1))
    await commit(mirrored.rig, committed)  # no feed loop runs here
    await start_another_writer(mirrored.rig)
    await mirrored.warm()
    found = await mirrored.document(committed)
    assert found is not None and found.head == committed.head and not found.pending


async def test_warm_mirror_has_the_states_of_open_dead_letters_as_failed(mirrored: MirrorRig, redis: Redis) -> None:
    rig = mirrored.rig
    await rig.as_owner(REFUSE_FORBIDDEN_NOTES)
    first = await written(mirrored)
    refused = change(order(items=1, notes="forbidden"))
    newer = change(order(items=1, id=first.entity_id, notes="forbidden"), base=first)
    await rig.publish(refused, newer)
    rig.collector.start()
    await rig.dead_letters(2)
    await mirrored.writer.stop()
    await redis.command("FLUSHALL")
    await replace_log(rig)  # so that only the dead letters have these states
    mirrored.writer.start()
    await eventually(mirrored.mirror.is_warm, what="a warm mirror")
    for one in (refused, newer):
        found = await mirrored.document(one)
        assert found is not None and found.head == one.head and found.pending
        assert "no_forbidden" in msgspec.json.decode(found.failure)["error"]


# -- where a fill begins ---------------------------------------------------------------------------------------------


async def append(rig: Rig, log_low: LogPosition) -> None:
    """Writes a checkpoint as the leader of the ledger does."""
    last = await last_checkpoint(rig.database)
    written = await append_checkpoint(
        rig.database, last.id if last else None, log_low=log_low, log_at=log_low, feed=(0, 0), counts={}
    )
    assert written


async def position(mirrored: MirrorRig) -> LogPosition:
    found = await mirrored.mirror.log_position()
    assert found is not None
    return found


async def test_wiped_mirror_reads_the_log_from_the_newest_checkpoint_that_the_log_proves(
    mirrored: MirrorRig, redis: Redis
) -> None:
    rig = mirrored.rig
    await rig.writer.stop()
    before, after = change(order(items=1)), change(order(items=1))
    await rig.publish(before)
    await mirrored.shown(before)
    low = await position(mirrored)
    await rig.publish(after)
    await mirrored.shown(after)
    await append(rig, low)
    await append(rig, LogPosition(low.offset + 1, low.crc ^ 1))  # the log has another message there
    async with rig.channel() as channel:
        await (await channel.get_queue(topology.lane_queue(Lane.CRITICAL))).purge()
    await start_another_writer(rig)
    await wipe(mirrored, redis)
    await mirrored.shown(after)
    await mirrored.warm()
    assert await mirrored.document(before) is None, "the log was read from its beginning"


async def test_mirror_is_filled_from_one_snapshot_of_postgres(
    mirrored: MirrorRig, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit between the live window and the holds must be in both or in none."""
    rig = mirrored.rig
    at: dict[str, Any] = {"counted_at": CREATED_AT, "created_at": CREATED_AT, "updated_at": CREATED_AT}
    item = InventoryItem(id=new_id(), restaurant_id=RESTAURANT, name="Water", quantity=5, **at)
    await commit(rig, change(item))
    await written(mirrored)
    apply, hold = mirrored.mirror.apply, mirrored.mirror.hold
    meanwhile = change(order(items=1, holds=(StockHold(item.id, 1),)))
    committed = False
    held: set[str] = set()

    async def committed_meanwhile(states: Sequence[Apply], **more: Any) -> list[int] | None:
        nonlocal committed
        if not committed and any(one.how == "stored" for one in states):
            committed = True
            await commit(rig, meanwhile)
        return await apply(states, **more)

    async def noted(rows: Any) -> None:
        held.update(order_id for _, order_id, _ in rows)
        await hold(rows)

    monkeypatch.setattr(mirrored.mirror, "apply", committed_meanwhile)
    monkeypatch.setattr(mirrored.mirror, "hold", noted)
    await wipe(mirrored, redis)
    await mirrored.warm()
    assert committed and meanwhile.entity_id not in held
    assert await mirrored.document(meanwhile) is not None


async def test_mirror_is_not_filled_from_a_database_that_was_restored_into_another_server(
    mirrored: MirrorRig, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, errors, fill = mirrored.rig, list[Exception](), mirrored.writer.warm_up.fill

    async def noted(*arguments: Any) -> StartPoint:
        try:
            return await fill(*arguments)
        except ForeignDatabase as error:
            errors.append(error)
            raise

    async def tried_twice() -> bool:
        return len(errors) > 1

    monkeypatch.setattr(mirrored.writer.warm_up, "fill", noted)
    server = await rig.database.fetchval("select system_identifier from database_server")
    await rig.as_owner("update database_server set system_identifier = '1'")
    await wipe(mirrored, redis)
    await eventually(tried_twice, what="a mirror writer that tries again")
    await rig.as_owner(f"update database_server set system_identifier = '{server}'")
    await mirrored.warm()


# -- the keys of requests --------------------------------------------------------------------------------------------


async def claim(mirrored: MirrorRig, made: Change, *, ask: bool) -> ClaimReply:
    return await mirrored.mirror.claim(ORDER, made, encode(made), None, None, ask=ask)


async def knows_keys(mirrored: MirrorRig, redis: Redis) -> None:
    async def look() -> bool:
        return bool(await redis.command("EXISTS", keys.KEYS))

    await eventually(look, what="a mirror that knows the keys")


AT = now() - timedelta(days=20)
OLD_ORDER: dict[str, Any] = {"status": OrderStatus.COMPLETED, "created_at": AT, "updated_at": AT}


async def stored_and_left(mirrored: MirrorRig) -> tuple[Change, Change]:
    """Returns an order and a job that were created with a key and have left the live window. PostgreSQL has them."""
    await mirrored.rig.database.execute(
        "insert into restaurants (id, slug, name) values ($1, 'dosa', 'Dosa')", RESTAURANT
    )
    ordered = change(order(items=1, request_hash="ab" * 32, **OLD_ORDER))
    job: dict[str, Any] = {"id": new_id(), "restaurant_id": RESTAURANT, "bay_id": new_id(), "title": "Wash"}
    done = change(BayJob(**job, stage=JobStage.DONE, created_at=AT, updated_at=AT))
    for one in (ordered, done):
        await commit(mirrored.rig, one)
    return ordered, done


async def assert_known(mirrored: MirrorRig, *made: Change) -> None:
    """A repeat of the creation gets no claim, and the mirror has no state."""
    for one in made:
        entity, state = registry.read(one)
        assert await mirrored.document(one) is None, "it is in the live window"
        again = change(msgspec.structs.replace(state, notes="a repeat"))
        reply = await mirrored.mirror.claim(entity, again, encode(again), None, None, ask=True)
        assert reply == HeadMoved(one.head, None)


@pytest.mark.parametrize("lost", ["everything", "its position"])
async def test_lost_mirror_knows_the_keyed_creations_that_left_the_live_window(
    mirrored: MirrorRig, redis: Redis, lost: str
) -> None:
    await knows_keys(mirrored, redis)
    made = await stored_and_left(mirrored)
    await commit(mirrored.rig, change(order(items=1, **OLD_ORDER)))
    if lost == "everything":
        await wipe(mirrored, redis)
    else:
        await redis.command("DEL", keys.LOG, keys.WARM)
        await mirrored.cold()
    await mirrored.warm()
    await knows_keys(mirrored, redis)
    await assert_known(mirrored, *made)
    assert isinstance(await claim(mirrored, change(order(items=1)), ask=True), Claimed)


async def test_claim_of_a_keyed_creation_returns_ask_until_the_mirror_knows_the_keys(
    mirrored: MirrorRig, redis: Redis
) -> None:
    await knows_keys(mirrored, redis)
    await redis.command("DEL", keys.KEYS)
    made = change(order(items=1))
    assert await claim(mirrored, made, ask=True) == Ask()
    assert isinstance(await claim(mirrored, made, ask=False), Claimed)
