"""The stock that orders hold under random operations: the mirror on a real Redis, compared with a real PostgreSQL."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from random import Random
from typing import Any

from msgspec import structs

from services.orders.pricing import holds
from services.sync.ledger.ledger_loop import LedgerLoop
from services.sync.maintenance.reconciler import Reconciler
from shared.entities.contract import Change, now
from shared.entities.entity import Entity
from shared.entities.inventory_item import ENTITY as ITEM
from shared.entities.inventory_item import InventoryItem, recount_at
from shared.entities.menu_item import Consumption
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import Order, OrderItem, OrderStatus, held_again, next_hold_at
from shared.mirror.claim_replies import Claimed, HeadMoved, Restamp, Stale, StockShort
from shared.mirror.mirror import NOTHING_APPLIED
from shared.mirror.stock_texts import Stock
from shared.postgres import states
from tests.rigs import builders
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.rail.changes import State, draft
from tests.rigs.rail.clock import Clock
from tests.rigs.rail.sinks import PostgresTables, mirror_writer, read_again
from tests.rigs.servers import Servers
from tests.rigs.stock import StockRig

_SEEDS = 25
_STEPS = 60
_FINAL_STATUSES = (OrderStatus.COMPLETED, OrderStatus.CANCELLED)
_ONE_MESSAGE = 15


class RandomStock(StockRig):
    """Takes random steps on a clock that starts 14 days ago: changes are lost, repeated or late, the owner of a claim
    may die, and the clocks of the hosts differ by an hour."""

    def __init__(self, redis_url: str, postgres_rig: Rig, chance: Random) -> None:
        super().__init__(redis_url)
        self.chance = chance
        self.clock = Clock(now() - timedelta(days=14))
        self.items: list[str] = []
        self.orders: list[str] = []
        self.menu: dict[str, Any] = {}
        self.seen: Counter[str] = Counter()
        settings, self.pool = postgres_rig.settings, postgres_rig.postgres
        self.tables = PostgresTables(self.pool, self.mirror)
        self.writer = mirror_writer(settings, self.mirror, postgres=self.pool)
        ledger = LedgerLoop(settings, self.pool, postgres_rig.publisher)
        self.reconciler = Reconciler(settings, self.pool, self.mirror, self.rail, ledger)
        self.state = NOTHING_APPLIED

    async def open(self) -> None:
        await self.empty_mirror()
        await self.server.warm(self.state)
        for _ in range(3):
            _, item = await self.put(ITEM, self.item(self.chance.randrange(3, 12), self.clock.now()))
            self.items.append(item.id)
        for n, needs in enumerate(((0,), (0, 1), (1, 2))):
            consumes = tuple(Consumption(self.items[item], n + 1) for item in needs)
            dish = builders.menu_item(restaurant_id=self.restaurant, consumes=consumes)
            self.menu[dish.id] = dish

    async def empty_mirror(self) -> None:
        await self.server.wipe()
        await self.mirror.keep_restaurant(self.restaurant, b"")

    def recorded(self) -> list[Change]:
        return list(self.broker.recorded().values())

    def shuffled(self) -> list[Change]:
        recorded = self.recorded()
        return self.chance.sample(recorded, k=len(recorded))

    async def read_log(self, changes: Sequence[Change]) -> None:
        """The mirror writer takes the changes in messages."""
        starts = range(0, len(changes), _ONE_MESSAGE)
        messages = [builders.message(*changes[start : start + _ONE_MESSAGE]) for start in starts]
        await read_again(self.writer, messages, self.state)

    # -- steps -------------------------------------------------------------------------------------------------

    async def step(self) -> None:
        self.clock.move(hours=self.chance.choice((0, 0, 1, 13)), microseconds=self.chance.randrange(3))
        moves: dict[Callable[[], Any], int] = {
            self.place: 6,
            self.change_order: 15,
            self.change_item: 6,
            self.fork: 2,
            self.finish_stale: 2,
            self.log_repeats: 3,
            self.write: 3,
            self.trim: 2,
            self.wipe: 1,
        }
        (move,) = self.chance.choices(list(moves), list(moves.values()))
        self.seen[move.__name__] += 1
        await move()

    def host_time(self) -> datetime:
        """The clock of the host that serves a request."""
        return self.clock.now() + timedelta(hours=self.chance.choice((0, 0, 0, -1, 1)))

    async def place(self) -> None:
        items, at = self.dishes(), self.host_time()
        order = self.order(created_at=at, updated_at=at, request_hash=self.chance.choice((None, "ab")))
        self.orders.append(order.id)
        await self.attempt(ORDER, structs.replace(order, items=items, holds=holds(items, self.menu)), None)

    async def change_order(self) -> None:
        def becomes(order: Order) -> Order:
            at, kind = self.host_time(), self.chance.choice(("items", "status", "existence"))
            if order.deleted_at is not None:
                return structs.replace(order, deleted_at=None, holds=held_again(order, at))
            if order.status in _FINAL_STATUSES or kind == "existence":
                return structs.replace(order, deleted_at=at)
            if kind == "status":
                return builders.with_status(order, self.chance.choice((OrderStatus.RECEIVED, *_FINAL_STATUSES)))
            items = self.dishes()
            return structs.replace(
                order, items=items, holds=holds(items, self.menu, order.holds, next_hold_at(order, at))
            )

        if self.orders:
            await self.change(ORDER, self.chance.choice(self.orders), becomes)

    async def change_item(self) -> None:
        def becomes(item: InventoryItem) -> InventoryItem:
            at, kind = self.host_time(), self.chance.choice(("count", "count", "count", "goods", "goods", "existence"))
            if kind == "count":
                return structs.replace(item, quantity=self.chance.randrange(12), counted_at=recount_at(item, at))
            if kind == "goods":
                return structs.replace(item, quantity=item.quantity + self.chance.randrange(1, 9))
            return structs.replace(item, deleted_at=None if item.deleted_at else at)

        await self.change(ITEM, self.chance.choice(self.items), becomes)

    async def fork(self) -> None:
        """Records another change of a taken version, as a lost mirror allows."""
        if changes := [one for one in self.recorded() if one.entity == ORDER.name]:
            taken, items, at = self.chance.choice(changes), self.dishes(), self.clock.now()
            state = ORDER.decode(taken)
            state = structs.replace(
                state, items=items, holds=holds(items, self.menu, state.holds[:1], at), updated_at=at
            )
            other = builders.change(state, entityversion=taken.entityversion, time=taken.time)
            await self.record(other)
            if self.chance.random() < 0.7:
                await self.read_log([other])

    async def log_repeats(self) -> None:
        """The mirror writer reads some changes again, in any order and any number of times."""
        await self.read_log(self.chance.choices(self.recorded(), k=8))

    async def write(self) -> None:
        await self.tables.take(self.chance.choices(self.recorded(), k=8))

    async def trim(self) -> None:
        """Finished orders leave the mirror once PostgreSQL has them; their holds stay."""
        await self.tables.take(self.recorded())
        self.seen["left the mirror"] += await self.reconciler.trim()

    async def wipe(self) -> None:
        """Empties the mirror, claims included. The mirror writer fills it from PostgreSQL, then from the log."""
        await self.write()
        await self.empty_mirror()
        server, _ = await self.mirror.server()
        self.state = (await self.writer.warm_up.fill(server, time.monotonic())).position
        await self.read_log(self.shuffled())
        await self.server.warm(self.state)
        await self.assert_stock_matches_heads()

    # -- a change ----------------------------------------------------------------------------------------------

    async def change(self, entity: Entity, id_: str, becomes: Callable[[Any], Any]) -> None:
        """Attempts to change an entity to the state that `becomes` returns."""
        base = await self.read(id_, entity) or await self.tables.find(entity, self.restaurant, id_)
        if base:
            await self.attempt(entity, structs.replace(becomes(base[1]), updated_at=self.clock.now()), base)

    async def attempt(self, entity: Entity, state: Any, base: State | None) -> None:
        attempted = draft(entity, state, base)
        change, reply = await self.claim(attempted)
        if isinstance(reply, Restamp):
            self.seen["restamp"] += 1
            attempted.state = state = entity.restamp(state, attempted.before, reply.stamps)
            change, reply = await self.claim(attempted)
        match reply:
            case StockShort(left):
                self.seen["short"] += 1
                if base is None:
                    assert left == tuple([(item, max(0, await self.left(item))) for item, _ in left])
                return
            case Stale():
                await self.rail.claim_finisher.finish(reply)
                return
            case HeadMoved():
                return
        assert isinstance(reply, Claimed), reply
        if base is None:
            for one in await self.mirror.stock(self.restaurant, [hold.inventory_item_id for hold in state.holds]):
                assert one is None or one[0] >= one[1]
        how = self.chance.choice(("well", "well", "well", "well", "twice", "dies", "not revealed", "taken back"))
        self.seen[how] += 1
        if how == "taken back":
            assert await self.mirror.take_back(change)
        elif how != "dies":
            if how == "twice":
                assert isinstance((await self.claim(attempted))[1], Claimed)
            await self.record(change)
            if how != "not revealed":
                await self.reveal(*[change] * (2 if how == "twice" else 1))

    def dishes(self) -> tuple[OrderItem, ...]:
        chosen = self.chance.sample(list(self.menu), k=self.chance.randrange(3))
        return tuple(builders.item(menu_item_id=dish, quantity=self.chance.randrange(1, 3)) for dish in chosen)

    # -- the expected stock ------------------------------------------------------------------------------------

    def expected(self) -> dict[str, tuple[InventoryItem, int]]:
        """Returns {item id: (item, quantity that orders hold)} of the heads of all recorded changes, computed without
        the code under test."""
        heads = {change.entity_id: change for change in sorted(self.recorded(), key=lambda one: one.head)}.values()
        orders = [ORDER.decode(one) for one in heads if one.entity == ORDER.name]
        items = [ITEM.decode(one) for one in heads if one.entity == ITEM.name]
        return {item.id: (item, sum(_held_by(order, item) for order in orders)) for item in items}

    async def assert_stock_matches_heads(self) -> None:
        """Asserts that the stock in the mirror follows from the heads of all items and orders."""
        for id_, (item, held) in self.expected().items():
            found = await self.mirror.stock(self.restaurant, [id_])
            assert found == [None if item.deleted_at else Stock(item.quantity, held, item.counted_at)]
            assert not [holder for holder in await self.holds(id_) if holder.endswith("+")]

    async def finish_and_check(self) -> None:
        """Finishes all claims, applies and writes every change; asserts the same stock in the mirror and PostgreSQL."""
        await self.finish_stale()
        await self.read_log(self.shuffled())
        await self.assert_stock_matches_heads()
        await self.tables.take(self.recorded())
        expected = self.expected()
        async with self.pool.connection() as connection:
            held = await states.held(
                connection, self.restaurant, {id_: item.counted_at for id_, (item, _) in expected.items()}
            )
        assert {id_: held.get(id_, 0) for id_ in expected} == {id_: held for id_, (_, held) in expected.items()}


def _held_by(order: Order, item: InventoryItem) -> int:
    if order.status is OrderStatus.CANCELLED or order.deleted_at is not None:
        return 0
    mine = [one for one in order.holds if one.inventory_item_id == item.id]
    return sum(one.quantity for one in mine if (one.held_at or order.created_at) >= item.counted_at)


async def test_random_operations_leave_the_same_holds_in_mirror_and_postgres(
    make_rig: MakeRig, servers: Servers
) -> None:
    redis = servers.extra_redis()
    postgres_rig = await make_rig(redis_url=redis.url)
    seen: Counter[str] = Counter()
    for seed in range(_SEEDS):
        stock = RandomStock(redis.url, postgres_rig, Random(seed))
        try:
            await stock.open()
            for _ in range(_STEPS):
                await stock.step()
            await stock.finish_and_check()
        except BaseException as error:
            error.add_note(f"seed {seed}, after {stock.seen.total()} steps")
            raise
        finally:
            await stock.down()
        seen += stock.seen
    missed = {"restamp", "short", "dies", "taken back", "not revealed", "left the mirror", "wipe", "fork"} - seen.keys()
    assert not missed, f"no random step led to: {missed}"
