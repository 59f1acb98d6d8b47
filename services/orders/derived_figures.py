"""Figures that are computed with each request: a customer's totals, available stock, positions in a bay's queue, the
open orders of a table. They are not stored, so they cannot become outdated."""

import contextlib
from datetime import datetime
from typing import Any, ClassVar, TypeVar

from msgspec import Struct

from services.orders.entity_reads import EntityReads
from shared.entities import job, order
from shared.entities.customer import Customer
from shared.entities.entity import Entity, Facts
from shared.entities.inventory_item import InventoryItem
from shared.entities.job import BayJob, JobStage
from shared.entities.order import OrderStatus
from shared.entities.selection import Selection
from shared.entities.table import DiningTable
from shared.errors import InvalidInput, NotFound, Unavailable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.rail.idempotency import FactId
from shared.restaurants import Restaurant
from shared.security.tokens import Identity, Role

T = TypeVar("T")

_OPEN_STATUSES = tuple(
    status.value for status in OrderStatus if status not in (OrderStatus.COMPLETED, OrderStatus.CANCELLED)
)
_PAGE_ENTITIES = 1_000

# An order counts after it was paid in full, with its payments minus its refunds. A free order counts unless cancelled.
_TOTALS = """
select customer_id::text, sum(net)::int8 as spent, count(*) as visits
from (
    select o.customer_id, o.id, coalesce(sum(p.amount), 0) as net
    from orders o left join payments p on p.restaurant_id = o.restaurant_id and p.order_id = o.id
    where o.restaurant_id = $1 and o.customer_id = any($2::uuid[]) and o.deleted_at is null
    group by o.customer_id, o.id, o.total, o.status
    having coalesce(sum(p.amount) filter (where p.amount > 0), 0) >= o.total
        and (sum(p.amount) > 0 or (count(p.id) = 0 and o.status <> 'cancelled'))
) paid
group by customer_id
"""
# Leaves out the moves that the states of the customers contain. The caller adds those itself, because PostgreSQL may
# lack the latest ones.
_POINTS = """
select m.customer_id::text, sum(m.points)::int8 as points, array_agg(m.id::text) as ids
from loyalty_moves m
where m.restaurant_id = $1 and m.customer_id = any($2::uuid[]) and not exists (
    select from unnest($3::uuid[], $4::uuid[]) as known (customer_id, id)
    where known.customer_id = m.customer_id and known.id = m.id
)
group by 1
"""


class OrderAtTable(Struct, frozen=True):
    id: str
    order_number: str
    status: OrderStatus
    total: int
    created_at: datetime


class _Totals(Struct, frozen=True):
    loyalty_points: int
    total_spent: int
    visits: int
    counted: frozenset[str]
    """The ids of the moves that `loyalty_points` contains."""


class DerivedFigures:
    ORDER: ClassVar[Entity] = order.ENTITY

    def __init__(
        self, reads: EntityReads, postgres: Postgres, mirror: Mirror, *, page_entities: int = _PAGE_ENTITIES
    ) -> None:
        """`page_entities`: the most entities that one query reads."""
        self._page_entities = page_entities
        self._reads = reads
        self._postgres = postgres
        self._mirror = mirror

    async def current_state(self, entity: Entity, restaurant: str, id_: str) -> Any:
        """Returns the current state. Raises NotFound, Unavailable."""
        return (await self._reads.one(entity, restaurant, id_)).decoded()

    async def must_exist(self, entity: Entity, restaurant: str, id_: str, field: str) -> None:
        """Raises InvalidInput with the name of the field if there is no such entity or if it is deleted."""
        try:
            found = await self.current_state(entity, restaurant, id_)
        except NotFound as error:
            raise InvalidInput(f"no such {entity.name}", field=field, code=f"unknown_{entity.name}") from error
        if found.deleted_at is not None:
            raise InvalidInput(f"the {entity.name} is deleted", field=field, code=f"unknown_{entity.name}")

    async def orders_at(self, restaurant: str, identity: Identity, tables: list[DiningTable]) -> list[dict[str, Any]]:
        """Returns the open orders of each table (`current_orders`), newest first. Customers see those of their
        session."""
        ids = tuple(one.id for one in tables)
        own = {"customer_session_id": identity.session_id} if identity.role is Role.CUSTOMER else {}
        requested = Selection(equal=own, among={"table_id": ids, "status": _OPEN_STATUSES}, limit=self._page_entities)
        page = await self._reads.page(order.ENTITY, restaurant, requested) if ids else None
        found: dict[str | None, list[OrderAtTable]] = {}
        for one in page.found if page is not None else ():
            state = one.decoded()
            summary = OrderAtTable(state.id, state.order_number, state.status, state.total, state.created_at)
            found.setdefault(state.table_id, []).append(summary)
        return [{"current_orders": found.get(id_, [])} for id_ in ids]

    async def queue(self, restaurant: str, bay_id: str) -> list[BayJob]:
        """Returns the queued jobs of the bay, the next one first."""
        found: list[BayJob] = []
        before = None
        while True:
            requested = Selection(
                equal={"bay_id": bay_id, "stage": JobStage.QUEUED}, before=before, limit=self._page_entities
            )
            page = await self._reads.page(job.ENTITY, restaurant, requested)
            found += [one.decoded() for one in page.found]
            if not page.more:
                return sorted(found, key=lambda one: (one.place, one.created_at, one.id))
            before = (found[-1].created_at, found[-1].id)

    async def positions(self, restaurant: str, jobs: list[BayJob]) -> list[dict[str, Any]]:
        """Returns the `position` of each job in its bay's queue, from 1, or None for a job that is not queued."""
        queues = {
            bay_id: {one.id: place for place, one in enumerate(await self.queue(restaurant, bay_id), start=1)}
            for bay_id in sorted({one.bay_id for one in jobs if one.stage is JobStage.QUEUED})
        }
        return [{"position": queues.get(one.bay_id, {}).get(one.id)} for one in jobs]

    async def totals(self, restaurant: Restaurant, customers: list[Customer]) -> list[dict[str, Any]]:
        """Returns `loyalty_points`, `total_spent` (minor units) and `visits` of each customer, or None while PostgreSQL
        is unavailable. Payments count once PostgreSQL has them, loyalty moves count at once."""
        try:
            found = await self._totals(restaurant, customers)
        except UNAVAILABLE:
            return [{"loyalty_points": None, "total_spent": None, "visits": None} for _ in customers]
        return [
            {"loyalty_points": one.loyalty_points, "total_spent": one.total_spent, "visits": one.visits}
            for one in found
        ]

    async def points(self, restaurant: Restaurant, customer: Customer) -> tuple[int, frozenset[str]] | None:
        """Returns (loyalty points, ids of the moves that they contain), or None while PostgreSQL is unavailable. The
        points may contain moves that are newer than the state."""
        try:
            (found,) = await self._totals(restaurant, [customer])
        except UNAVAILABLE:
            return None
        return found.loyalty_points, found.counted

    async def _totals(self, restaurant: Restaurant, customers: list[Customer]) -> list[_Totals]:
        """Raises one of UNAVAILABLE."""
        ids = [one.id for one in customers]
        known_moves = [(one.id, move.id) for one in customers for move in one.loyalty_moves]
        known = [customer for customer, _ in known_moves], [move for _, move in known_moves]
        async with self._postgres.tenant(restaurant.id) as connection:
            paid = {row["customer_id"]: row for row in await connection.fetch(_TOTALS, restaurant.id, ids)}
            moved = {row["customer_id"]: row for row in await connection.fetch(_POINTS, restaurant.id, ids, *known)}
        found = []
        for one in customers:
            spent, visits = (paid[one.id]["spent"], paid[one.id]["visits"]) if one.id in paid else (0, 0)
            points = spent // restaurant.settings.minor_units_per_point
            points += sum(move.points for move in one.loyalty_moves)
            counted = frozenset(move.id for move in one.loyalty_moves)
            if one.id in moved:
                points += moved[one.id]["points"]
                counted |= frozenset(moved[one.id]["ids"])
            found.append(_Totals(points, spent, visits, counted))
        return found

    async def move(self, facts: Facts, type_: type[T], restaurant: str, parent: str, fact: FactId) -> T | None:
        """Returns the recorded fact with this id or key, which the entity's state may no longer contain. Raises
        Unavailable."""
        names = ", ".join(f"{one.name}::text" if one.pg_type == "uuid" else one.name for one in facts.columns)
        sql = (
            f"select id::text, {names} from {facts.name} where restaurant_id = $1 and {facts.parent} = $2"  # noqa: S608
            " and (id = $3 or id = $4 or request_key = $4)"
            " order by coalesce(id = $4 or request_key = $4, false) desc limit 1"
        )
        try:
            async with self._postgres.tenant(restaurant) as connection:
                row = await connection.fetchrow(sql, restaurant, parent, fact.id, fact.key)
        except UNAVAILABLE as error:
            raise Unavailable(
                "the database is unavailable, so this id cannot be checked; retry", retry_after=2.0
            ) from error
        return None if row is None else type_(**{name: value for name, value in row.items() if value is not None})

    async def available(self, restaurant: str, items: list[InventoryItem]) -> list[dict[str, Any]]:
        """Returns `available`, `held` and `low` (at or below `low_at`) of each item, or None while unknown. The held
        amount of the mirror is exact. Without the mirror it comes from PostgreSQL and is late by the sync lag."""
        held: dict[str, int] = {}
        with contextlib.suppress(MirrorUnavailable, MirrorInDoubt):
            stock = await self._mirror.stock(restaurant, [one.id for one in items])
            # An item that was counted again after its state was read now has other holds.
            held = {
                one.id: known.held
                for one, known in zip(items, stock, strict=True)
                if known is not None and known.counted_at == one.counted_at
            }
        if unknown := {one.id: one.counted_at for one in items if one.id not in held}:
            with contextlib.suppress(*UNAVAILABLE):
                async with self._postgres.tenant(restaurant) as connection:
                    stored = await states.held(connection, restaurant, unknown)
                held |= {id_: stored.get(id_, 0) for id_ in unknown}
        found = []
        for one in items:
            taken = held.get(one.id)
            # A move may come between the read of the state and the read of the holds, so the state's quantity counts.
            left = None if taken is None else one.quantity - taken
            low = None if left is None else one.low_at is not None and left <= one.low_at
            found.append({"available": left, "held": taken, "low": low})
        return found
