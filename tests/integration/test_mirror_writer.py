"""The mirror writer on real servers: it applies the log to the mirror and skips what the mirror already has."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from services.sync.mirror.mirror_writer import MirrorWriter
from shared.entities.contract import Outline, encode
from shared.entities.order import OrderStatus
from shared.messaging import topology
from shared.mirror import keys
from shared.mirror.mirror import NOTHING_APPLIED, Apply
from shared.observability.metrics import Metrics, WriterMetrics
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, message, order
from tests.rigs.mirror_writer import MirrorRig, replace_log
from tests.rigs.postgres_writer import MakeRig
from tests.rigs.rail.sinks import NoPostgres, PostgresTables
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually

_RESTORE = """
redis.call('FLUSHALL')
for i, key in ipairs(KEYS) do
  redis.call('RESTORE', key, 0, ARGV[i])
end
"""


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because a mirror keeps the log state of one log."""
    return servers.extra_redis()


@pytest.fixture
async def mirrored(make_rig: MakeRig, redis: Redis) -> AsyncIterator[MirrorRig]:
    rig = await make_rig(redis_url=redis.url, mirror_settle_seconds=0.2)
    await redis.command("FLUSHALL")
    made = MirrorRig(rig)
    await rig.writer.start()  # a mirror becomes warm when PostgreSQL has all earlier messages
    made.writer.start()
    await made.warm()
    yield made
    await made.writer.stop()


async def test_change_that_was_not_revealed_is_applied_from_the_log(mirrored: MirrorRig) -> None:
    made = change(order(items=2))
    await mirrored.rig.publish(made)
    await mirrored.shown(made)


async def test_revealed_change_is_not_sent_again(mirrored: MirrorRig, monkeypatch: pytest.MonkeyPatch) -> None:
    revealed, newer, lacking = (change(order(items=1)) for _ in range(3))
    older = newer
    newer = change(order(items=1, id=older.entity_id), base=older)
    for one in (revealed, newer):
        await mirrored.reveal(one)
    sent = mirrored.watch_applied(monkeypatch)
    await mirrored.rig.publish(revealed, older, newer, lacking)
    await mirrored.shown(lacking)
    assert set(sent) == {lacking.id}
    found = await mirrored.document(older)
    assert found is not None and found.head == newer.head


async def test_change_that_is_read_again_does_not_restore_a_state_that_left_the_live_window(
    mirrored: MirrorRig,
) -> None:
    first = change(order(items=1))
    completed = change(order(items=1, id=first.entity_id, status=OrderStatus.COMPLETED), base=first)
    await PostgresTables(mirrored.rig.postgres, mirrored.mirror).take([first, completed])
    marker = change(order(items=1))
    await mirrored.rig.publish(first)
    await mirrored.rig.publish(marker)
    await mirrored.shown(marker)
    assert await mirrored.document(first) is None


async def test_change_that_postgres_cannot_be_asked_about_is_pending(
    mirrored: MirrorRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = NoPostgres("", mirrored.rig.settings)
    monkeypatch.setattr(mirrored.rig.postgres, "connection", nothing.connection)
    made = change(order(items=1))
    await mirrored.rig.publish(made)
    await mirrored.shown(made)
    found = await mirrored.document(made)
    assert found is not None and found.pending
    assert mirrored.writer.warm


async def test_replaced_mirror_gets_the_changes_that_the_first_one_had(
    mirrored: MirrorRig, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica is promoted between the request and its reply: it has the log state but not yet the last reveals."""
    made = change(order(items=1))
    await mirrored.reveal(made)
    missing = mirrored.mirror.missing
    failed_over = False

    async def lost_meanwhile(changes: Sequence[Outline]) -> list[int]:
        nonlocal failed_over
        answer = await missing(changes)
        if not failed_over and any(one.id == made.id for one in changes):
            failed_over = True
            assert answer == []
            await redis.command("DEL", keys.WARM, keys.doc(RESTAURANT, "order", made.entity_id))
        return answer

    monkeypatch.setattr(mirrored.mirror, "missing", lost_meanwhile)
    await mirrored.rig.publish(made)

    async def replaced() -> bool:
        return failed_over

    await eventually(replaced, what="the other mirror")
    await mirrored.shown(made)


async def test_old_copy_restored_into_the_running_server_keeps_the_mirror_cold_until_it_is_filled(
    mirrored: MirrorRig, redis: Redis
) -> None:
    first = change(order(items=1))
    await mirrored.rig.publish(first)
    await mirrored.shown(first)
    every = await redis.command("KEYS", "*")
    copy = [(key, await redis.command("DUMP", key)) for key in every]
    identity = await redis.command("HGET", keys.WARM, "identity")
    lost = change(order(items=1))
    await mirrored.rig.publish(lost)
    await mirrored.shown(lost)
    # In one step, because the writer may look in between.
    names, values = zip(*copy, strict=True)
    await redis.command("EVAL", _RESTORE, len(names), *names, *values)

    async def filled() -> bytes | None:
        found: bytes | None = await redis.command("HGET", keys.WARM, "identity")
        return found

    # No message follows, so only the check of the position can notice it.
    await eventually(filled, what="another identity", until=lambda found: found not in (None, identity))
    await mirrored.shown(lost)


async def test_server_that_is_promoted_while_it_is_filled_is_filled_again(
    mirrored: MirrorRig, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica lacks a state that the first server got from PostgreSQL; both have the same log state."""
    made = change(order(items=1))
    await PostgresTables(mirrored.rig.postgres, mirrored.mirror).take([made])
    apply = mirrored.mirror.apply
    promoted = False

    async def promoted_meanwhile(states: Sequence[Apply], **more: Any) -> list[int] | None:
        nonlocal promoted
        found = await apply(states, **more)
        if not promoted and any(one.head == made.head for one in states):
            promoted = True
            await redis.command("DEL", keys.doc(RESTAURANT, "order", made.entity_id))
            await redis.command("REPLICAOF", "127.0.0.1", 1)
            await redis.command("REPLICAOF", "NO", "ONE")
        return found

    monkeypatch.setattr(mirrored.mirror, "apply", promoted_meanwhile)
    await redis.command("FLUSHALL")

    async def warm_after_the_promotion() -> bool:
        return promoted and await mirrored.mirror.is_warm()

    await eventually(warm_after_the_promotion, what="a warm mirror")
    await mirrored.shown(made)


_GOOD = encode(change(order(items=1)))
_POISON = {
    "garbage": (b"garbage \xff", "undecodable"),
    "wrong tenant": (
        message(change(order(restaurant_id=OTHER_RESTAURANT), restaurantid=RESTAURANT)),
        "wrong_tenant",
    ),
    "newer version": (message(change(order(), type="ticketrail.order.created.v2")), "unsupported_version"),
    "first year": (b"[" + _GOOD.replace(b'"time":"2', b'"time":"0') + b"]", "contract_broken"),
    "no time zone": (b'[{"id":"x","subject":"order/x","time":"2026-01-01T00:00:00"}]', "contract_broken"),
    "version 0": (b"[" + _GOOD.replace(b'"entityversion":1', b'"entityversion":0') + b"]", "contract_broken"),
}


@pytest.mark.parametrize("name", _POISON)
async def test_unreadable_entry_is_dead_lettered_and_the_writer_continues(mirrored: MirrorRig, name: str) -> None:
    body, reason = _POISON[name]
    rig = mirrored.rig
    await rig.publisher.publish("critical", body)
    after = change(order(items=1))
    await rig.publish(after)
    await mirrored.shown(after)
    await eventually(lambda: rig.depth(topology.MIRROR_DEAD), what="a dead letter", until=lambda depth: depth == 1)
    async with rig.channel() as channel:
        dead = await (await channel.get_queue(topology.MIRROR_DEAD)).get(timeout=5)
        await dead.ack()
    assert dead.headers["ticketrail-reason"] == reason
    assert dead.body == body


# -- a log that has lost its end -------------------------------------------------------------------------------------


async def test_log_that_lost_its_end_is_read_again_while_the_mirror_stays_warm(
    mirrored: MirrorRig, redis: Redis
) -> None:
    lost = [change(order(items=1)) for _ in range(5)]
    for one in lost:
        await mirrored.rig.publish(one)
    await mirrored.shown(lost[-1])
    new = [change(order(items=1)) for _ in range(8)]  # the offset of the mirror exists in the new log too
    await replace_log(mirrored.rig, *new)
    for one in new:
        await mirrored.shown(one)
        assert await mirrored.mirror.is_warm(), "the mirror became cold, so that changes would have been refused"
    assert all([await mirrored.document(one) for one in lost]), "the mirror lost what it had"
    assert mirrored.writer.warm


async def test_mirror_writer_that_starts_on_a_log_without_its_position_goes_back(
    mirrored: MirrorRig, redis: Redis
) -> None:
    await mirrored.rig.publish(first := change(order(items=1)))
    await mirrored.shown(first)
    await mirrored.writer.stop()
    new = [change(order(items=1)) for _ in range(8)]
    await replace_log(mirrored.rig, *new)
    mirrored.writer.start()
    for one in new:
        await mirrored.shown(one)
    assert await mirrored.mirror.is_warm()


async def test_mirror_writer_that_ended_after_it_went_back_continues_there(mirrored: MirrorRig) -> None:
    await mirrored.rig.publish(first := change(order(items=1)))
    await mirrored.shown(first)
    await mirrored.writer.stop()
    found = await mirrored.mirror.log_position()
    assert found is not None and await mirrored.mirror.go_back(found, NOTHING_APPLIED)
    new = [change(order(items=1)) for _ in range(3)]
    await replace_log(mirrored.rig, *new)
    mirrored.writer.start()
    for one in new:
        await mirrored.shown(one)
        assert await mirrored.mirror.is_warm(), "the mirror was filled again"


async def test_cold_mirror_whose_position_is_lost_is_filled_from_postgres(mirrored: MirrorRig, redis: Redis) -> None:
    """After a power cut, the log and the mirror have both lost a change that PostgreSQL has from its lane."""
    rig = mirrored.rig
    await rig.publish(first := change(order(items=1)))
    await mirrored.shown(first)
    await mirrored.writer.stop()
    await rig.publish(lost := change(order(items=1)))
    await rig.written(lost)
    await redis.command("DEL", keys.WARM, keys.doc(RESTAURANT, "order", lost.entity_id))
    await replace_log(rig, *(change(order(items=1)) for _ in range(8)))
    mirrored.writer.start()
    await mirrored.shown(lost)
    await mirrored.warm()


async def test_position_that_another_mirror_writer_moved_is_not_moved_back(mirrored: MirrorRig) -> None:
    """Two workers read a log that has lost its end. The slower one must not undo what the faster one has read."""
    rig = mirrored.rig
    await rig.publish(first := change(order(items=1)))
    await mirrored.shown(first)
    other = MirrorWriter(
        rig.settings, rig.postgres, rig.mirror, rig.publisher, rig.watch, rig.tracer, WriterMetrics(Metrics())
    )
    other.start()
    new = [change(order(items=1)) for _ in range(8)]
    await replace_log(rig, *new)
    for one in new:
        await mirrored.shown(one)
    await rig.publish(last := change(order(items=1)))
    await mirrored.shown(last)
    assert await mirrored.mirror.is_warm()
    await other.stop()
