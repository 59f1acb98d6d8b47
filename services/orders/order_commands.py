"""The commands on orders: place, update, delete, restore, record again, pay. Each command builds the new state by the
rules, and entity_changes.py commits it."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from msgspec import UNSET

from services.orders.entity_changes import EntityChanges, Receipt, actor_of, check_not_deleted
from services.orders.entity_reads import FoundState
from services.orders.idempotency import RequestKey
from services.orders.menu import MenuBook, Menus
from services.orders.pricing import holds, priced_items, totals
from services.orders.requests import PlaceOrder, RecordPayment, UpdateOrder
from shared.entities import order as orders
from shared.entities.menu_item import MenuItem
from shared.entities.order import (
    Order,
    OrderStatus,
    Payment,
    allowed_next,
    held_again,
    items_may_change,
    next_hold_at,
    payment_status,
)
from shared.errors import Conflict, Forbidden, InvalidInput
from shared.http.etags import Versions
from shared.rail.idempotency import FactId
from shared.rail.outcomes import OutOfStock
from shared.security.permissions import may
from shared.security.tokens import Identity, Role

_ENTITY = orders.ENTITY
_MAX_PAYMENTS = 1_000
_MAX_PAID_MINOR_UNITS = 10**12


class OrderCommands:
    def __init__(self, changes: EntityChanges, menus: Menus) -> None:
        self._changes = changes
        self._menus = menus

    async def place(self, identity: Identity, requested: PlaceOrder, body: bytes, key: RequestKey) -> Receipt:
        """Places an order. `body`: the request as it was sent. Raises InvalidInput, Forbidden, Conflict (out of stock),
        Unavailable, OutcomeUnknown."""
        session = _session(identity, requested)
        id_ = key.entity_id()
        sha256 = key.hash_of(body)
        book = await self._menus.book(identity.tenant)
        try:
            return await self._changes.create(
                identity,
                _ENTITY,
                id_,
                lambda at: _new_order(id_, book, requested, at, session, identity, sha256),
                request_hash=sha256,
            )
        except OutOfStock as error:
            raise _out_of_stock(error, identity, requested, book) from error

    async def update(self, identity: Identity, id_: str, requested: UpdateOrder, versions: Versions | None) -> Receipt:
        """Changes an order. Raises NotFound, Conflict (with the allowed statuses, or the head version), InvalidInput,
        Unavailable."""
        book = await self._menus.book(identity.tenant)

        def change(order: Order, at: datetime, _: int) -> tuple[str, Order]:
            changed = _updated(order, requested, book, at)
            return ("status_changed" if changed.status is not order.status else "updated"), changed

        try:
            return await self._changes.change(identity, _ENTITY, id_, versions, change)
        except OutOfStock as error:
            raise _out_of_stock(error, identity, requested, book) from error

    async def delete(self, identity: Identity, id_: str, versions: Versions | None) -> Receipt:
        def change(order: Order, at: datetime, _: int) -> tuple[str, Order]:
            if order.status is OrderStatus.COMPLETED:
                raise Conflict("a completed order cannot be deleted", code="order_completed", status=order.status)
            return "deleted", msgspec.structs.replace(order, deleted_at=at, updated_at=at)

        return await self._changes.change(identity, _ENTITY, id_, versions, change)

    async def restore(self, identity: Identity, id_: str, versions: Versions | None) -> Receipt:
        def change(order: Order, at: datetime, _: int) -> tuple[str, Order]:
            if order.deleted_at is None:
                raise Conflict("the order is not deleted", code="not_deleted")
            return "restored", msgspec.structs.replace(
                order, deleted_at=None, updated_at=at, holds=held_again(order, at)
            )

        try:
            return await self._changes.change(identity, _ENTITY, id_, versions, change, deleted=True)
        except OutOfStock as error:
            raise Conflict(
                "the stock that the order needs has been sold", code="out_of_stock", items=_available_amounts(error)
            ) from error

    async def record_again(self, identity: Identity, found: FoundState) -> Receipt:
        """Records the current state as a new change. Raises Conflict if the order has changed since it was read."""

        def change(order: Order, at: datetime, _: int) -> tuple[str, Order]:
            return "updated", msgspec.structs.replace(order, updated_at=at)

        id_ = found.decoded().id
        return await self._changes.change(
            identity, _ENTITY, id_, frozenset({str(found.head.version)}), change, deleted=True
        )

    async def pay(
        self, identity: Identity, id_: str, requested: RecordPayment, fact: FactId
    ) -> tuple[Receipt, Payment]:
        """Records a payment, or a refund (a negative amount). All concurrent payments count, and a repeat with the same
        id counts once. `fact`: the id of the payment. Raises NotFound, Conflict, InvalidInput, Unavailable,
        OutcomeUnknown."""
        if requested.amount == 0:
            raise InvalidInput("must not be 0", field="amount", code="invalid_input")

        def change(order: Order, at: datetime, _: int) -> tuple[str, Order]:
            earlier = fact.earlier(order.payments)
            if earlier is not None:
                found, sent = ((one.amount, one.method, one.reference) for one in (earlier, requested))
                fact.check_repeat(earlier, "payment", same=found == sent)
                return "payment_recorded", order
            check_not_deleted(_ENTITY, order)
            _check_payment(order, requested)
            payment = Payment(
                id=fact.id,
                amount=requested.amount,
                method=requested.method,
                created_at=at,
                reference=requested.reference,
                request_key=fact.request_key,
            )
            payments = (*order.payments, payment)
            return "payment_recorded", msgspec.structs.replace(
                order, payments=payments, payment_status=payment_status(payments, order.total), updated_at=at
            )

        receipt = await self._changes.change(identity, _ENTITY, id_, None, change, deleted=True, adds_fact=True)
        payment = fact.earlier(receipt.state.payments) or receipt.state.payments[-1]
        return receipt, msgspec.structs.replace(payment, request_key=UNSET)


def _check_payment(order: Order, requested: RecordPayment) -> None:
    paid = sum(one.amount for one in order.payments)
    if requested.amount < 0 and -requested.amount > paid:
        raise Conflict(
            f"a refund of {-requested.amount} is more than the {paid} that was paid",
            code="refund_above_paid",
            field="amount",
            paid=paid,
        )
    if requested.amount > 0 and order.status is OrderStatus.CANCELLED:
        raise Conflict("a cancelled order cannot be paid", code="order_cancelled", field="amount")
    if len(order.payments) >= _MAX_PAYMENTS or paid + requested.amount > _MAX_PAID_MINOR_UNITS:
        raise Conflict("the order has too many payments", code="too_many_payments", field="amount")


def _out_of_stock(
    error: OutOfStock, identity: Identity, requested: PlaceOrder | UpdateOrder, book: MenuBook
) -> Conflict:
    """Returns a Conflict with the requested items that lack stock, and with the available amounts for a caller who may
    read the stock."""
    items = requested.items if requested.items is not UNSET else []
    short = {id_ for id_, _ in error.left}
    indexes = [index for index, item in enumerate(items) if short & _consumed_by(item.menu_item_id, book.menu)]
    names = dict.fromkeys(book.menu[str(items[index].menu_item_id)].name for index in indexes)
    first = indexes[0] if indexes else 0
    details: dict[str, Any] = {"field": f"items[{first}].quantity"}
    if may(identity, "inventory.read"):
        details["items"] = [
            {**one, "menu_item_ids": sorted(_dishes_that_consume(one["inventory_item_id"], book.menu, items))}
            for one in _available_amounts(error)
        ]
    message = f"not enough stock for {', '.join(names)}" if names else "not enough stock"
    return Conflict(message, code="out_of_stock", **details)


def _available_amounts(error: OutOfStock) -> list[dict[str, Any]]:
    return [{"inventory_item_id": id_, "available": left} for id_, left in error.left]


def _consumed_by(dish_id: UUID, menu: Mapping[str, MenuItem]) -> set[str]:
    dish = menu.get(str(dish_id))
    return {one.inventory_item_id for one in dish.consumes} if dish is not None else set()


def _dishes_that_consume(inventory_item: str, menu: Mapping[str, MenuItem], items: Any) -> set[str]:
    return {str(item.menu_item_id) for item in items if inventory_item in _consumed_by(item.menu_item_id, menu)}


def _session(identity: Identity, requested: PlaceOrder) -> str | None:
    if not may(identity, "orders.change"):  # a customer, or the API key of a web shop
        for field in ("discount_amount", "deposit_used", "customer_id"):
            if getattr(requested, field):
                raise Forbidden("only callers who may change orders may set this field", field=field)
    if requested.table_id is not None and not may(identity, "tables.read"):
        raise Forbidden("an API key without the scope tables:read may not order for a table", field="table_id")
    if identity.role is not Role.CUSTOMER:
        return requested.customer_session_id
    if requested.customer_session_id not in (None, identity.session_id):
        raise Forbidden("a customer may order only for its own session", field="customer_session_id")
    if identity.table_id is not None and requested.table_id not in (None, UUID(identity.table_id)):
        raise Forbidden("a guest may order only for its own table", field="table_id", code="wrong_table")
    return identity.session_id


def _table(identity: Identity, requested: PlaceOrder) -> str | None:
    """Returns the table of the guest, or the one that the request names."""
    return identity.table_id or (str(requested.table_id) if requested.table_id else None)


def _new_order(
    id_: str,
    book: MenuBook,
    requested: PlaceOrder,
    at: datetime,
    session: str | None,
    identity: Identity,
    request_hash: str | None,
) -> Order:
    restaurant = book.restaurant
    items = priced_items(requested.items, book.menu)
    sums = totals(
        items,
        basis_points=restaurant.tax_basis_points,
        tip=requested.tip_amount,
        discount=requested.discount_amount,
        deposit=requested.deposit_used,
    )
    return Order(
        id=id_,
        restaurant_id=restaurant.id,
        order_number="",
        business_day=restaurant.business_day(at),
        status=OrderStatus.PENDING,
        items=items,
        currency=restaurant.currency,
        subtotal=sums.subtotal,
        tax_basis_points=restaurant.tax_basis_points,
        tax_amount=sums.tax_amount,
        tip_amount=requested.tip_amount,
        discount_amount=requested.discount_amount,
        deposit_used=requested.deposit_used,
        total=sums.total,
        created_at=at,
        updated_at=at,
        table_id=_table(identity, requested),
        customer_id=str(requested.customer_id) if requested.customer_id else None,
        customer_name=requested.customer_name,
        customer_phone=requested.customer_phone,
        customer_session_id=session,
        payment_method=requested.payment_method,
        payment_status=payment_status((), sums.total),
        notes=requested.notes,
        special_instructions=requested.special_instructions,
        placed_by=actor_of(identity),
        request_hash=request_hash,
        holds=holds(items, book.menu),
    )


def _updated(order: Order, requested: UpdateOrder, book: MenuBook, at: datetime) -> Order:
    fields: dict[str, Any] = {
        name: str(value) if isinstance(value, UUID) else value
        for name in requested.__struct_fields__
        if (value := getattr(requested, name)) is not UNSET
    }
    if requested.status is not UNSET and requested.status is not order.status:
        allowed = allowed_next(order.status)
        if requested.status not in allowed:
            raise Conflict(
                f"an order that is {order.status} cannot become {requested.status}",
                code="illegal_status",
                field="status",
                status=order.status,
                allowed=list(allowed),
            )
    if requested.items is not UNSET:
        if not items_may_change(order.status):
            raise Conflict(
                f"the items of an order that is {order.status} cannot change", code="items_are_fixed", field="items"
            )
        fields["items"] = priced_items(requested.items, book.menu)
        fields["holds"] = holds(fields["items"], book.menu, order.holds, next_hold_at(order, at))
    changed = msgspec.structs.replace(order, **fields, updated_at=at)
    sums = totals(
        changed.items,
        basis_points=changed.tax_basis_points,
        tip=changed.tip_amount,
        discount=changed.discount_amount,
        deposit=changed.deposit_used,
    )
    return msgspec.structs.replace(
        changed,
        subtotal=sums.subtotal,
        tax_amount=sums.tax_amount,
        total=sums.total,
        payment_status=payment_status(changed.payments, sums.total),
    )
