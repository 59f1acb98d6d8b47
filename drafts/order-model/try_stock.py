import importlib.util
from datetime import timedelta
import pytest
from msgspec import structs
from shared.entities.inventory_item import ENTITY as ITEM
from shared.entities.menu_item import Consumption
from shared.entities.order.acts import Act
from shared.entities.order.lines import NewVoid, add_lines, void
from shared.entities.order.lifecycle import cancel, delete, restore
from shared.entities.order.opening import NewOrder, place
from shared.entities.order.terms import Tax, Terms
from tests.integration.test_stock import rig, redis  # noqa
from tests.rigs import builders, order_law
from tests.rigs.newer_release import registered

spec = importlib.util.spec_from_file_location("draft_order", "drafts/order-model/entity.py")
draft = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draft)
E = draft.ENTITY


async def test_two_items(rig):
    with registered(E):
        at = builders.CREATED_AT
        dough, cheese = [await rig.put(ITEM, rig.item(10, at + timedelta(minutes=n))) for n in (1, 2)]
        ids = dough[1].id, cheese[1].id
        recipe = (Consumption(ids[0], 1), Consumption(ids[1], 2))
        o = place(NewOrder(id=builders.new_id(), restaurant_id=rig.restaurant, business_day=order_law.DAY, currency="EUR", terms=Terms(tax=Tax.added(500)), order_number=""),
            Act(version=1, at=at), [order_law.line("soup", 300, consumes=recipe)])
        base = await rig.put(E, o)
        print(base[1].holds, base[1].order_number)
        assert [await rig.left(x) for x in ids] == [9, 8]
        counted = at + timedelta(hours=1)
        await rig.put(ITEM, structs.replace(cheese[1], quantity=20, counted_at=counted), cheese)
        more = add_lines(base[1], Act(version=2, at=at), [order_law.line("bread", 300, 3, consumes=(Consumption(ids[0], 1), Consumption(ids[1], 1)))])
        base = await rig.put(E, more, base)
        print(base[1].holds)
        assert [await rig.left(x) for x in ids] == [6, 17]
        less = void(base[1], Act(version=3, at=at + timedelta(hours=2)), NewVoid(id=builders.new_id(), line=order_law.named("bread"), quantity=1))
        base = await rig.put(E, less, base)
        assert [await rig.left(x) for x in ids] == [7, 18]
        gone = delete(base[1], Act(version=4, at=at + timedelta(hours=2)))
        base = await rig.put(E, gone, base)
        assert [await rig.left(x) for x in ids] == [10, 20]
        # recount, then restore: holds begin again
        back = restore(base[1], Act(version=5, at=at + timedelta(minutes=30)))
        base = await rig.put(E, back, base)
        print(base[1].holds, base[1].held_from)
        assert [await rig.left(x) for x in ids] == [7, 16]
        end = cancel(base[1], Act(version=6, at=at + timedelta(hours=3)), reason="gone")
        base = await rig.put(E, end, base)
        assert [await rig.left(x) for x in ids] == [10, 20]
