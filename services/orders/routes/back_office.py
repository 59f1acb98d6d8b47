"""Further routes of the back office: stock and loyalty moves, availability of many dishes, the queue of a bay."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec
from litestar.types import ASGIApp
from msgspec import Struct

from services.orders.entity_changes import Receipt, check_not_deleted
from services.orders.idempotency import RequestKey
from services.orders.requests import MoveLoyalty, MoveStock, SetAvailability
from services.orders.route_context import RouteContext, context_of, receipt_reply
from shared.entities import bay, customer, inventory_item, menu_item
from shared.entities.customer import Customer, LoyaltyMove
from shared.entities.inventory_item import InventoryItem, StockMove
from shared.entities.job import BayJob
from shared.errors import Conflict, InvalidInput, TicketrailError, Unavailable
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.endpoint import View, endpoint, path_id
from shared.http.replies import success
from shared.rail.idempotency import FactId
from shared.security.tokens import Identity

# A state keeps its latest moves, so that a repeat is recognised. PostgreSQL keeps all moves.
_MAX_MOVES_IN_STATE = 200


class Availability(Struct, frozen=True):
    id: str
    outcome: str
    """`changed`, `unchanged`, or the code of an error."""
    version: int | None = None


@endpoint(
    "POST",
    "/api/menu/availability",
    action="menu.availability",
    tag="Menu",
    summary="Set the availability of many dishes",
    description="Changes each dish on its own, and reports an outcome for each. An unknown dish refuses the whole"
    " request.",
    body=SetAvailability,
    answer=list[Availability],
    errors=(404, 409, 504),
    status=200,
    example={"menu_item_ids": ["7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11"], "is_available": False},
)
async def set_availability(request: Call) -> ASGIApp:
    requested = read_body(await request.whole_body(), SetAvailability)
    identity, context = request.identity, context_of(request)
    book = await context.menus.book(identity.tenant)
    ids = list(dict.fromkeys(str(id_) for id_ in requested.menu_item_ids))
    for index, id_ in enumerate(ids):
        if id_ not in book.menu or book.menu[id_].deleted_at is not None:
            raise InvalidInput("no such dish", field=f"menu_item_ids[{index}]", code="unknown_menu_item")
    found = await asyncio.gather(*(_set_one(context, identity, id_, requested.is_available) for id_ in ids))
    return success(found)


async def _set_one(context: RouteContext, identity: Identity, id_: str, available: bool) -> Availability:
    def change(dish: menu_item.MenuItem, at: datetime, _: int) -> tuple[str, menu_item.MenuItem]:
        if dish.is_available is available:
            return "updated", dish
        return "updated", msgspec.structs.replace(dish, is_available=available, updated_at=at)

    try:
        receipt = await context.changes.change(identity, menu_item.ENTITY, id_, None, change)
    except TicketrailError as error:
        return Availability(id_, error.error_code)
    context.menus.put(receipt.head, receipt.state)
    return Availability(id_, "unchanged" if receipt.replayed else "changed", receipt.head.version)


@endpoint(
    "POST",
    "/api/inventory/{inventory_item_id:str}/moves",
    action="inventory.change",
    tag="Inventory",
    summary="Record a delivery or a loss",
    description="A loss is a negative quantity, and cannot exceed the stock. A repeat with the same `id` or the"
    " same `Idempotency-Key` counts once.",
    body=MoveStock,
    answer=View(inventory_item.ENTITY, {"available": int | None, "held": int | None, "low": bool | None}),
    errors=(404,),
    headers=("Idempotency-Key",),
    example={"quantity": 24, "reason": "delivery 4711"},
)
async def move_stock(request: Call, inventory_item_id: str) -> ASGIApp:
    key = RequestKey.of(request, "POST /api/inventory/{inventory_item_id}/moves")
    requested = read_body(await request.whole_body(), MoveStock)
    id_ = path_id(inventory_item_id, "inventory_item_id")
    fact = key.fact_id(requested.id, id_)

    def apply(item: InventoryItem, move: StockMove, at: datetime) -> InventoryItem:
        if item.quantity + move.quantity < 0:
            raise Conflict(
                f"the stock is only {item.quantity}", code="below_zero", field="quantity", quantity=item.quantity
            )
        moves = (*item.moves, move)[-_MAX_MOVES_IN_STATE:]
        return msgspec.structs.replace(item, quantity=item.quantity + move.quantity, moves=moves, updated_at=at)

    receipt = await _record_move(
        request, inventory_item.ENTITY, id_, requested, fact, "moves", StockMove, "quantity", apply
    )
    context = context_of(request)
    return receipt_reply(
        receipt, request.identity, **(await context.figures.available(receipt.state.restaurant_id, [receipt.state]))[0]
    )


@endpoint(
    "POST",
    "/api/customers/{customer_id:str}/loyalty",
    action="customers.change",
    tag="Customers",
    summary="Add or redeem loyalty points",
    description="Negative points are redeemed, and cannot exceed what the customer has. A repeat with the same `id`"
    " or the same `Idempotency-Key` counts once.",
    body=MoveLoyalty,
    answer=View(customer.ENTITY, {"loyalty_points": int | None, "total_spent": int | None, "visits": int | None}),
    errors=(404,),
    headers=("Idempotency-Key",),
    example={"points": -50, "reason": "free coffee"},
)
async def move_loyalty(request: Call, customer_id: str) -> ASGIApp:
    key = RequestKey.of(request, "POST /api/customers/{customer_id}/loyalty")
    requested = read_body(await request.whole_body(), MoveLoyalty)
    id_, context, tenant = path_id(customer_id, "customer_id"), context_of(request), request.identity.tenant
    fact = key.fact_id(requested.id, id_)
    restaurant = (await context.menus.book(tenant)).restaurant
    points, counted = 0, frozenset[str]()
    if requested.points < 0:
        before = await context.figures.current_state(customer.ENTITY, tenant, id_)
        found = await context.figures.points(restaurant, before)
        if found is not None:
            points, counted = found
        elif fact.earlier(before.loyalty_moves) is None:
            raise Unavailable("redeeming points needs the database, which is unavailable", retry_after=2.0)

    def apply(one: Customer, move: LoyaltyMove, at: datetime) -> Customer:
        # The second of two concurrent redemptions sees the move of the first one here.
        left = points + sum(other.points for other in one.loyalty_moves if other.id not in counted)
        if move.points < 0 and left + move.points < 0:
            raise Conflict(
                f"the customer has only {max(0, left)} points",
                code="not_enough_points",
                field="points",
                loyalty_points=left,
            )
        moves = (*one.loyalty_moves, move)[-_MAX_MOVES_IN_STATE:]
        return msgspec.structs.replace(one, loyalty_moves=moves, updated_at=at)

    receipt = await _record_move(
        request, customer.ENTITY, id_, requested, fact, "loyalty_moves", LoyaltyMove, "points", apply
    )
    return receipt_reply(receipt, request.identity, **(await context.figures.totals(restaurant, [receipt.state]))[0])


async def _record_move(
    request: Call,
    entity: Any,
    id_: str,
    requested: Any,
    fact: FactId,
    moves_field: str,
    type_: Any,
    amount: str,
    apply: Callable[[Any, Any, datetime], Any],
) -> Receipt:
    """Adds a fact to an entity. All concurrent moves count, and a repeat counts once."""
    value = getattr(requested, amount)
    if value == 0:
        raise InvalidInput("must not be 0", field=amount)
    context, tenant = context_of(request), request.identity.tenant
    old = None
    if fact.repeatable:
        before = await context.figures.current_state(entity, tenant, id_)
        if len(getattr(before, moves_field)) >= _MAX_MOVES_IN_STATE:
            old = await context.figures.move(entity.facts[0], type_, tenant, id_, fact)

    def change(state: Any, at: datetime, _: int) -> tuple[str, Any]:
        earlier = fact.earlier(getattr(state, moves_field)) or old
        if earlier is None:
            check_not_deleted(entity, state)
            kept = {"reason": requested.reason, "request_key": fact.request_key, amount: value}
            return "updated", apply(state, type_(id=fact.id, created_at=at, **kept), at)
        same = (getattr(earlier, amount), earlier.reason) == (value, requested.reason)
        fact.check_repeat(earlier, "move", same=same)
        return "updated", state

    return await context.changes.change(request.identity, entity, id_, None, change, deleted=True, adds_fact=True)


class QueuedJob(Struct, frozen=True):
    position: int
    job: BayJob


@endpoint(
    "GET",
    "/api/bays/{bay_id:str}/queue",
    action="work.read",
    tag="Bays and jobs",
    summary="List the queue of a bay, next job first",
    description="Jobs that are under way, done or cancelled are not in the queue.",
    answer=list[QueuedJob],
    errors=(404,),
)
async def bay_queue(request: Call, bay_id: str) -> ASGIApp:
    id_, context, tenant = path_id(bay_id, "bay_id"), context_of(request), request.identity.tenant
    await context.figures.current_state(bay.ENTITY, tenant, id_)
    queue = await context.figures.queue(tenant, id_)
    return success([QueuedJob(position, one) for position, one in enumerate(queue, start=1)])


ROUTES = [set_availability, move_stock, move_loyalty, bay_queue]
