"""A restaurant with inventory, whose orders hold stock."""

from datetime import datetime
from typing import Any

from shared.entities.inventory_item import ENTITY as ITEM
from shared.entities.inventory_item import InventoryItem
from shared.entities.order import Order, StockHold
from shared.mirror.mirror import Mirror
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.rail.broker import MemoryBroker
from tests.rigs.rail.instance import RailRig
from tests.rigs.rail.mirror_server import MirrorServer


class StockRig(RailRig):
    """A rail without a broker, on which every claim is stale at once."""

    def __init__(self, redis_url: str) -> None:
        self.broker = MemoryBroker()
        super().__init__(
            Settings(_env_file=None),
            MirrorServer(redis_url),
            restaurant=builders.new_id(),
            mirror=Mirror(redis_url, timeout=5.0, stale_seconds=0.0),
            broker=self.broker,
        )

    def item(self, quantity: int, at: datetime = builders.CREATED_AT) -> InventoryItem:
        return InventoryItem(
            id=builders.new_id(),
            restaurant_id=self.restaurant,
            name="Dough",
            quantity=quantity,
            counted_at=at,
            created_at=at,
            updated_at=at,
        )

    async def counted(self, quantity: int) -> str:
        """Puts an item with this counted quantity; returns its id."""
        _, item = await self.put(ITEM, self.item(quantity))
        return str(item.id)

    def order(self, *taken: tuple[str, int], **fields: Any) -> Order:
        holds = tuple(StockHold(*one) for one in taken)
        return builders.order(items=1, restaurant_id=self.restaurant, holds=holds, **fields)

    async def left(self, item: str) -> int:
        """Returns the quantity of the item that no order holds."""
        (found,) = await self.mirror.stock(self.restaurant, [item])
        assert found is not None
        return found[0] - found[1]

    async def holds(self, item: str) -> dict[str, str]:
        return await self.server.holds(self.restaurant, item)
