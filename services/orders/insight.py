"""What is derived at the moment of asking: a customer's totals, what is left of the stock, places in a queue,
the orders at a table. Nothing of it is stored, so nothing of it can drift."""

from typing import Any, ClassVar

from services.orders.reads import Reads
from shared.entities import job, order
from shared.entities.customer import Customer
from shared.entities.entity import Entity
from shared.entities.inventory_item import InventoryItem
from shared.entities.job import Job, Stage
from shared.entities.order import Status
from shared.entities.selection import Selection
from shared.entities.table import DiningTable
from shared.errors import InvalidInput, NotFound
from shared.mirror.connection import MirrorAway, MirrorInDoubt
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import AWAY, Postgres
from shared.restaurants import Restaurant

_OPEN = tuple(status.value for status in Status if status not in (Status.COMPLETED, Status.CANCELLED))
_MOST = 1_000

# An order counts once it was paid in full, with what was not given back.
_TOTALS = """
select customer_id::text, sum(net)::int8 as spent, count(*) as visits
from (
    select o.customer_id, o.id, sum(p.amount) as net
    from orders o join payments p on p.restaurant_id = o.restaurant_id and p.order_id = o.id
    where o.restaurant_id = $1 and o.customer_id = any($2::uuid[]) and o.deleted_at is null
    group by o.customer_id, o.id, o.total
    having sum(p.amount) filter (where p.amount > 0) >= o.total and sum(p.amount) > 0
) paid
group by customer_id
"""
_POINTS = """
select customer_id::text, sum(points)::int8 as points from loyalty_moves
where restaurant_id = $1 and customer_id = any($2::uuid[]) group by 1
"""


class Insight:
    ORDER: ClassVar[Entity] = order.ENTITY

    def __init__(self, reads: Reads, postgres: Postgres, mirror: Mirror) -> None:
        self._reads = reads
        self._postgres = postgres
        self._mirror = mirror

    async def standing(self, entity: Entity, restaurant: str, id_: str) -> Any:
        """Raises NotFound, Unavailable."""
        return (await self._reads.one(entity, restaurant, id_)).decoded()

    async def must_exist(self, entity: Entity, restaurant: str, id_: str, field: str) -> None:
        """Raises InvalidInput that names the field."""
        try:
            found = await self.standing(entity, restaurant, id_)
        except NotFound as error:
            raise InvalidInput(f"no such {entity.name}", field=field, code=f"unknown_{entity.name}") from error
        if found.deleted_at is not None:
            raise InvalidInput(f"the {entity.name} is deleted", field=field, code=f"unknown_{entity.name}")

    async def orders_at(self, restaurant: str, tables: list[DiningTable]) -> list[dict[str, Any]]:
        ids = tuple(one.id for one in tables)
        wanted = Selection(among={"table_id": ids, "status": _OPEN}, limit=_MOST)
        page = await self._reads.page(order.ENTITY, restaurant, wanted) if ids else None
        found: dict[str | None, list[dict[str, Any]]] = {}
        for one in page.found if page is not None else ():
            state = one.decoded()
            brief = {name: getattr(state, name) for name in ("id", "order_number", "status", "total", "created_at")}
            found.setdefault(state.table_id, []).append(brief)
        return [{"current_orders": found.get(id_, [])} for id_ in ids]

    async def queue(self, restaurant: str, bay_id: str) -> list[Job]:
        """The next one first."""
        wanted = Selection(equal={"bay_id": bay_id, "stage": Stage.QUEUED}, limit=_MOST)
        page = await self._reads.page(job.ENTITY, restaurant, wanted)
        return sorted((one.decoded() for one in page.found), key=lambda one: (one.place, one.created_at, one.id))

    async def positions(self, restaurant: str, jobs: list[Job]) -> list[dict[str, Any]]:
        queues = {
            bay_id: {one.id: place for place, one in enumerate(await self.queue(restaurant, bay_id), start=1)}
            for bay_id in sorted({one.bay_id for one in jobs if one.stage is Stage.QUEUED})
        }
        return [{"position": queues.get(one.bay_id, {}).get(one.id)} for one in jobs]

    async def totals(self, restaurant: Restaurant, customers: list[Customer]) -> list[dict[str, Any]]:
        """As far as PostgreSQL knows; null while it is away."""
        ids = [one.id for one in customers]
        try:
            async with self._postgres.tenant(restaurant.id) as connection:
                paid = {row["customer_id"]: row for row in await connection.fetch(_TOTALS, restaurant.id, ids)}
                moved = {
                    row["customer_id"]: row["points"] for row in await connection.fetch(_POINTS, restaurant.id, ids)
                }
        except AWAY:
            return [{"loyalty_points": None, "total_spent": None, "visits": None} for _ in ids]
        found = []
        for id_ in ids:
            spent, visits = (paid[id_]["spent"], paid[id_]["visits"]) if id_ in paid else (0, 0)
            points = spent // restaurant.settings.minor_units_per_point + moved.get(id_, 0)
            found.append({"loyalty_points": points, "total_spent": spent, "visits": visits})
        return found

    async def available(self, restaurant: str, items: list[InventoryItem]) -> list[dict[str, Any]]:
        """From the mirror, which refuses what would go below; without it from PostgreSQL, behind by the sync lag."""
        ids = [one.id for one in items]
        try:
            held = [None if one is None else one[1] for one in await self._mirror.stock(restaurant, ids)]
        except (MirrorAway, MirrorInDoubt):
            try:
                async with self._postgres.tenant(restaurant) as connection:
                    known = await states.held(connection, restaurant, ids)
                held = [known.get(id_, 0) for id_ in ids]
            except AWAY:
                held = [None for _ in ids]
        return [
            {"held": taken, "available": None if taken is None else one.quantity - taken}
            for one, taken in zip(items, held, strict=True)
        ]
