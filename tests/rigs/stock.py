"""A restaurant with inventory whose changes a test claims, records and reveals step by step, or in any order."""

import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from random import Random
from typing import Any

from msgspec import structs

from services.orders.pricing import holds
from services.sync.maintenance.reconciler import Reconciler
from services.sync.mirror.mirror_writer import MirrorWriter
from services.sync.writer.upsert import Written, write_batch
from shared.entities import registry
from shared.entities.contract import Change, Head, decode_change, encode, now
from shared.entities.entity import Entity
from shared.entities.inventory_item import ENTITY as ITEM
from shared.entities.inventory_item import InventoryItem
from shared.entities.menu_item import Consumption
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import Order, OrderItem, OrderStatus, StockHold
from shared.entities.registry import ENTITIES
from shared.mirror import keys
from shared.mirror.mirror import Apply, Claimed, HeadMoved, LogState, Mirror, Stale, StockShort, stock_text
from shared.observability.metrics import Metrics, WriterMetrics
from shared.postgres import states
from shared.rail.draft import Draft, change_of
from tests.rigs import builders
from tests.rigs.postgres_writer import Rig

EPOCH = "stock"


def applied(change: Change, how: str = "reveal") -> Apply:
    entity, state = registry.read(change)
    return Apply(entity, state, change.head, bytes(change.data.after), change.time, how)


class Shelf:
    """A restaurant with inventory, its mirror and its recorded changes."""

    def __init__(self, mirror: Mirror, restaurant: str | None = None) -> None:
        self.mirror = mirror
        self.restaurant = restaurant or builders.new_id()
        self.recorded: dict[str, Change] = {}

    # -- changes -----------------------------------------------------------------------------------------------

    def draft(self, entity: Entity, state: Any, base: tuple[Head, Any] | None = None) -> Draft:
        head, before = base or (None, None)
        event = "updated" if base else "created"
        at = state.updated_at
        return Draft(entity=entity, event=event, state=state, base=head, before=before, at=at, source="orders")

    async def claim(self, draft: Draft) -> tuple[Change, Any]:
        change = change_of(draft)
        stock = stock_text(draft.entity, draft.state)
        return change, await self.mirror.claim(draft.entity, change, encode(change), draft.base, None, 0, stock)

    def record(self, change: Change) -> None:
        self.recorded[change.id] = change

    async def finish(self, stale: Stale) -> None:
        change = decode_change(stale.event)
        self.record(change)
        await self.mirror.apply([applied(change)])

    async def finish_all(self) -> None:
        for member in await self.mirror.stale_claims(most=10_000):
            if member.startswith(self.restaurant) and (stale := await self.mirror.mark(member)):
                await self.finish(stale)

    async def put(self, entity: Entity, state: Any, base: tuple[Head, Any] | None = None) -> tuple[Head, Any]:
        """Claims, records and reveals a change without a fault."""
        change, reply = await self.claim(self.draft(entity, state, base))
        assert isinstance(reply, Claimed), reply
        self.record(change)
        await self.mirror.apply([applied(change)])
        return change.head, state

    # -- the stock ---------------------------------------------------------------------------------------------

    def item(self, quantity: int, at: datetime = builders.CREATED_AT, **fields: Any) -> InventoryItem:
        return InventoryItem(
            **{
                "id": builders.new_id(),
                "restaurant_id": self.restaurant,
                "name": "Dough",
                "quantity": quantity,
                "counted_at": at,
                "created_at": at,
                "updated_at": at,
                **fields,
            }
        )

    async def counted(self, quantity: int) -> str:
        """Puts an item with this counted quantity; returns its id."""
        _, item = await self.put(ITEM, self.item(quantity))
        return str(item.id)

    def order(self, *taken: tuple[str, int], **fields: Any) -> Order:
        return builders.order(
            items=1, restaurant_id=self.restaurant, holds=tuple(StockHold(*one) for one in taken), **fields
        )

    async def left(self, item: str) -> int:
        """Returns the quantity of the item that no order holds."""
        (found,) = await self.mirror.stock(self.restaurant, [item])
        assert found is not None
        return found[0] - found[1]

    async def entries(self, item: str) -> dict[str, str]:
        """The holds of an item by holder; a holder that ends in + is the claim of an order."""
        found = await self.mirror._redis.call("HGETALL", keys.stock(self.restaurant, item))
        pairs = zip(found[::2], found[1::2], strict=True)
        return {name.decode(): text.decode() for name, text in pairs if b"@" in text}


FINAL_STATUSES = (OrderStatus.COMPLETED, OrderStatus.CANCELLED)


class Kitchen(Shelf):
    """A shelf with random steps, on a clock of its own that starts 14 days ago: changes are lost, repeated or late, and
    the owner of a claim may die."""

    def __init__(self, mirror: Mirror, rig: Rig, chance: Random) -> None:
        super().__init__(mirror)
        self.rig, self.chance = rig, chance
        self.now = now() - timedelta(days=14)
        self.items: list[str] = []
        self.orders: list[str] = []
        self.menu: dict[str, Any] = {}
        self.seen: Counter[str] = Counter()
        metrics = WriterMetrics(Metrics())
        self.writer = MirrorWriter(rig.settings, rig.postgres, mirror, rig.publisher, rig.watch, rig.tracer, metrics)
        self.reconciler = Reconciler(rig.settings, rig.postgres, mirror, None)  # type: ignore[arg-type]

    async def open(self) -> None:
        await self.flush()
        await self.warm(LogState(EPOCH, -1))
        for _ in range(3):
            _, item = await self.put(ITEM, self.item(self.chance.randrange(3, 12), self.now))
            self.items.append(item.id)
        for n, needs in enumerate(((0,), (0, 1), (1, 2))):
            consumes = tuple(Consumption(self.items[item], n + 1) for item in needs)
            dish = builders.menu_item(restaurant_id=self.restaurant, consumes=consumes)
            self.menu[dish.id] = dish

    async def flush(self) -> None:
        await self.mirror._redis.call("FLUSHALL")
        await self.mirror._redis.call("SADD", keys.RESTAURANTS, self.restaurant)

    async def warm(self, state: LogState) -> None:
        self.state = state
        await self.mirror.begin_log(state)
        assert await self.mirror.warm(state, [], 0)

    async def from_log(self, changes: Iterable[Change]) -> None:
        """Applies the changes as the mirror writer does."""
        old = self.now - timedelta(minutes=10)
        some = [applied(change, "late" if change.time < old else "reveal") for change in changes]
        for start in range(0, len(some), 15):
            await self.writer._apply(some[start : start + 15], self.state, None)

    # -- steps -------------------------------------------------------------------------------------------------

    async def step(self) -> None:
        self.now += timedelta(hours=self.chance.choice((0, 0, 1, 13)), microseconds=self.chance.randrange(3))
        moves = {
            self.place: 6,
            self.change_items: 5,
            self.move_on: 6,
            self.drop_or_restore: 4,
            self.count_again: 3,
            self.deliver_goods: 2,
            self.take_off_or_restore: 1,
            self.fork: 2,
            self.finish_all: 2,
            self.log_repeats: 3,
            self.write: 3,
            self.trim: 2,
            self.wipe: 1,
        }
        move = self.chance.choices(list(moves), list(moves.values()))[0]
        self.seen[move.__name__] += 1
        await move()

    async def place(self) -> None:
        items = self.dishes()
        order = builders.order(
            restaurant_id=self.restaurant,
            created_at=self.now,
            updated_at=self.now,
            items=items,
            holds=holds(items, self.menu),
            request_hash=self.chance.choice((None, "ab")),
        )
        self.orders.append(order.id)
        await self.attempt(ORDER, order, None)

    async def change_items(self) -> None:
        if (base := await self.any_order(OrderStatus.PENDING, OrderStatus.RECEIVED)) and base[1].deleted_at is None:
            items = self.dishes()
            held = holds(items, self.menu, base[1].holds, self.now)
            await self.attempt(ORDER, structs.replace(base[1], items=items, holds=held, updated_at=self.now), base)

    async def move_on(self) -> None:
        if (
            (base := await self.any_order(*OrderStatus))
            and base[1].deleted_at is None
            and base[1].status not in FINAL_STATUSES
        ):
            status = self.chance.choice(
                (OrderStatus.RECEIVED, OrderStatus.COMPLETED, OrderStatus.COMPLETED, OrderStatus.CANCELLED)
            )
            await self.attempt(ORDER, structs.replace(base[1], status=status, updated_at=self.now), base)

    async def drop_or_restore(self) -> None:
        if not (base := await self.any_order(*OrderStatus)):
            return
        order = base[1]
        if order.deleted_at is None:
            after = structs.replace(order, deleted_at=self.now, updated_at=self.now)
        else:
            held = tuple(structs.replace(hold, held_at=self.now) for hold in order.holds)
            after = structs.replace(order, deleted_at=None, updated_at=self.now, holds=held)
        await self.attempt(ORDER, after, base)

    async def count_again(self) -> None:
        if base := await self.head_and_state(ITEM, self.chance.choice(self.items)):
            after = structs.replace(
                base[1], quantity=self.chance.randrange(12), counted_at=self.now, updated_at=self.now
            )
            await self.attempt(ITEM, after, base)

    async def deliver_goods(self) -> None:
        if base := await self.head_and_state(ITEM, self.chance.choice(self.items)):
            more = base[1].quantity + self.chance.randrange(1, 9)
            await self.attempt(ITEM, structs.replace(base[1], quantity=more, updated_at=self.now), base)

    async def take_off_or_restore(self) -> None:
        if base := await self.head_and_state(ITEM, self.chance.choice(self.items)):
            gone = None if base[1].deleted_at else self.now
            await self.attempt(ITEM, structs.replace(base[1], deleted_at=gone, updated_at=self.now), base)

    async def fork(self) -> None:
        """Records another change of a taken version, as a lost mirror allows."""
        changes = [one for one in self.recorded.values() if one.entity == "order"]
        if changes:
            taken = self.chance.choice(changes)
            state = ORDER.decode(taken)
            items = self.dishes()
            held = holds(items, self.menu, state.holds[:1], self.now)
            other = builders.change(
                structs.replace(state, items=items, holds=held, updated_at=self.now),
                entityversion=taken.entityversion,
                time=taken.time,
            )
            self.record(other)
            if self.chance.random() < 0.7:
                await self.from_log([other])

    async def log_repeats(self) -> None:
        """The mirror writer reads some changes again, in any order and any number of times."""
        await self.from_log(self.chance.choices(list(self.recorded.values()), k=8))

    async def write(self, some: Iterable[Change] | None = None) -> None:
        if some is None:
            some = self.chance.choices(list(self.recorded.values()), k=8)
        written = [Written(ENTITIES[one.entity].lane, ENTITIES[one.entity], one, registry.read(one)[1]) for one in some]
        unique = list({one.change.id: one for one in written}.values())
        async with self.rig.postgres.connection() as connection:
            await write_batch(connection, unique, timeout_seconds=5.0)
        for one in unique:
            await self.mirror.note_sync_states(
                self.restaurant, one.entity.name, [(one.change.entity_id, one.change.head)]
            )

    async def trim(self) -> None:
        """Finished orders leave the mirror once PostgreSQL has them; their holds stay."""
        await self.write(self.recorded.values())
        self.seen["left the mirror"] += await self.reconciler.trim()

    async def wipe(self) -> None:
        """Empties the mirror, claims included. The real writer fills it from PostgreSQL, then from the log."""
        await self.write()
        await self.flush()
        begun = await self.writer._rebuild(time.monotonic())
        self.state = begun.state
        await self.from_log(self.shuffled())
        await self.warm(begun.state)
        await self.assert_stock_matches_heads()

    def shuffled(self) -> list[Change]:
        return self.chance.sample(list(self.recorded.values()), k=len(self.recorded))

    # -- a change ----------------------------------------------------------------------------------------------

    async def attempt(self, entity: Entity, state: Any, base: tuple[Head, Any] | None) -> None:
        draft = self.draft(entity, state, base)
        change, reply = await self.claim(draft)
        match reply:
            case StockShort(left):
                self.seen["short"] += 1
                if base is None:
                    assert left == tuple([(item, max(0, await self.left(item))) for item, _ in left])
                return
            case Stale():
                await self.finish(reply)
                return
            case HeadMoved():
                return
        assert isinstance(reply, Claimed), reply
        if base is None:
            for one in await self.mirror.stock(self.restaurant, [hold.inventory_item_id for hold in state.holds]):
                assert one is None or one[0] >= one[1]
        how = self.chance.choice(("well", "well", "well", "well", "twice", "dies", "not revealed", "taken back"))
        self.seen[how] += 1
        if how == "twice":
            assert isinstance((await self.claim(draft))[1], Claimed)
        if how == "taken back":
            assert await self.mirror.take_back(change)
        elif how != "dies":
            self.record(change)
            if how != "not revealed":
                await self.mirror.apply([applied(change)] * (2 if how == "twice" else 1))

    def dishes(self) -> tuple[OrderItem, ...]:
        chosen = self.chance.sample(list(self.menu), k=self.chance.randrange(3))
        return tuple(builders.item(menu_item_id=dish, quantity=self.chance.randrange(1, 3)) for dish in chosen)

    async def any_order(self, *status: OrderStatus) -> tuple[Head, Order] | None:
        if not self.orders:
            return None
        found = await self.head_and_state(ORDER, self.chance.choice(self.orders))
        return found if found and found[1].status in status else None

    async def head_and_state(self, entity: Entity, id_: str) -> tuple[Head, Any] | None:
        _, (document,) = await self.mirror.read(self.restaurant, entity.name, [id_])
        if document is not None:
            return document.head, entity.decode_state(document.state)
        async with self.rig.postgres.connection() as connection:
            stored = await states.find_state(connection, entity, self.restaurant, id_)
        return (stored.head, entity.decode_state(stored.state)) if stored else None

    # -- the expected stock ------------------------------------------------------------------------------------

    def head_states(self, entity: Entity) -> dict[str, Any]:
        """Returns {entity id: the state at its head}, from the recorded changes."""
        changes = [one for one in self.recorded.values() if one.entity == entity.name]
        changes.sort(key=lambda one: one.head)
        return {one.entity_id: entity.decode(one) for one in changes}

    def held_by(self, order_id: str, item: str) -> int:
        """The quantity that the order's head holds, computed without the code under test."""
        order, counted = self.head_states(ORDER).get(order_id), self.head_states(ITEM)[item].counted_at
        if order is None or order.status is OrderStatus.CANCELLED or order.deleted_at is not None:
            return 0
        return sum(
            one.quantity
            for one in order.holds
            if one.inventory_item_id == item and (one.held_at or order.created_at) >= counted
        )

    async def assert_stock_matches_heads(self) -> None:
        """Asserts that the stock in the mirror follows from the heads of all items and orders."""
        for id_, item in self.head_states(ITEM).items():
            held = sum(self.held_by(order, id_) for order in self.head_states(ORDER))
            found = await self.mirror.stock(self.restaurant, [id_])
            assert found == [None if item.deleted_at else (item.quantity, held)]
            assert not [holder for holder in await self.entries(id_) if holder.endswith("+")]

    async def finish_and_check(self) -> None:
        """Finishes all claims, applies and writes every change; asserts the same stock in the mirror and PostgreSQL."""
        await self.finish_all()
        await self.from_log(self.shuffled())
        await self.assert_stock_matches_heads()
        await self.write(self.recorded.values())
        stock = self.head_states(ITEM)
        async with self.rig.postgres.connection() as connection:
            held = await states.held(connection, self.restaurant, list(stock))
        assert {id_: held.get(id_, 0) for id_ in stock} == {
            id_: sum(self.held_by(order, id_) for order in self.head_states(ORDER)) for id_ in stock
        }
