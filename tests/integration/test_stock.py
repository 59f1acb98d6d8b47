"""The stock that orders hold: the scripts on a real Redis, compared with the result of a real PostgreSQL."""

import itertools
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import pytest
from msgspec import structs

from shared.entities.inventory_item import ENTITY as ITEM
from shared.entities.inventory_item import recount_at
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import OrderStatus, StockHold, next_hold_at
from shared.mirror import keys
from shared.mirror.claim_replies import Claimed, Restamp, StockShort
from shared.mirror.stock_texts import stock_text
from shared.rail.draft import change_of
from shared.rail.outcomes import OutOfStock
from tests.rigs import builders
from tests.rigs.rail.changes import draft
from tests.rigs.servers import Redis, Servers
from tests.rigs.stock import StockRig


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because its tests wipe it."""
    return servers.extra_redis()


@pytest.fixture
async def rig(redis: Redis) -> AsyncIterator[StockRig]:
    rig = StockRig(redis.url)
    await rig.server.warm()
    yield rig
    await rig.down()


# -- accepting ---------------------------------------------------------------------------------------------------


async def test_claim_beyond_the_stock_is_refused_lists_the_stock_left_and_holds_nothing(rig: StockRig) -> None:
    dough, cheese, basil = [await rig.counted(n) for n in (5, 3, 100)]
    await rig.put(ORDER, rig.order((dough, 3), (cheese, 1)))
    _, reply = await rig.claim(draft(ORDER, rig.order((dough, 3), (basil, 1), (cheese, 9))))
    assert reply == StockShort(((dough, 2), (cheese, 2)))
    assert [await rig.left(one) for one in (dough, cheese, basil)] == [2, 2, 100]
    await rig.put(ORDER, rig.order((dough, 2), (cheese, 2)))
    assert [await rig.left(one) for one in (dough, cheese)] == [0, 0]


async def test_claim_reserves_before_its_reveal_and_once_however_often_it_is_sent(rig: StockRig) -> None:
    dough = await rig.counted(5)
    order = rig.order((dough, 3))
    for _ in range(3):
        change, reply = await rig.claim(draft(ORDER, order))
        assert isinstance(reply, Claimed)
        assert await rig.left(dough) == 2
    for _ in range(3):
        await rig.reveal(change)
        assert await rig.left(dough) == 2
    assert await rig.holds(dough) == {order.id: stock_text(ORDER, order).partition("=")[2]}


async def test_claim_that_is_taken_back_returns_its_own_holds_and_keeps_those_of_the_order(rig: StockRig) -> None:
    dough, cheese = await rig.counted(10), await rig.counted(10)
    base = await rig.put(ORDER, rig.order((dough, 3)))
    more = structs.replace(base[1], holds=(StockHold(dough, 3), StockHold(dough, 4), StockHold(cheese, 2)))
    change, reply = await rig.claim(draft(ORDER, more, base))
    assert isinstance(reply, Claimed)
    assert (await rig.left(dough), await rig.left(cheese)) == (3, 8)
    assert await rig.mirror.take_back(change)
    assert not await rig.mirror.take_back(change)
    assert (await rig.left(dough), await rig.left(cheese)) == (7, 10)


async def test_stock_that_a_change_returns_is_free_at_the_reveal_and_not_before(rig: StockRig) -> None:
    dough = await rig.counted(5)
    base = await rig.put(ORDER, rig.order((dough, 5)))
    change, _ = await rig.claim(draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 1),)), base))
    assert isinstance((await rig.claim(draft(ORDER, rig.order((dough, 1)))))[1], StockShort)
    await rig.reveal(change)
    assert await rig.left(dough) == 4


async def test_stale_claim_holds_its_stock_until_it_is_finished(rig: StockRig) -> None:
    dough = await rig.counted(5)
    order = rig.order((dough, 4))
    await rig.claim(draft(ORDER, order))
    assert (await rig.claim(draft(ORDER, rig.order((dough, 2)))))[1] == StockShort(((dough, 1),))
    await rig.finish_stale()
    assert await rig.left(dough) == 1
    assert list(await rig.holds(dough)) == [order.id]


@pytest.mark.parametrize("by", ["mark", "claim"])
async def test_dropped_claim_of_a_lost_mirror_returns_its_stock(rig: StockRig, by: str) -> None:
    dough = await rig.counted(5)
    order = rig.order((dough, 4))
    await rig.claim(draft(ORDER, order))
    await rig.server.claimed_in_former_mirror(rig.restaurant, "order", order.id)
    if by == "mark":
        assert await rig.mirror.mark(keys.member(rig.restaurant, "order", order.id)) is None
    else:
        await rig.put(ORDER, structs.replace(order, holds=()))
    assert await rig.left(dough) == 5


async def test_changed_order_asks_only_for_its_additional_stock(rig: StockRig) -> None:
    dough = await rig.counted(5)
    base = await rig.put(ORDER, rig.order((dough, 3)))
    six = structs.replace(base[1], holds=(StockHold(dough, 6),))
    assert (await rig.claim(draft(ORDER, six, base)))[1] == StockShort(((dough, 5),))
    base = await rig.put(ORDER, structs.replace(base[1], holds=(StockHold(dough, 5),)), base)
    base = await rig.put(ORDER, structs.replace(base[1], notes="no more than it has"), base)
    assert await rig.left(dough) == 0


async def test_uncounted_item_is_never_short_and_a_restored_item_counts_again(rig: StockRig) -> None:
    item = rig.item(2)
    await rig.put(ORDER, rig.order((item.id, 9)))
    base = await rig.put(ITEM, item)
    assert await rig.left(item.id) == 2  # the count is after the order
    deleted = await rig.put(ITEM, structs.replace(base[1], deleted_at=item.updated_at), base)
    await rig.put(ORDER, rig.order((item.id, 7), created_at=item.counted_at + timedelta(hours=1)))
    assert await rig.mirror.stock(rig.restaurant, [item.id]) == [None]
    await rig.put(ITEM, base[1], deleted)
    assert await rig.left(item.id) == 2 - 7


async def test_goods_that_are_sold_already_are_taken_without_a_check(rig: StockRig) -> None:
    dough = await rig.counted(5)
    sold = draft(ORDER, rig.order((dough, 7)))
    sold.sold = True
    await rig.rail.commit(sold)
    assert await rig.left(dough) == -2


async def test_cold_mirror_does_not_show_the_stock_left(rig: StockRig) -> None:
    dough = await rig.counted(5)
    await rig.server.cool()
    assert await rig.mirror.stock(rig.restaurant, [dough]) == [None]


# -- returned stock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancelled", "without a hold"])
async def test_order_that_ends_returns_its_stock_once_in_any_order_of_its_events(rig: StockRig, end: str) -> None:
    dough = await rig.counted(10)
    other = await rig.put(ORDER, rig.order((dough, 2)))
    base = await rig.put(ORDER, rig.order((dough, 3)))
    base = await rig.put(ORDER, structs.replace(base[1], holds=(StockHold(dough, 5),)), base)
    if end == "cancelled":
        ended = builders.with_status(base[1], OrderStatus.CANCELLED)
    else:
        ended = structs.replace(base[1], holds=())
    await rig.put(ORDER, ended, base)
    assert await rig.left(dough) == 8
    for order in itertools.permutations(rig.broker.recorded().values()):
        await rig.reveal(*order, order[0])
        assert await rig.left(dough) == 8
    assert list(await rig.holds(dough)) == [other[1].id]


async def test_superseded_side_of_a_fork_returns_stock_that_the_head_does_not_take(rig: StockRig) -> None:
    dough, cheese, basil = [await rig.counted(10) for _ in range(3)]
    base = await rig.put(ORDER, rig.order((dough, 1)))
    taken = [((dough, 1), (cheese, 2)), ((basil, 3),)]
    forks = [
        change_of(draft(ORDER, structs.replace(base[1], holds=tuple(StockHold(*x) for x in one)), base))
        for one in taken
    ]
    superseded, head = sorted(forks, key=lambda one: one.head)
    await rig.reveal(superseded)
    await rig.reveal(head)
    await rig.reveal(superseded)
    found = [await rig.left(one) for one in (dough, cheese, basil)]
    assert found == ([10, 10, 7] if head is forks[1] else [9, 8, 10])


async def test_claim_that_loses_to_a_fork_holds_nothing(rig: StockRig) -> None:
    dough = await rig.counted(10)
    base = await rig.put(ORDER, rig.order((dough, 1)))
    mine, reply = await rig.claim(
        draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 9),), notes="mine"), base)
    )
    assert isinstance(reply, Claimed)
    yours = change_of(draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 2),)), base))
    yours = structs.replace(yours, id=f"ffffffff{yours.id[8:]}")
    await rig.reveal(yours)
    assert await rig.left(dough) == 8
    await rig.reveal(mine)  # the owner of the lost claim still reveals it
    assert await rig.left(dough) == 8


async def test_claimed_change_keeps_its_reservation_when_a_fork_of_its_base_arrives(rig: StockRig) -> None:
    dough = await rig.counted(10)
    base = await rig.put(ORDER, rig.order((dough, 1)))
    change, _ = await rig.claim(draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 6),)), base))
    fork = change_of(draft(ORDER, rig.order((dough, 2), id=base[1].id)))
    fork = structs.replace(fork, id=f"ffffffff{fork.id[8:]}")
    await rig.reveal(fork)
    assert await rig.left(dough) == 4
    assert await rig.mirror.take_back(change)
    assert await rig.left(dough) == 8


# -- recounts ----------------------------------------------------------------------------------------------------


async def test_recount_includes_earlier_orders_but_not_their_later_holds(rig: StockRig) -> None:
    counted = builders.CREATED_AT + timedelta(hours=1)
    item = await rig.put(ITEM, rig.item(10))
    base = await rig.put(ORDER, rig.order((item[1].id, 4)))
    dough = item[1].id
    await rig.put(ITEM, structs.replace(item[1], quantity=3, counted_at=counted), item)
    assert await rig.left(dough) == 3
    later = counted + timedelta(minutes=1)
    much = structs.replace(base[1], holds=(StockHold(dough, 4), StockHold(dough, 4, later)))
    assert (await rig.claim(draft(ORDER, much, base)))[1] == StockShort(((dough, 3),))
    more = structs.replace(base[1], holds=(StockHold(dough, 4), StockHold(dough, 2, later)))
    base = await rig.put(ORDER, more, base)
    assert await rig.left(dough) == 1
    await rig.put(ORDER, builders.with_status(base[1], OrderStatus.CANCELLED), base)
    assert await rig.left(dough) == 3


async def test_hold_below_the_count_takes_the_time_of_the_count(rig: StockRig) -> None:
    at = datetime.fromisoformat("2026-03-14T12:30:00.001001+00:00")
    item = await rig.put(ITEM, rig.item(10, at))
    dough = item[1].id
    for micros, left, held_at in ((-1, 9, at), (0, 8, None), (1, 7, None)):
        _, order = await rig.put(ORDER, rig.order((dough, 1), created_at=at + timedelta(microseconds=micros)))
        assert order.holds == (StockHold(dough, 1, held_at),)
        assert await rig.left(dough) == left


async def test_order_below_the_counts_of_two_items_takes_from_both(rig: StockRig) -> None:
    at = builders.CREATED_AT
    dough, cheese = [await rig.put(ITEM, rig.item(10, at + timedelta(minutes=n))) for n in (1, 2)]
    ids = dough[1].id, cheese[1].id
    _, order = base = await rig.put(ORDER, rig.order((ids[0], 1), (ids[1], 2), created_at=at))
    assert [await rig.left(one) for one in ids] == [9, 8]
    held = {hold.inventory_item_id: hold.held_at for hold in order.holds}
    assert held[ids[0]] >= dough[1].counted_at and held[ids[1]] >= cheese[1].counted_at
    # The order takes more of both, with a time below the second count of one of them.
    counted = at + timedelta(hours=1)
    await rig.put(ITEM, structs.replace(cheese[1], quantity=20, counted_at=counted), cheese)
    again = next_hold_at(order, at + timedelta(minutes=3))
    more = tuple(StockHold(one, 3, again) for one in ids)
    _, order = await rig.put(ORDER, structs.replace(order, holds=(*order.holds, *more)), base)
    assert [await rig.left(one) for one in ids] == [6, 17]
    assert max(hold.held_at for hold in order.holds if hold.inventory_item_id == ids[1]) >= counted


async def test_count_is_above_every_hold_that_was_claimed_before_it(rig: StockRig) -> None:
    item = await rig.put(ITEM, rig.item(10))
    dough, ahead = item[1].id, builders.CREATED_AT + timedelta(hours=1)
    base = await rig.put(ORDER, rig.order((dough, 2), created_at=ahead))
    more = structs.replace(base[1], holds=(*base[1].holds, StockHold(dough, 3, ahead + timedelta(minutes=1))))
    change, _ = await rig.claim(draft(ORDER, more, base))
    _, counted = await rig.put(ITEM, structs.replace(item[1], quantity=20, counted_at=builders.CREATED_AT), item)
    assert await rig.left(dough) == 15  # the time of the count is that of the last one, so it is no new count
    _, counted = await rig.put(
        ITEM, structs.replace(counted, counted_at=recount_at(counted, builders.CREATED_AT)), (_, counted)
    )
    assert counted.counted_at == ahead + timedelta(minutes=1, microseconds=1)
    assert await rig.left(dough) == 20
    await rig.reveal(change)
    assert await rig.left(dough) == 20


async def test_hold_reaches_a_count_that_is_claimed_and_not_revealed_yet(rig: StockRig) -> None:
    item = await rig.put(ITEM, rig.item(10))
    dough, ahead = item[1].id, builders.CREATED_AT + timedelta(hours=1)
    count = draft(ITEM, structs.replace(item[1], quantity=5, counted_at=ahead), item)
    counted, reply = await rig.claim(count)
    assert isinstance(reply, Claimed)
    order = rig.order((dough, 2))
    assert (await rig.claim(draft(ORDER, order)))[1] == Restamp({dough: ahead})
    _, order = await rig.put(ORDER, order)
    await rig.reveal(counted)
    assert await rig.left(dough) == 3
    # A count that is taken back is forgotten.
    later = draft(
        ITEM, structs.replace(count.state, counted_at=ahead + timedelta(hours=1)), (counted.head, count.state)
    )
    taken_back, _ = await rig.claim(later)
    assert await rig.mirror.take_back(taken_back)
    assert isinstance((await rig.claim(draft(ORDER, rig.order((dough, 1), created_at=ahead))))[1], Claimed)


async def test_count_by_a_host_whose_clock_is_ahead_includes_later_sales_of_other_hosts(rig: StockRig) -> None:
    now, ahead = builders.CREATED_AT, builders.CREATED_AT + timedelta(hours=1)
    base = await rig.put(ITEM, rig.item(9, now))
    dough = base[1].id
    base = await rig.put(ITEM, structs.replace(base[1], quantity=5, counted_at=ahead, updated_at=ahead), base)

    async def sold() -> int:
        _, order = await rig.put(ORDER, rig.order((dough, 1), created_at=now, updated_at=now))
        return int(order.holds[0].quantity)

    assert [await sold() for _ in range(5)] == [1] * 5
    assert await rig.left(dough) == 0
    with pytest.raises(OutOfStock):
        await sold()
    # A host whose clock is right counts again.
    counted_at = recount_at(base[1], now)
    await rig.put(ITEM, structs.replace(base[1], quantity=3, counted_at=counted_at, updated_at=ahead), base)
    assert await rig.left(dough) == 3
    assert [await sold() for _ in range(3)] == [1] * 3
    assert await rig.left(dough) == 0


async def test_order_without_stock_costs_no_additional_redis_commands(rig: StockRig) -> None:
    async def calls() -> Counter[str]:
        reply = await rig.server.call("INFO", "commandstats")
        lines = [line.partition(":") for line in reply.decode().splitlines() if line.startswith("cmdstat_")]
        return Counter(
            {name.removeprefix("cmdstat_"): int(rest.partition("calls=")[2].split(",")[0]) for name, _, rest in lines}
        )

    await rig.mirror.check()  # a new connection runs other scripts
    before = await calls()
    await rig.put(ORDER, rig.order())
    used = await calls() - before
    # Each script call reads the document and the claim once. The claim also reads the stamp, and the reveal reads the
    # last number of the series.
    assert (used["evalsha"], used["hmget"], used["hget"]) == (2, 5, 1)
    assert not {"hgetall", "hdel", "hincrby"} & used.keys()
