"""The stock that orders hold: the scripts on a real Redis, compared with the result of a real PostgreSQL."""

import itertools
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from random import Random

import pytest
from msgspec import structs

from shared.entities.inventory_item import ENTITY as ITEM
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import OrderStatus, StockHold
from shared.mirror import keys
from shared.mirror.mirror import Claimed, LogState, Mirror, StockShort, stock_text
from shared.rail.draft import change_of
from tests.rigs import builders
from tests.rigs.postgres_writer import MakeRig
from tests.rigs.servers import Redis, Servers
from tests.rigs.stock import EPOCH, Kitchen, Shelf, applied

_SEEDS = 25


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because its tests wipe it."""
    return servers.extra_redis()


@pytest.fixture
async def mirror(redis: Redis) -> AsyncIterator[Mirror]:
    """A warm mirror on which every claim is stale at once."""
    mirror = Mirror(redis.url, timeout=5.0, stale_seconds=0.0)
    await mirror.begin_log(LogState(EPOCH, -1))
    assert await mirror.warm(LogState(EPOCH, -1), [], 0)
    yield mirror
    await mirror.close()


@pytest.fixture
async def shelf(mirror: Mirror) -> Shelf:
    return Shelf(mirror)


# -- accepting ---------------------------------------------------------------------------------------------------


async def test_claim_beyond_the_stock_is_refused_lists_what_is_left_and_holds_nothing(shelf: Shelf) -> None:
    dough, cheese, basil = [await shelf.counted(n) for n in (5, 3, 100)]
    await shelf.put(ORDER, shelf.order((dough, 3), (cheese, 1)))
    _, reply = await shelf.claim(shelf.draft(ORDER, shelf.order((dough, 3), (basil, 1), (cheese, 9))))
    assert reply == StockShort(((dough, 2), (cheese, 2)))
    assert [await shelf.left(one) for one in (dough, cheese, basil)] == [2, 2, 100]
    await shelf.put(ORDER, shelf.order((dough, 2), (cheese, 2)))
    assert [await shelf.left(one) for one in (dough, cheese)] == [0, 0]


async def test_claim_reserves_before_its_reveal_and_once_however_often_it_is_sent(shelf: Shelf) -> None:
    dough = await shelf.counted(5)
    draft = shelf.draft(ORDER, shelf.order((dough, 3)))
    for _ in range(3):
        change, reply = await shelf.claim(draft)
        assert isinstance(reply, Claimed)
        assert await shelf.left(dough) == 2
    for _ in range(3):
        await shelf.mirror.apply([applied(change)])
        assert await shelf.left(dough) == 2
    assert await shelf.entries(dough) == {draft.state.id: stock_text(ORDER, draft.state).partition("=")[2]}


async def test_claim_that_is_taken_back_returns_its_own_holds_and_keeps_those_of_the_order(shelf: Shelf) -> None:
    dough, cheese = await shelf.counted(10), await shelf.counted(10)
    base = await shelf.put(ORDER, shelf.order((dough, 3)))
    more = structs.replace(base[1], holds=(StockHold(dough, 3), StockHold(dough, 4), StockHold(cheese, 2)))
    change, reply = await shelf.claim(shelf.draft(ORDER, more, base))
    assert isinstance(reply, Claimed)
    assert (await shelf.left(dough), await shelf.left(cheese)) == (3, 8)
    assert await shelf.mirror.take_back(change)
    assert not await shelf.mirror.take_back(change)
    assert (await shelf.left(dough), await shelf.left(cheese)) == (7, 10)


async def test_stock_that_a_change_returns_is_free_at_the_reveal_and_not_before(shelf: Shelf) -> None:
    dough = await shelf.counted(5)
    base = await shelf.put(ORDER, shelf.order((dough, 5)))
    change, _ = await shelf.claim(shelf.draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 1),)), base))
    assert isinstance((await shelf.claim(shelf.draft(ORDER, shelf.order((dough, 1)))))[1], StockShort)
    await shelf.mirror.apply([applied(change)])
    assert await shelf.left(dough) == 4


async def test_stale_claim_holds_its_stock_until_it_is_finished(shelf: Shelf) -> None:
    dough = await shelf.counted(5)
    draft = shelf.draft(ORDER, shelf.order((dough, 4)))
    await shelf.claim(draft)
    assert (await shelf.claim(shelf.draft(ORDER, shelf.order((dough, 2)))))[1] == StockShort(((dough, 1),))
    await shelf.finish_all()
    assert await shelf.left(dough) == 1
    assert list(await shelf.entries(dough)) == [draft.state.id]


@pytest.mark.parametrize("by", ["mark", "claim"])
async def test_dropped_claim_of_a_lost_mirror_returns_its_stock(shelf: Shelf, by: str) -> None:
    dough = await shelf.counted(5)
    order = shelf.order((dough, 4))
    await shelf.claim(shelf.draft(ORDER, order))
    await shelf.mirror._redis.call("HSET", keys.claim(shelf.restaurant, "order", order.id), "server", "0" * 40)
    if by == "mark":
        assert await shelf.mirror.mark(keys.member(shelf.restaurant, "order", order.id)) is None
    else:
        await shelf.put(ORDER, structs.replace(order, holds=()))
    assert await shelf.left(dough) == 5


async def test_changed_order_asks_only_for_its_additional_stock(shelf: Shelf) -> None:
    dough = await shelf.counted(5)
    base = await shelf.put(ORDER, shelf.order((dough, 3)))
    six = structs.replace(base[1], holds=(StockHold(dough, 6),))
    assert (await shelf.claim(shelf.draft(ORDER, six, base)))[1] == StockShort(((dough, 5),))
    base = await shelf.put(ORDER, structs.replace(base[1], holds=(StockHold(dough, 5),)), base)
    base = await shelf.put(ORDER, structs.replace(base[1], notes="no more than it has"), base)
    assert await shelf.left(dough) == 0


async def test_uncounted_item_is_never_short_and_a_restored_item_counts_again(
    shelf: Shelf,
) -> None:
    item = shelf.item(2)
    await shelf.put(ORDER, shelf.order((item.id, 1), created_at=item.counted_at + timedelta(hours=1)))
    base = await shelf.put(ITEM, item)
    assert await shelf.left(item.id) == 1
    deleted = await shelf.put(ITEM, structs.replace(item, deleted_at=item.updated_at), base)
    await shelf.put(ORDER, shelf.order((item.id, 7), created_at=item.counted_at + timedelta(hours=1)))
    assert await shelf.mirror.stock(shelf.restaurant, [item.id]) == [None]
    await shelf.put(ITEM, item, deleted)
    assert await shelf.left(item.id) == 2 - 1 - 7


async def test_cold_mirror_does_not_say_what_is_left(shelf: Shelf) -> None:
    dough = await shelf.counted(5)
    await shelf.mirror._redis.call("DEL", keys.WARM)
    assert await shelf.mirror.stock(shelf.restaurant, [dough]) == [None]


# -- returned stock ----------------------------------------------------------------------------------------------


async def test_cancelled_order_returns_its_stock_once_in_any_order_of_its_events(shelf: Shelf) -> None:
    dough = await shelf.counted(10)
    other = await shelf.put(ORDER, shelf.order((dough, 2)))
    base = await shelf.put(ORDER, shelf.order((dough, 3)))
    base = await shelf.put(ORDER, structs.replace(base[1], holds=(StockHold(dough, 5),)), base)
    await shelf.put(ORDER, structs.replace(base[1], status=OrderStatus.CANCELLED), base)
    assert await shelf.left(dough) == 8
    events = [applied(change) for change in shelf.recorded.values()]
    for order in itertools.permutations(events):
        await shelf.mirror.apply([*order, order[0]])
        assert await shelf.left(dough) == 8
    assert list(await shelf.entries(dough)) == [other[1].id]


async def test_superseded_side_of_a_fork_returns_what_the_head_does_not_take(shelf: Shelf) -> None:
    dough, cheese, basil = [await shelf.counted(10) for _ in range(3)]
    base = await shelf.put(ORDER, shelf.order((dough, 1)))
    taken = [((dough, 1), (cheese, 2)), ((basil, 3),)]
    forks = [
        change_of(shelf.draft(ORDER, structs.replace(base[1], holds=tuple(StockHold(*x) for x in one)), base))
        for one in taken
    ]
    superseded, head = sorted(forks, key=lambda one: one.head)
    await shelf.mirror.apply([applied(superseded)])
    await shelf.mirror.apply([applied(head)])
    await shelf.mirror.apply([applied(superseded)])
    found = [await shelf.left(one) for one in (dough, cheese, basil)]
    assert found == ([10, 10, 7] if head is forks[1] else [9, 8, 10])


async def test_claim_that_loses_to_a_fork_holds_nothing(shelf: Shelf) -> None:
    dough = await shelf.counted(10)
    base = await shelf.put(ORDER, shelf.order((dough, 1)))
    mine, reply = await shelf.claim(
        shelf.draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 9),), notes="mine"), base)
    )
    assert isinstance(reply, Claimed)
    yours = change_of(shelf.draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 2),)), base))
    yours = structs.replace(yours, id=f"ffffffff{yours.id[8:]}")
    await shelf.mirror.apply([applied(yours)])
    assert await shelf.left(dough) == 8
    await shelf.mirror.apply([applied(mine)])  # its owner reveals it anyway
    assert await shelf.left(dough) == 8


async def test_claimed_change_keeps_its_reservation_when_a_fork_of_its_base_arrives(shelf: Shelf) -> None:
    dough = await shelf.counted(10)
    base = await shelf.put(ORDER, shelf.order((dough, 1)))
    change, _ = await shelf.claim(shelf.draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 6),)), base))
    fork = change_of(shelf.draft(ORDER, shelf.order((dough, 2), id=base[1].id)))
    fork = structs.replace(fork, id=f"ffffffff{fork.id[8:]}")
    await shelf.mirror.apply([applied(fork)])
    assert await shelf.left(dough) == 4
    assert await shelf.mirror.take_back(change)
    assert await shelf.left(dough) == 8


# -- recounts ----------------------------------------------------------------------------------------------------


async def test_recount_includes_earlier_orders_but_not_what_they_take_later(shelf: Shelf) -> None:
    counted = builders.CREATED_AT + timedelta(hours=1)
    item = await shelf.put(ITEM, shelf.item(10))
    base = await shelf.put(ORDER, shelf.order((item[1].id, 4)))
    dough = item[1].id
    await shelf.put(ITEM, structs.replace(item[1], quantity=3, counted_at=counted), item)
    assert await shelf.left(dough) == 3
    later = counted + timedelta(minutes=1)
    much = structs.replace(base[1], holds=(StockHold(dough, 4), StockHold(dough, 4, later)))
    assert (await shelf.claim(shelf.draft(ORDER, much, base)))[1] == StockShort(((dough, 3),))
    more = structs.replace(base[1], holds=(StockHold(dough, 4), StockHold(dough, 2, later)))
    base = await shelf.put(ORDER, more, base)
    assert await shelf.left(dough) == 1
    await shelf.put(ORDER, structs.replace(base[1], status=OrderStatus.CANCELLED), base)
    assert await shelf.left(dough) == 3


async def test_count_and_hold_agree_to_the_microsecond(shelf: Shelf) -> None:
    at = datetime.fromisoformat("2026-03-14T12:30:00.001001+00:00")
    item = await shelf.put(ITEM, shelf.item(10, at))
    dough = item[1].id
    for micros, left in ((-1, 10), (0, 9), (1, 8)):
        await shelf.put(ORDER, shelf.order((dough, 1), created_at=at + timedelta(microseconds=micros)))
        assert await shelf.left(dough) == left


async def test_recount_during_a_claim_neither_drops_its_reservation_nor_counts_it_twice(shelf: Shelf) -> None:
    item = await shelf.put(ITEM, shelf.item(10))
    dough, counted = item[1].id, builders.CREATED_AT + timedelta(hours=1)
    base = await shelf.put(ORDER, shelf.order((dough, 2), created_at=counted + timedelta(minutes=1)))
    change, _ = await shelf.claim(shelf.draft(ORDER, structs.replace(base[1], holds=(StockHold(dough, 5),)), base))
    await shelf.put(ITEM, structs.replace(item[1], quantity=20, counted_at=counted), item)
    assert await shelf.left(dough) == 15
    await shelf.mirror.apply([applied(change)])
    assert await shelf.left(dough) == 15


async def test_order_without_stock_costs_no_additional_redis_commands(shelf: Shelf) -> None:
    async def calls() -> Counter[str]:
        reply = await shelf.mirror._redis.call("INFO", "commandstats")
        lines = [line.partition(":") for line in reply.decode().splitlines() if line.startswith("cmdstat_")]
        return Counter(
            {name.removeprefix("cmdstat_"): int(rest.partition("calls=")[2].split(",")[0]) for name, _, rest in lines}
        )

    before = await calls()
    await shelf.put(ORDER, shelf.order())
    used = await calls() - before
    assert (used["evalsha"], used["hmget"]) == (2, 4)  # the document and the claim, once in `claim` and once in `apply`
    assert not {"hget", "hgetall", "hdel", "hincrby"} & used.keys()


# -- random operations -------------------------------------------------------------------------------------------


async def test_random_operations_leave_the_same_holds_in_mirror_and_postgres(
    make_rig: MakeRig, mirror: Mirror, redis: Redis
) -> None:
    rig = await make_rig(redis_url=redis.url)
    seen: Counter[str] = Counter()
    for seed in range(_SEEDS):
        kitchen = Kitchen(mirror, rig, Random(seed))
        try:
            await kitchen.open()
            for _ in range(60):
                await kitchen.step()
            await kitchen.finish_and_check()
        except BaseException as error:
            error.add_note(f"seed {seed}, after {kitchen.seen.total()} steps")
            raise
        seen += kitchen.seen
    missed = {"short", "dies", "taken back", "not revealed", "left the mirror", "wipe", "fork"} - seen.keys()
    assert not missed, f"never reached: {missed}"
