"""What clients ask to happen to an order: place, update, delete, restore.

Each builds the state that is wanted, from the rules, and commits it. A lost claim is tried again on what stands then,
where the caller named no version and the change is still legal.
"""

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

import msgspec
from msgspec import UNSET, Struct

from services.orders.menu import MenuBook, Menus
from services.orders.pricing import priced_items, totals
from services.orders.reads import Reads
from services.orders.requests import PlaceOrder, UpdateOrder
from shared.entities import order as orders
from shared.entities.contract import Standing, encode, now
from shared.entities.order import Order, Status, allowed_next, items_may_change
from shared.errors import Conflict, Forbidden, InvalidInput, NotFound, Unavailable
from shared.rail.commit import Committed, Draft, Lost, Rail
from shared.rail.record import Durability
from shared.security import Identity, Role

_NAMESPACE = uuid5(NAMESPACE_URL, "https://ticketrail.example/idempotency-key")
_TRIES_AGAIN = 3
# How long a repeat waits for its twin: longer than a claim takes to be called stale, so that it can finish it.
_TWIN_SECONDS = 4.0


class Done(Struct, frozen=True):
    order: Order
    standing: Standing
    durability: Durability | None
    """None for a replay."""
    visible: bool = True
    replayed: bool = False


class Commands:
    def __init__(self, rail: Rail, reads: Reads, menus: Menus) -> None:
        self._rail = rail
        self._reads = reads
        self._menus = menus

    # -- place -------------------------------------------------------------------------------------------------

    async def place(self, who: Identity, wanted: PlaceOrder, key: str | None) -> Done:
        """Raises InvalidInput, Forbidden, Unavailable, OutcomeUnknown."""
        if who.role is Role.OPERATOR:
            raise Forbidden("operators place no orders")
        restaurant = who.tenant
        session = _session(who, wanted)
        id_, request_hash = str(uuid4()), None
        if key is not None:
            id_ = str(uuid5(_NAMESPACE, f"{restaurant}|{who.user_id}|{who.session_id or ''}|POST /api/orders|{key}"))
            request_hash = hashlib.sha256(encode(wanted)).hexdigest()
        book = await self._menus.book(restaurant)
        at = now()
        try:
            order = _new_order(id_, book, wanted, at, session, who, request_hash)
        except InvalidInput:
            # The menu may have changed since this very request was accepted: then it is a repeat.
            with contextlib.suppress(Unavailable):
                if key is not None and (earlier := await self._earlier(restaurant, id_)):
                    return _replay(*earlier, request_hash)
            raise
        draft = Draft(
            entity=orders.ENTITY,
            event="created",
            state=order,
            base=None,
            before=None,
            at=at,
            source="orders",
            existing=None if key is None else lambda: self._earlier(restaurant, id_),
        )
        deadline = time.monotonic() + _TWIN_SECONDS
        while True:
            try:
                return _done(await self._rail.commit(draft))
            except Lost as lost:
                if lost.standing is not None and lost.state is None:
                    raise Unavailable("the order was placed before and cannot be read now", retry_after=2.0) from lost
                if lost.standing is not None:
                    return _replay(lost.standing, lost.state, request_hash)
                if time.monotonic() > deadline:
                    raise Conflict(
                        "the same request is under way", code="in_progress", field="Idempotency-Key"
                    ) from lost
            await _pause(2)

    async def _earlier(self, restaurant: str, id_: str) -> tuple[Standing, Order] | None:
        """What the same key has placed before; raises Unavailable where no store can tell."""
        try:
            found = await self._reads.one(restaurant, id_)
        except NotFound:
            return None
        return found.standing, found.order()

    # -- change ------------------------------------------------------------------------------------------------

    async def update(self, who: Identity, id_: str, wanted: UpdateOrder, version: int | None) -> Done:
        """Raises NotFound, Conflict (with what is allowed, or the version that stands), InvalidInput, Unavailable."""
        if who.role not in (Role.ADMIN, Role.STAFF):
            raise Forbidden("only staff and admins change orders")
        book = await self._menus.book(who.tenant)

        def change(order: Order, at: datetime) -> tuple[str, Order]:
            changed = _updated(order, wanted, book, at)
            return ("status_changed" if changed.status is not order.status else "updated"), changed

        return await self._change(who, id_, version, change)

    async def delete(self, who: Identity, id_: str, version: int | None) -> Done:
        if who.role not in (Role.ADMIN, Role.STAFF):
            raise Forbidden("only staff and admins delete orders")

        def change(order: Order, at: datetime) -> tuple[str, Order]:
            if order.status is Status.COMPLETED:
                raise Conflict("a completed order is not deleted", code="order_completed", status=order.status)
            return "deleted", msgspec.structs.replace(order, deleted_at=at, updated_at=at)

        return await self._change(who, id_, version, change)

    async def restore(self, who: Identity, id_: str, version: int | None) -> Done:
        if who.role not in (Role.ADMIN, Role.STAFF):
            raise Forbidden("only staff and admins restore orders")

        def change(order: Order, at: datetime) -> tuple[str, Order]:
            if order.deleted_at is None:
                raise Conflict("the order is not deleted", code="not_deleted")
            return "restored", msgspec.structs.replace(order, deleted_at=None, updated_at=at)

        return await self._change(who, id_, version, change, deleted=True)

    async def _change(
        self,
        who: Identity,
        id_: str,
        version: int | None,
        change: Callable[[Order, datetime], tuple[str, Order]],
        *,
        deleted: bool = False,
    ) -> Done:
        tried = 0
        while True:
            found = await self._reads.base(who.tenant, id_)
            before = found.order()
            if before.deleted_at is not None and not deleted:
                raise NotFound("the order is deleted", code="order_deleted")
            if version is not None and version != found.standing.version:
                raise _conflict(found.standing)
            at = max(now(), before.updated_at)
            event, after = change(before, at)
            draft = Draft(
                entity=orders.ENTITY,
                event=event,
                state=after,
                base=found.standing,
                before=before,
                at=at,
                source="orders",
            )
            try:
                return _done(await self._rail.commit(draft))
            except Lost as lost:
                if version is not None or tried == _TRIES_AGAIN:
                    raise _conflict(lost.standing) from lost
            tried += 1
            await _pause(tried)


async def _pause(times: int) -> None:
    """Jittered, about as long as a commit takes, so that those who lost do not meet again."""
    await asyncio.sleep(0.01 * times * random.uniform(0.5, 1.5))  # noqa: S311  (jitter)


def _done(committed: Committed) -> Done:
    return Done(committed.state, committed.standing, committed.durability, committed.visible)


def _replay(standing: Standing, order: Order, request_hash: str | None) -> Done:
    if order.request_hash != request_hash:
        raise InvalidInput(
            "this key was used for another request", field="Idempotency-Key", code="idempotency_key_reused"
        )
    return Done(order, standing, None, replayed=True)


def _conflict(standing: Standing | None) -> Conflict:
    details: dict[str, Any] = {"field": "If-Match"}
    if standing is not None:
        details["version"] = standing.version
    return Conflict("another change came first", code="version_conflict", **details)


def _session(who: Identity, wanted: PlaceOrder) -> str | None:
    if who.role is not Role.CUSTOMER:
        return wanted.customer_session_id
    if wanted.customer_session_id not in (None, who.session_id):
        raise Forbidden("a customer orders for its own session", field="customer_session_id")
    for field in ("discount_amount", "deposit_used"):
        if getattr(wanted, field):
            raise Forbidden("only staff and admins reduce what is to be paid", field=field)
    return who.session_id


def _new_order(
    id_: str,
    book: MenuBook,
    wanted: PlaceOrder,
    at: datetime,
    session: str | None,
    who: Identity,
    request_hash: str | None,
) -> Order:
    restaurant = book.restaurant
    items = priced_items(wanted.items, book.menu)
    sums = totals(
        items,
        basis_points=restaurant.tax_basis_points,
        tip=wanted.tip_amount,
        discount=wanted.discount_amount,
        deposit=wanted.deposit_used,
    )
    return Order(
        id=id_,
        restaurant_id=restaurant.id,
        order_number="",
        business_day=restaurant.business_day(at),
        status=Status.PENDING,
        items=items,
        currency=restaurant.currency,
        subtotal=sums.subtotal,
        tax_basis_points=restaurant.tax_basis_points,
        tax_amount=sums.tax_amount,
        tip_amount=wanted.tip_amount,
        discount_amount=wanted.discount_amount,
        deposit_used=wanted.deposit_used,
        total=sums.total,
        created_at=at,
        updated_at=at,
        table_id=str(wanted.table_id) if wanted.table_id else None,
        customer_name=wanted.customer_name,
        customer_phone=wanted.customer_phone,
        customer_session_id=session,
        payment_method=wanted.payment_method,
        notes=wanted.notes,
        special_instructions=wanted.special_instructions,
        placed_by=who.session_id or who.user_id,
        request_hash=request_hash,
    )


def _updated(order: Order, wanted: UpdateOrder, book: MenuBook, at: datetime) -> Order:
    fields: dict[str, Any] = {
        name: str(value) if name == "table_id" and value is not None else value
        for name in wanted.__struct_fields__
        if (value := getattr(wanted, name)) is not UNSET
    }
    if wanted.status is not UNSET and wanted.status is not order.status:
        allowed = allowed_next(order.status)
        if wanted.status not in allowed:
            raise Conflict(
                f"an order that is {order.status} cannot become {wanted.status}",
                code="illegal_status",
                field="status",
                status=order.status,
                allowed=list(allowed),
            )
    if wanted.items is not UNSET:
        if not items_may_change(order.status):
            raise Conflict(f"the items of an order that is {order.status} stand", code="items_are_fixed", field="items")
        fields["items"] = priced_items(wanted.items, book.menu)
    changed = msgspec.structs.replace(order, **fields, updated_at=at)
    sums = totals(
        changed.items,
        basis_points=changed.tax_basis_points,
        tip=changed.tip_amount,
        discount=changed.discount_amount,
        deposit=changed.deposit_used,
    )
    return msgspec.structs.replace(changed, subtotal=sums.subtotal, tax_amount=sums.tax_amount, total=sums.total)
