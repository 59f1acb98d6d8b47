"""The routes of the orders API. A handler parses, calls and replies."""

import contextlib
import re
from typing import Any
from uuid import UUID

from litestar import delete, get, post, put
from litestar.types import ASGIApp

from services.orders.commands import Commands, Done
from services.orders.filters import cursor_after, read_filters
from services.orders.reads import Found, Reads
from services.orders.requests import PlaceOrder, UpdateOrder
from services.orders.views import PENDING, SYNCED, order_view, sync_of
from shared.entities.contract import encode
from shared.errors import InvalidInput, NotFound, Unavailable
from shared.http import Call, Reply, read_body, success
from shared.security import Role

_ETAG = re.compile(r'^(?:W/)?"?([1-9][0-9]{0,8})"?$')
_KEY = re.compile(r"^[\x21-\x7e]{1,200}$")


@post("/api/orders")
async def place_order(request: Call) -> ASGIApp:
    key = request.header(b"idempotency-key")
    if key is not None and not _KEY.match(key):
        raise InvalidInput("1 to 200 visible ASCII characters", field="Idempotency-Key")
    wanted = read_body(await request.whole_body(), PlaceOrder)
    who = request.identity
    done = await _commands(request).place(who, wanted, key)
    sync = PENDING
    if done.replayed:
        with contextlib.suppress(Unavailable):  # it was found a moment ago; how far it has come need not be known
            sync = _sync(await _reads(request).one(who.tenant, done.order.id))
    return _reply(done, status=201, sync=sync)


@get("/api/orders")
async def list_orders(request: Call) -> ASGIApp:
    who = request.identity
    filters = read_filters(dict(request.query_params), session=who.session_id if who.role is Role.CUSTOMER else None)
    page = await _reads(request).page(who.tenant, filters)
    return success(
        [order_view(one.state, one.standing, sync_of(one.document) if one.document else SYNCED) for one in page.found],
        headers={"X-Served-By": "postgres" if page.complete else "mirror"},
        pagination={
            "limit": filters.limit,
            "next_cursor": cursor_after(page.found[-1].order()) if page.more else None,
        },
        complete=page.complete,
    )


@get("/api/orders/{order_id:str}")
async def get_order(request: Call, order_id: str) -> ASGIApp:
    who = request.identity
    found = await _reads(request).one(who.tenant, _id(order_id))
    order = found.seen()
    if who.role is Role.CUSTOMER and order.customer_session_id != who.session_id:
        raise NotFound("no such order")
    if order.deleted_at is not None:
        raise NotFound("the order is deleted", code="order_deleted")
    headers = {"ETag": f'"{found.standing.version}"', "X-Served-By": found.served_by}
    if request.header(b"if-none-match") == headers["ETag"]:
        return Reply(b"", status=304, headers=headers)
    return success(order_view(found.state, found.standing, _sync(found)), headers=headers)


@put("/api/orders/{order_id:str}")
async def update_order(request: Call, order_id: str) -> ASGIApp:
    wanted = read_body(await request.whole_body(), UpdateOrder)
    return _reply(await _commands(request).update(request.identity, _id(order_id), wanted, _version(request)))


@delete("/api/orders/{order_id:str}", status_code=200)
async def delete_order(request: Call, order_id: str) -> ASGIApp:
    return _reply(await _commands(request).delete(request.identity, _id(order_id), _version(request)))


@post("/api/orders/{order_id:str}/restore", status_code=200)
async def restore_order(request: Call, order_id: str) -> ASGIApp:
    return _reply(await _commands(request).restore(request.identity, _id(order_id), _version(request)))


ROUTES = [place_order, list_orders, get_order, update_order, delete_order, restore_order]


# From the application's state: Litestar's dependency injection opens a task group for every request.
def _commands(request: Call) -> Commands:
    commands: Commands = request.app.state["commands"]
    return commands


def _reads(request: Call) -> Reads:
    reads: Reads = request.app.state["reads"]
    return reads


def _reply(done: Done, *, status: int = 200, sync: dict[str, Any] = PENDING) -> ASGIApp:
    headers = {"ETag": f'"{done.standing.version}"'}
    more: dict[str, Any] = {"visible": done.visible}
    if done.replayed:
        headers["Idempotency-Replayed"] = "true"
    if done.durability is not None:
        more["durability"] = done.durability
    return success(order_view(encode(done.order), done.standing, sync, **more), status=status, headers=headers)


def _sync(found: Found) -> dict[str, Any]:
    return sync_of(found.document) if found.document is not None else SYNCED


def _id(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as error:
        raise InvalidInput("a UUID", field="order_id") from error


def _version(request: Call) -> int | None:
    """Of `If-Match`; without it, or with `*`, the present one."""
    text = request.header(b"if-match")
    if text is None or text.strip() == "*":
        return None
    found = _ETAG.match(text.strip())
    if found is None:
        raise InvalidInput('a version, such as "3"', field="If-Match")
    return int(found[1])
