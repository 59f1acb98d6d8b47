"""The commit on a real RabbitMQ and a real Redis: claims, owners that die, and brokers that are frozen or half full."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from msgspec import structs

from services.orders.entity_changes import EntityChanges
from shared.entities.contract import Lane, encode
from shared.entities.order import ENTITY as ORDER
from shared.errors import InvalidInput, OutcomeUnknown, Unavailable
from shared.messaging import topology
from shared.messaging.publisher import NotSent
from shared.mirror.claim_replies import Ask, Busy, Claimed
from shared.mirror.mirror import Mirror
from shared.rail.draft import Draft, change_of
from shared.rail.head import Heads, Standing
from shared.rail.idempotency import Creations
from shared.rail.journal import JournalBroken, JournalFull
from shared.rail.outcomes import ClaimLost, Committed
from shared.rail.record import Durability, Unrecorded
from shared.security.tokens import Identity, Role
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.rail.broker import MemoryBroker
from tests.rigs.rail.instance import RailRig, no_postgres
from tests.rigs.rail.vhost import LANE, Vhost, VhostRail, ids, open_vhost
from tests.rigs.servers import Servers
from tests.rigs.system import eventually


@pytest.fixture
async def vhost(servers: Servers, tmp_path: Path) -> AsyncIterator[Vhost]:
    async with open_vhost(servers, tmp_path) as vhost:
        yield vhost


@pytest.fixture
async def rig(vhost: Vhost) -> VhostRail:
    return await vhost.instance()


async def stale_claims(rig: VhostRail) -> list[str]:
    return await eventually(rig.stale_claims, what="a stale claim")


# -- the path of a change --------------------------------------------------------------------------------------


async def test_commit_is_confirmed_and_visible_and_leaves_no_claim(rig: VhostRail) -> None:
    done = await rig.rail.commit(rig.creation())
    assert (done.durability, done.visible, done.head.version) == (Durability.BROKER, True, 1)
    assert await rig.read(done.state.id) == (done.head, done.state)
    (message,) = await rig.queued(at_least=1)
    assert [change.id for change in message] == [done.head.change_id]
    assert bytes(message[0].data.after) == encode(done.state)
    assert await rig.server.claims(rig.restaurant) == []


async def test_only_one_of_two_claimants_of_a_version_commits(vhost: Vhost) -> None:
    # The claims must not become stale, so that neither process finishes the change of the other.
    rig, other = [await vhost.instance(stale_seconds=60.0) for _ in range(2)]
    created = await rig.rail.commit(rig.creation())
    outcomes = await asyncio.gather(
        rig.rail.commit(rig.update(created, notes="mine")),
        other.rail.commit(other.update(created, notes="yours")),
        return_exceptions=True,
    )
    won, lost = sorted(outcomes, key=lambda one: isinstance(one, ClaimLost))
    assert isinstance(won, Committed) and isinstance(lost, ClaimLost)
    assert await rig.read(created.state.id) == (won.head, won.state)
    assert sorted(ids(await rig.queued(at_least=2))) == sorted([created.head.change_id, won.head.change_id])


async def test_claimant_that_lost_gets_the_current_head(rig: VhostRail) -> None:
    created = await rig.rail.commit(rig.creation())
    won = await rig.rail.commit(rig.update(created, notes="first"))
    with pytest.raises(ClaimLost) as lost:
        await rig.rail.commit(rig.update(created, notes="second"))
    assert (lost.value.head, lost.value.standing) == (won.head, Standing(won.head, won.state, encode(won.state)))


async def test_200_concurrent_creations_get_dense_numbers_and_share_messages(rig: VhostRail, vhost: Vhost) -> None:
    other = await vhost.instance()
    both = [rig, other]
    done = await asyncio.gather(*(both[n % 2].rail.commit(both[n % 2].creation()) for n in range(200)))
    assert sorted(one.state.order_number for one in done) == [f"{n:04d}" for n in range(1, 201)]
    assert all(one.durability is Durability.BROKER and one.visible for one in done)
    messages = await rig.queued(at_least=1)
    assert sorted(ids(messages)) == sorted(one.head.change_id for one in done)
    assert len(messages) <= 40


# -- owners that die -------------------------------------------------------------------------------------------


async def test_live_claim_keeps_its_version(vhost: Vhost) -> None:
    rig = await vhost.instance(stale_seconds=60.0)
    created = await rig.rail.commit(rig.creation())
    _, reply = await rig.claim(rig.update(created, notes="slow"))
    assert isinstance(reply, Claimed)
    with pytest.raises(ClaimLost) as lost:
        await rig.rail.commit(rig.update(created, notes="fast"))
    assert lost.value.head is None
    assert (await rig.read(created.state.id)) == (created.head, created.state)  # a claim is not visible to readers


@pytest.mark.parametrize("died", ["before recording", "after recording", "before revealing, in the journal"])
async def test_next_writer_finishes_a_stale_claim_and_takes_the_following_version(
    rig: VhostRail, vhost: Vhost, died: str
) -> None:
    owner = await vhost.instance()
    assert owner.journal and owner.drainer
    created = await rig.rail.commit(rig.creation())
    await rig.queued(at_least=1)
    left, reply = await owner.claim(owner.update(created, notes="left behind"))
    assert isinstance(reply, Claimed)
    if died == "after recording":
        assert await owner.record(left) is Durability.BROKER
    elif died == "before revealing, in the journal":
        await owner.journal.append([(Lane.CRITICAL, encode(left))])
    await stale_claims(rig)

    # The claim is lost, because its base is no longer the head.
    with pytest.raises(ClaimLost) as lost:
        await rig.rail.commit(rig.update(created, notes="next"))
    assert lost.value.head == left.head
    head, state = await rig.read(created.state.id) or pytest.fail("the mirror lacks the order")
    assert (head, state.notes) == (left.head, "left behind")
    next_one = await rig.rail.commit(
        rig.update(Committed(state, head, Durability.BROKER, True, encode(state)), notes="next")
    )
    assert next_one.head.version == 3
    if died == "before revealing, in the journal":
        await owner.drainer.drain_some()
    queued = await rig.queued(at_least=2 if died == "before recording" else 3)
    assert set(ids(queued)) == {left.id, next_one.head.change_id}
    assert {change.entityversion for message in queued for change in message} == {2, 3}
    assert await rig.server.claims(rig.restaurant) == []


async def test_finished_creation_keeps_the_number_of_its_claim(rig: VhostRail) -> None:
    left, reply = await rig.claim(rig.creation())
    assert reply == Claimed("0001")
    await stale_claims(rig)
    await rig.finish_stale()
    head, order = await rig.read(left.entity_id) or pytest.fail("the mirror lacks the order")
    assert (head, order.order_number) == (left.head, "0001")
    (message,) = await rig.queued(at_least=1)
    assert [bytes(change.data.after) for change in message] == [encode(order)]
    assert (await rig.rail.commit(rig.creation())).state.order_number == "0002"


async def test_stalled_owner_records_the_same_change_as_its_finisher(
    rig: VhostRail, vhost: Vhost, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await vhost.instance()
    created = await rig.rail.commit(rig.creation())
    resumed = asyncio.Event()
    publish = owner.publisher.publish

    async def stalled(*message: Any) -> None:
        await resumed.wait()
        await publish(*message)

    monkeypatch.setattr(owner.publisher, "publish", stalled)
    slow = asyncio.create_task(owner.rail.commit(owner.update(created, notes="slow")))
    await stale_claims(rig)
    with pytest.raises(ClaimLost):
        await rig.rail.commit(rig.update(created, notes="next"))
    resumed.set()
    done = await slow
    assert (await rig.read(created.state.id)) == (done.head, done.state)
    found = ids(await rig.queued(at_least=3))
    assert Counter(found) == {created.head.change_id: 1, done.head.change_id: 2}


async def test_marked_claim_cannot_be_taken_back(
    rig: VhostRail,
) -> None:
    change, _ = await rig.claim(rig.creation())
    (member,) = await stale_claims(rig)
    assert await rig.mirror.mark(member) is not None
    assert await rig.mirror.take_back(change) is False
    other, _ = await rig.claim(rig.creation())
    assert await rig.mirror.take_back(other) is True
    assert await rig.mirror.take_back(other) is False


async def test_claim_of_a_lost_mirror_is_dropped_and_not_finished(servers: Servers, vhost: Vhost) -> None:
    """The mirror is restored from an older copy. After the copy was made, the claim may have been taken back with a
    503."""
    redis = await asyncio.to_thread(servers.extra_redis)
    rig = await vhost.instance(redis=redis)
    created = await rig.rail.commit(rig.creation())
    left, reply = await rig.claim(rig.update(created, notes="taken back"))
    assert isinstance(reply, Claimed)
    await asyncio.to_thread(redis.stop)
    await asyncio.to_thread(redis.start)
    await eventually(lambda: reachable(rig), what="a mirror that answers again")
    (member,) = await stale_claims(rig)
    # The claim is not taken back: a claim finisher whose mark the restore lost would continue with it.
    assert await rig.mirror.take_back(left) is False
    assert await rig.mirror.mark(member) is None
    assert await rig.server.claims(rig.restaurant) == []
    await rig.server.warm()
    won = await rig.rail.commit(rig.update(created, notes="won"))
    assert (won.head.version, won.state.notes) == (2, "won")
    await asyncio.to_thread(redis.discard)


async def reachable(rig: VhostRail) -> bool:
    try:
        await rig.mirror.check()
        return True
    except Exception:
        return False


# -- brokers ---------------------------------------------------------------------------------------------------


async def test_publish_without_an_answer_is_journaled_and_arrives_twice_as_one_change(
    servers: Servers, rig: VhostRail, vhost: Vhost
) -> None:
    async with vhost.frozen(servers.rabbitmq) as brief:
        done = await brief.rail.commit(rig.creation())
        assert (done.durability, done.visible) == (Durability.JOURNAL, True)
        assert await rig.read(done.state.id) == (done.head, done.state)
        assert [change.id for change in await brief.journaled()] == [done.head.change_id]
        # Nothing is sent until there is a new connection, so a second commit does not wait for a timeout.
        assert not brief.publisher.connected
        with pytest.raises(NotSent):
            await brief.publisher.publish(Lane.CRITICAL, b"[]")
        second = await brief.rail.commit(rig.creation())
        assert second.durability is Durability.JOURNAL
    assert brief.drainer
    brief.drainer.start()
    await drained(brief)
    found: Counter[str] = Counter()

    async def twice() -> bool:
        found.update(ids(await rig.queued()))
        return found[done.head.change_id] >= 2 and found[second.head.change_id] >= 1

    await eventually(twice, what="the late publish and the drained ones")
    assert set(found) == {done.head.change_id, second.head.change_id}


async def drained(rig: VhostRail) -> None:
    await eventually(rig.journaled, within=30, what="an empty journal", until=lambda left: not left)


async def test_nack_of_one_full_queue_sends_the_change_to_the_journal(rig: VhostRail) -> None:
    async with await aio_pika.connect(rig.url) as connection:
        channel = await connection.channel()
        arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"}
        full = await channel.declare_queue("full", durable=True, arguments=arguments)
        await full.bind(await channel.get_exchange(topology.CHANGES), Lane.CRITICAL.value)

        async def refused() -> bool:
            return (await rig.rail.commit(rig.creation())).durability is Durability.JOURNAL

        await eventually(refused, what="a nack")  # a quorum queue accepts a few messages beyond its bound
        done = await rig.rail.commit(rig.creation())
        assert (done.durability, done.visible) == (Durability.JOURNAL, True)
        assert rig.publisher.connected  # a nack leaves the connection usable

        # The queue still has earlier changes. A nack may arrive before the other queues have their copy.
        async def taken() -> list[str]:
            return ids(await rig.queued())

        def has_change(found: list[str]) -> bool:
            return done.head.change_id in found

        await eventually(taken, what="the copy of the lane", until=has_change)
        await channel.queue_delete("full")
    assert rig.drainer
    rig.drainer.start()
    await drained(rig)
    await eventually(taken, what="the change from the journal", until=has_change)


async def test_unroutable_change_goes_to_the_journal(rig: VhostRail) -> None:
    async with await aio_pika.connect(rig.url) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(topology.CHANGES)
        for name in (LANE, topology.LOG):
            await (await channel.get_queue(name, ensure=False)).unbind(exchange, Lane.CRITICAL.value)
        done = await rig.rail.commit(rig.creation())
        assert done.durability is Durability.JOURNAL
        assert [change.id for change in await rig.journaled()] == [done.head.change_id]


async def test_commit_without_broker_and_with_full_journal_is_unavailable_and_removes_its_claim(
    vhost: Vhost,
) -> None:
    rig = await vhost.instance(publisher=False, journal_bytes=10)
    draft = rig.creation()
    with pytest.raises(Unavailable) as refused:
        await rig.rail.commit(draft)
    unrecorded = refused.value.__cause__
    assert isinstance(unrecorded, Unrecorded)
    assert isinstance(unrecorded.__cause__, JournalFull)
    assert await rig.server.claims(rig.restaurant) == []
    assert await rig.read(draft.state.id) is None
    await rig.publisher.start(wait=10)
    done = await rig.rail.commit(draft)  # the refused change may be tried again
    assert ids(await rig.queued(at_least=1)) == [done.head.change_id]


async def test_commit_without_broker_and_journal_is_unavailable_and_frees_the_version(vhost: Vhost) -> None:
    rig = await vhost.instance(journal_bytes=0)
    created = await rig.rail.commit(rig.creation())
    await rig.publisher.stop()
    with pytest.raises(Unavailable):
        await rig.rail.commit(rig.update(created, notes="refused"))
    assert await rig.server.claims(rig.restaurant) == []
    await rig.publisher.start(wait=10)
    done = await rig.rail.commit(rig.update(created, notes="taken"))
    assert done.head.version == 2
    assert set(ids(await rig.queued(at_least=2))) == {created.head.change_id, done.head.change_id}


async def test_unconfirmed_publish_with_broken_journal_is_outcome_unknown_and_keeps_the_claim(
    rig: VhostRail, vhost: Vhost, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(entries: Any) -> None:
        raise JournalBroken("the disk is gone")

    async with vhost.frozen(servers.rabbitmq) as brief:
        monkeypatch.setattr(brief.journal, "append", broken)
        with pytest.raises(OutcomeUnknown):
            await brief.rail.commit(rig.creation())
    await stale_claims(rig)  # the next writer or the claim finisher finishes the claim
    (left,) = await rig.mark_stale()
    await asyncio.wait_for(rig.publisher.wait_connected(), 60)
    await rig.rail.claim_finisher.finish(left)
    assert set(ids(await rig.queued(at_least=2))) == {left.change_id}


# -- mirrors ---------------------------------------------------------------------------------------------------


async def test_claim_on_a_frozen_mirror_is_outcome_unknown_and_an_open_breaker_is_unavailable(
    rig: VhostRail, vhost: Vhost, servers: Servers
) -> None:
    created = await rig.rail.commit(rig.creation())
    draft = rig.update(created, notes="doubtful")
    async with vhost.frozen(servers.redis) as brief:
        with pytest.raises(OutcomeUnknown):
            await brief.rail.commit(draft)
        with pytest.raises(Unavailable):
            await brief.rail.commit(rig.update(created, notes="refused"))
    # The server runs the sent script when it wakes. The script claims nothing, because it runs too late.
    await eventually(lambda: reachable(rig), what="a mirror that answers again")
    assert await rig.server.claims(rig.restaurant) == []
    head, _ = await rig.read(created.state.id) or pytest.fail("the mirror lacks the order")
    assert head.version == 1
    again = await rig.rail.commit(draft)
    assert again.head.version == 2


async def test_creation_on_a_frozen_mirror_takes_a_number_of_the_instance(
    rig: VhostRail, vhost: Vhost, servers: Servers
) -> None:
    async with vhost.frozen(servers.redis) as brief:
        done = await brief.creations.create(rig.creation())
        assert isinstance(done, Committed)
        assert done.state.order_number == f"J{brief.number}-0001"
        assert (done.durability, done.visible) == (Durability.BROKER, False)
    (message,) = await rig.queued(at_least=1)
    assert [(change.id, ORDER.decode_state(bytes(change.data.after))) for change in message] == [
        (done.head.change_id, done.state)
    ]
    await eventually(lambda: reachable(rig), what="a mirror that answers again")
    # The sent claim ran too late and left nothing to finish, so there is no second creation.
    assert await rig.server.claims(rig.restaurant) == []


async def test_creation_whose_claim_may_exist_is_outcome_unknown(
    rig: VhostRail, vhost: Vhost, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen mirror may have executed the claim. The instance can neither journal the creation nor reserve a number
    for it, but it must not report that nothing was done."""

    async def broken(*_: Any) -> Any:
        raise JournalBroken("the disk is gone")

    async with vhost.frozen(servers.redis) as brief:
        monkeypatch.setattr(brief.journal, "append", broken)
        monkeypatch.setattr(brief.journal, "reserve_numbers", broken)
        with pytest.raises(OutcomeUnknown):
            await brief.creations.create(rig.creation())


async def test_cold_mirror_takes_creations_and_refuses_updates(rig: VhostRail) -> None:
    created = await rig.rail.commit(rig.creation())
    await rig.server.cool()
    done, again = [await rig.creations.create(rig.creation()) for _ in range(2)]
    assert isinstance(done, Committed)
    assert [done.state.order_number, again.state.order_number] == ["J1-0001", "J1-0002"]
    assert done.visible and await rig.read(done.state.id) == (done.head, done.state)
    with pytest.raises(Unavailable):
        await rig.rail.commit(rig.update(created, notes="refused"))
    await rig.server.warm()
    assert (await rig.rail.commit(rig.update(created, notes="taken"))).head.version == 2


async def test_creation_on_a_cold_mirror_keeps_the_number_that_it_brings(rig: VhostRail) -> None:
    await rig.server.cool()
    draft = rig.creation()
    draft.state = structs.replace(draft.state, order_number="till-4711")
    done = await rig.creations.create(draft)
    assert done.state.order_number == "till-4711"
    (message,) = await rig.queued(at_least=1)
    assert [ORDER.decode(change).order_number for change in message] == ["till-4711"]


async def test_repeated_creation_on_a_cold_mirror_finds_the_first_one(rig: VhostRail) -> None:
    created = await rig.rail.commit(rig.creation())
    await rig.server.cool()
    again = await rig.creations.create(keyed(rig, created.state.id))
    assert again == Standing(created.head, created.state, encode(created.state))


def keyed(rig: VhostRail, id_: str) -> Draft:
    draft = rig.creation(id=id_)
    draft.keyed = True
    return draft


async def test_repeated_creation_without_a_mirror_gets_the_first_one_from_the_same_instance(
    rig: VhostRail, vhost: Vhost, servers: Servers
) -> None:
    """Neither store has the order yet, so only the memory of the instance has it."""
    id_ = builders.new_id()
    async with vhost.frozen(servers.redis) as brief:
        outcomes = await asyncio.gather(*(brief.creations.create(keyed(rig, id_)) for _ in range(5)))
        [made] = [one for one in outcomes if isinstance(one, Committed)]
        again = await brief.creations.create(keyed(rig, id_))
        others = [one for one in outcomes if one is not made]
        assert [*others, again] == [Standing(made.head, made.state, encode(made.state))] * 5
    assert ids(await rig.queued(at_least=1)) == [made.head.change_id]


async def test_repeat_waits_for_the_first_request_in_another_instance(vhost: Vhost) -> None:
    rig = await vhost.instance(stale_seconds=60.0)
    first = keyed(rig, builders.new_id())
    change, _ = await rig.claim(first)
    repeat = asyncio.create_task(rig.creations.create(keyed(rig, first.state.id)))
    await rig.record(change)
    await rig.reveal(change)
    assert (await repeat).head == change.head


async def test_repeat_gives_up_when_the_first_request_takes_too_long(rig: VhostRail, vhost: Vhost) -> None:
    other = await vhost.instance(stale_seconds=60.0)
    first = keyed(rig, builders.new_id())
    await other.claim(first)
    at = 0.0

    async def passes(_: float) -> None:
        nonlocal at
        at += 1.0

    repeats = Creations(other.rail, Heads(other.mirror, no_postgres), clock=lambda: at, sleep=passes)
    with pytest.raises(ClaimLost) as lost:
        await repeats.create(keyed(rig, first.state.id))
    assert lost.value.head is None and at > 4


class AskingMirror(Mirror):
    """A mirror that does not know all keys yet."""

    claims = 0

    async def claim(self, *arguments: Any, **named: Any) -> Any:
        self.claims += 1
        return Ask() if self.claims == 1 else await super().claim(*arguments, **named)


@pytest.mark.parametrize("known", [True, False], ids=["PostgreSQL has it", "PostgreSQL is away"])
async def test_mirror_that_asks_gets_its_claim_after_one_look(rig: VhostRail, known: bool) -> None:
    draft = keyed(rig, builders.new_id())
    earlier = Standing(change_of(draft).head, draft.state, b"")
    looks = 0

    class Stores:
        async def earlier(self, *_: Any) -> Standing | None:
            nonlocal looks
            looks += 1
            if not known:
                raise Unavailable("away")
            return earlier

    mirror = AskingMirror(rig.server.url, timeout=5.0, stale_seconds=1.0)
    asking = RailRig(
        Settings(_env_file=None), rig.server, restaurant=rig.restaurant, mirror=mirror, broker=MemoryBroker()
    )
    done = await Creations(asking.rail, Stores()).create(draft)
    assert looks == 1
    if known:
        assert (done, mirror.claims) == (earlier, 1)
    else:
        assert isinstance(done, Committed) and (done.state.order_number, mirror.claims) == ("0001", 2)
    await mirror.close()


async def test_commit_continues_after_its_caller_is_cancelled(rig: VhostRail) -> None:
    draft = rig.creation()
    caller = asyncio.create_task(rig.rail.commit(draft))
    # Lets the commit start.
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await rig.rail.drain()
    assert [change.entity_id for (change,) in await rig.queued(at_least=1)] == [draft.state.id]
    assert await rig.read(draft.state.id) is not None


async def test_fork_after_a_lost_mirror_ends_the_same_in_any_order_of_arrival(rig: VhostRail) -> None:
    created = await rig.rail.commit(rig.creation())
    forked = [change_of(rig.update(created, notes=notes)) for notes in ("one", "two")]
    for order in (forked, forked[::-1], forked + forked):
        for change in order:
            await rig.reveal(change)
        head, _ = await rig.read(created.state.id) or pytest.fail("the mirror lacks the order")
        assert head == max(change.head for change in forked)


async def test_version_is_free_after_its_claim_is_taken_back(vhost: Vhost) -> None:
    rig = await vhost.instance(stale_seconds=60.0)
    created = await rig.rail.commit(rig.creation())
    taken, _ = await rig.claim(rig.update(created, notes="one"))
    other = rig.update(created, notes="two")
    assert isinstance((await rig.claim(other))[1], Busy)
    await rig.mirror.take_back(taken)
    assert isinstance((await rig.claim(other))[1], Claimed)


async def test_unreadable_state_is_refused_before_it_is_claimed(rig: VhostRail) -> None:
    """The constructor of a state checks nothing, so the commit must refuse a state that readers cannot decode."""
    draft = rig.creation(customer_name="x" * 201)
    with pytest.raises(InvalidInput):
        await rig.rail.commit(draft)
    assert await rig.read(draft.state.id) is None


@pytest.mark.parametrize("overtaken", [0, 2])
async def test_change_knows_the_version_that_it_becomes(vhost: Vhost, overtaken: int) -> None:
    """Other changes come between the read and the claim, so the change is built again for a later version."""
    rig, other = [await vhost.instance(stale_seconds=60.0) for _ in range(2)]
    last = await rig.rail.commit(rig.creation())

    class Overtaken(Heads):
        async def head(self, *args: Any) -> Standing | None:
            nonlocal last
            found = await super().head(*args)
            if last.head.version <= overtaken:
                last = await other.rail.commit(other.update(last, notes="first"))
            return found

    told: list[int] = []

    def change(state: Any, at: datetime, version: int) -> tuple[str, Any]:
        told.append(version)
        return "updated", structs.replace(state, notes=f"version {version}", updated_at=at)

    changes = EntityChanges(rig.rail, Overtaken(rig.mirror, no_postgres))
    staff = Identity(builders.new_id(), Role.STAFF, rig.restaurant)
    receipt = await changes.change(staff, ORDER, last.state.id, None, change)
    assert told == [*range(2, 3 + overtaken)]
    assert (receipt.head.version, receipt.state.notes) == (told[-1], f"version {told[-1]}")
