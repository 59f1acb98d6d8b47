"""/api/orders: place, list, read, change, delete and restore orders."""

import contextlib
import math
from typing import Any

from litestar.types import ASGIApp

from services.orders.idempotency import RequestKey
from services.orders.lists import list_reply, selection
from services.orders.order_example import ORDER, REQUEST
from services.orders.requests import OrdersQuery, PlaceOrder, UpdateOrder
from services.orders.route_context import context_of, found_reply, receipt_reply
from services.orders.views import sync_of
from shared.entities import order as orders
from shared.errors import NotFound, TooManyRequests, Unavailable
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.endpoint import View, endpoint, path_id, read_query
from shared.http.etags import is_known, required_versions
from shared.security.tokens import Role

_TAG = "Orders"
_ENTITY = orders.ENTITY
_VIEW = View(_ENTITY)


@endpoint(
    "POST",
    "/api/orders",
    action="orders.place",
    tag=_TAG,
    summary="Place an order",
    description="The server sets the prices. A customer orders for its own session, a guest at a table for that table: "
    "the table is filled in, and another one is refused (`wrong_table`).",
    body=PlaceOrder,
    answer=_VIEW,
    status=201,
    errors=(404,),
    headers=("Idempotency-Key",),
    example=REQUEST,
    reply_example=ORDER,
)
async def place_order(request: Call) -> ASGIApp:
    key, body = RequestKey.of(request, "POST /api/orders"), await request.whole_body()
    requested = read_body(body, PlaceOrder)
    identity, context = request.identity, context_of(request)
    if identity.role is Role.CUSTOMER:
        wait, _ = await context.guest_orders.take(f"{identity.tenant}/{identity.session_id}")
        if wait:
            raise TooManyRequests("this session has placed many orders; wait a moment", retry_after=math.ceil(wait))
    receipt = await context.order_commands.place(identity, requested, body, key)
    more: dict[str, Any] = {}
    if receipt.replayed:
        # The reply is complete without the sync state, so a failed read does not matter.
        with contextlib.suppress(Unavailable, NotFound):
            more["sync"] = sync_of(await context.reads.one(_ENTITY, identity.tenant, receipt.state.id), identity)
    return receipt_reply(receipt, request.identity, status=201, **more)


@endpoint(
    "GET",
    "/api/orders",
    action="orders.read",
    tag=_TAG,
    summary="List orders, newest first",
    description="A customer sees the orders of its own session. `status` may be repeated. `next_cursor` of a page"
    " leads to the next one.",
    query=OrdersQuery,
    answer=_VIEW,
    many=True,
)
async def list_orders(request: Call) -> ASGIApp:
    identity = request.identity
    query = read_query(request, OrdersQuery)
    own = {"customer_session_id": identity.session_id} if identity.role is Role.CUSTOMER else {}
    page = await context_of(request).reads.page(
        _ENTITY, identity.tenant, selection(query, identity, **own), query.sync_state
    )
    return list_reply(_ENTITY, page, query, identity)


@endpoint(
    "GET",
    "/api/orders/{order_id:str}",
    action="orders.read",
    tag=_TAG,
    summary="Read an order",
    description="A deleted order is not found. With `If-None-Match`, the answer is 304 while the client has the"
    " current version.",
    answer=_VIEW,
    errors=(404,),
    headers=("If-None-Match",),
    not_modified=True,
)
async def get_order(request: Call, order_id: str) -> ASGIApp:
    identity = request.identity
    found = await context_of(request).reads.one(_ENTITY, identity.tenant, path_id(order_id, "order_id"))
    order = found.access_fields()
    if identity.role is Role.CUSTOMER and order.customer_session_id != identity.session_id:
        raise NotFound("no such order")
    if order.deleted_at is not None:
        raise NotFound("the order is deleted", code="order_deleted")
    return found_reply(found, identity, known=is_known(request, found.head.version))


@endpoint(
    "PUT",
    "/api/orders/{order_id:str}",
    action="orders.change",
    tag=_TAG,
    summary="Change an order or its status",
    description="pending → received → preparing → ready → completed. Every status but completed can become cancelled.",
    body=UpdateOrder,
    answer=_VIEW,
    errors=(404,),
    headers=("If-Match",),
    example={"status": "received"},
)
async def update_order(request: Call, order_id: str) -> ASGIApp:
    requested = read_body(await request.whole_body(), UpdateOrder)
    id_, versions = path_id(order_id, "order_id"), required_versions(request)
    identity, commands = request.identity, context_of(request).order_commands
    return receipt_reply(await commands.update(identity, id_, requested, versions), identity)


@endpoint(
    "DELETE",
    "/api/orders/{order_id:str}",
    action="orders.change",
    tag=_TAG,
    summary="Delete an order; it can be restored",
    description="Lists and reads leave it out, and its stock is free again. A completed order cannot be deleted.",
    answer=_VIEW,
    errors=(404,),
    headers=("If-Match",),
)
async def delete_order(request: Call, order_id: str) -> ASGIApp:
    id_, versions = path_id(order_id, "order_id"), required_versions(request)
    identity, commands = request.identity, context_of(request).order_commands
    return receipt_reply(await commands.delete(identity, id_, versions), identity)


@endpoint(
    "POST",
    "/api/orders/{order_id:str}/restore",
    action="orders.change",
    tag=_TAG,
    summary="Restore a deleted order",
    description="The order takes its stock again. If that has been sold, the reply is 409 `out_of_stock`.",
    answer=_VIEW,
    errors=(404,),
    headers=("If-Match",),
)
async def restore_order(request: Call, order_id: str) -> ASGIApp:
    id_, versions = path_id(order_id, "order_id"), required_versions(request)
    identity, commands = request.identity, context_of(request).order_commands
    return receipt_reply(await commands.restore(identity, id_, versions), identity)


@endpoint(
    "POST",
    "/api/orders/{order_id:str}/sync",
    action="orders.change",
    tag=_TAG,
    summary="Record a pending order again",
    description="Records the current state of a pending or failed order as a new change. Nothing changes if"
    " PostgreSQL has the state.",
    answer=_VIEW,
    errors=(404,),
)
async def sync_order(request: Call, order_id: str) -> ASGIApp:
    id_, context = path_id(order_id, "order_id"), context_of(request)
    found = await context.reads.one(_ENTITY, request.identity.tenant, id_)
    if found.document is None or not found.document.pending:
        return found_reply(found, request.identity)
    return receipt_reply(await context.order_commands.record_again(request.identity, found), request.identity)


ROUTES = [place_order, list_orders, get_order, update_order, delete_order, restore_order, sync_order]
