"""An order with its items and payments, as one aggregate with one version.

This file is the model that the services use. The other files of this package are the next one, whose lines, registers
and facts can be merged (docs/orders.md); they import nothing from here.

Money is in minor units of the restaurant's currency, tax in basis points. Payments are facts: each one is kept from
every snapshot, and the payment status is derived from them.
"""

from collections.abc import Mapping
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.entities.contract import Amount, Id, Label, Lane, Money, Text, Time, encode
from shared.entities.entity import Children, Column, Entity, Facts, Hold, Keyed, Numbering, OnConflict, Table, columns
from shared.entities.order.state import Customization as Customization
from shared.entities.order.state import OrderStatus as OrderStatus

_NEXT = {
    OrderStatus.PENDING: (OrderStatus.RECEIVED, OrderStatus.CANCELLED),
    OrderStatus.RECEIVED: (OrderStatus.PREPARING, OrderStatus.CANCELLED),
    OrderStatus.PREPARING: (OrderStatus.READY, OrderStatus.CANCELLED),
    OrderStatus.READY: (OrderStatus.COMPLETED, OrderStatus.CANCELLED),
    OrderStatus.COMPLETED: (),
    OrderStatus.CANCELLED: (),
}


def allowed_next(status: OrderStatus) -> tuple[OrderStatus, ...]:
    """Returns the statuses that may follow: pending → received → preparing → ready → completed. An order may be
    cancelled in any status before completed."""
    return _NEXT[status]


def items_may_change(status: OrderStatus) -> bool:
    """Returns whether the items may still change. They are fixed once the kitchen has begun."""
    return status in (OrderStatus.PENDING, OrderStatus.RECEIVED)


class PaymentStatus(StrEnum):
    PENDING = "pending"
    PARTIALLY_PAID = "partially_paid"
    PAID = "paid"
    REFUNDED = "refunded"


Quantity = Annotated[int, Meta(ge=1, le=1_000)]


class OrderItem(Struct, frozen=True, kw_only=True):
    menu_item_id: Id
    name: Label
    quantity: Quantity
    unit_price: Money
    line_total: Money
    special_instructions: Text | None = None
    customizations: tuple[Customization, ...] = ()


class StockHold(Struct, frozen=True, omit_defaults=True):
    """The amount of one inventory item that an order holds. If the order later needs more, the additional amount
    becomes a separate hold, because the stock may have been counted in the meantime."""

    inventory_item_id: Id
    quantity: Money
    held_at: Time | None = None
    """The time from which the hold counts. None means the time when the order was placed."""


class Payment(Struct, frozen=True, kw_only=True):
    """A payment, or a refund if `amount` is negative."""

    id: Id
    amount: Amount
    method: Label
    created_at: Time
    reference: Label | None = None
    request_key: Id | UnsetType = UNSET
    """What was derived from the Idempotency-Key of a request that also had an id."""


class Order(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    order_number: Annotated[str, Meta(max_length=40, pattern="^[^\\x00]*$")]
    business_day: date
    status: OrderStatus
    items: Annotated[tuple[OrderItem, ...], Meta(max_length=1_000)]
    currency: Annotated[str, Meta(pattern="^[A-Z]{3}$", examples=["EUR"])]
    subtotal: Money
    tax_basis_points: Annotated[int, Meta(ge=0, le=10_000)]
    tax_amount: Money
    tip_amount: Money
    discount_amount: Money
    deposit_used: Money
    total: Money
    created_at: Time
    updated_at: Time
    table_id: Id | None = None
    customer_name: Label | None = None
    customer_phone: Label | None = None
    customer_session_id: Label | None = None
    payment_method: Label | None = None
    payment_status: PaymentStatus = PaymentStatus.PENDING
    payments: tuple[Payment, ...] = ()
    notes: Text | None = None
    special_instructions: Text | None = None
    placed_by: Label | None = None
    """Id of the user, or of the guest's session, that placed the order."""
    request_hash: str | None = None
    """SHA-256 of the request if it had an Idempotency-Key. A request that repeats the key must have the same body."""
    deleted_at: Time | None = None
    customer_id: Id | None = None
    external_id: Label | None = None
    """The order's id in another system. The order's own id is derived from it."""
    holds: tuple[StockHold, ...] = ()


def payment_status(payments: tuple[Payment, ...], total: int) -> PaymentStatus:
    """Returns the payment status, which is always derived and never set. `refunded` means that there were payments and
    all of them are refunded. An order with nothing to pay, because it is free or a deposit covers it, is `paid`."""
    paid = sum(payment.amount for payment in payments)
    if not payments:
        return PaymentStatus.PENDING if total else PaymentStatus.PAID
    if paid <= 0 and any(payment.amount < 0 for payment in payments):
        return PaymentStatus.REFUNDED
    return PaymentStatus.PAID if paid >= total else PaymentStatus.PARTIALLY_PAID


def _held(order: Order) -> list[Hold]:
    """Returns the holds of an order. Every quantity is 0 if the order is cancelled or deleted."""
    released = order.status is OrderStatus.CANCELLED or order.deleted_at is not None
    return [
        (hold.inventory_item_id, 0 if released else hold.quantity, hold.held_at or order.created_at)
        for hold in order.holds
    ]


def next_hold_at(order: Order, at: datetime) -> datetime:
    """Returns the time of a further hold of the order. It differs from those of all holds that the order has, whatever
    the clock says, so that the claim can tell which holds are new."""
    held = [hold.held_at or order.created_at for hold in order.holds]
    return max(at, max(held) + timedelta(microseconds=1)) if held else at


def held_again(order: Order, at: datetime) -> tuple[StockHold, ...]:
    """Returns the holds of an order that had released them. They begin again, because the stock may have been counted
    meanwhile."""
    at = next_hold_at(order, at)
    return tuple(msgspec.structs.replace(hold, held_at=at) for hold in order.holds)


def _restamped(order: Order, before: Order | None, stamps: Mapping[str, datetime]) -> Order:
    known = {(item, at) for item, _, at in _held(before)} if before is not None else set()
    holds = tuple(
        msgspec.structs.replace(hold, held_at=stamps[hold.inventory_item_id])
        if hold.inventory_item_id in stamps and (hold.inventory_item_id, hold.held_at or order.created_at) not in known
        else hold
        for hold in order.holds
    )
    return msgspec.structs.replace(order, holds=holds)


def _hold_rows(order: Order) -> list[StockHold]:
    """Returns the holds with `held_at` set in each one, because the index of the table contains that column."""
    return [msgspec.structs.replace(hold, held_at=hold.held_at or order.created_at) for hold in order.holds]


ENTITY = Entity(
    name="order",
    alias="SaleOrder",
    state=Order,
    events=frozenset({"created", "updated", "status_changed", "payment_recorded", "deleted", "restored"}),
    lane=Lane.CRITICAL,
    on_conflict=OnConflict.TERMINAL_WINS,
    live=lambda order: order.status not in (OrderStatus.COMPLETED, OrderStatus.CANCELLED) and order.deleted_at is None,
    window_sql="(t.updated_at >= $1 or (t.status not in ('completed', 'cancelled') and t.deleted_at is null))",
    keyed=Keyed(mark='"request_hash":"', sql="request_hash is not null"),
    table=Table(
        "orders",
        (
            *columns(
                "order_number text",
                "business_day date",
                "status text",
                "table_id uuid",
                "customer_name text",
                "customer_phone text",
                "customer_session_id text",
                "currency text",
                "subtotal int8",
                "tax_basis_points int4",
                "tax_amount int8",
                "tip_amount int8",
                "discount_amount int8",
                "deposit_used int8",
                "total int8",
                "payment_method text",
                "payment_status text",
                "notes text",
                "special_instructions text",
                "placed_by text",
                "request_hash text",
                "customer_id uuid",
                "external_id text",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            ),
        ),
    ),
    children=(
        Children(
            name="order_items",
            parent="order_id",
            columns=(
                *columns("menu_item_id uuid", "name text", "quantity int4", "unit_price int8", "line_total int8"),
                *columns("special_instructions text"),
                Column("customizations", "jsonb", lambda item: encode(item.customizations).decode()),
            ),
            rows=lambda order: order.items,
        ),
        Children(
            name="order_holds",
            parent="order_id",
            columns=tuple(columns("inventory_item_id uuid", "quantity int8", "held_at timestamptz")),
            rows=_hold_rows,
        ),
    ),
    facts=(
        Facts(
            name="payments",
            parent="order_id",
            columns=(
                *columns("amount int8", "method text", "reference text", "created_at timestamptz"),
                Column("request_key", "uuid", lambda one: None if one.request_key is UNSET else one.request_key),
            ),
            field="payments",
        ),
    ),
    holds=_held,
    restamp=_restamped,
    numbering=Numbering(
        business_day=lambda order: order.business_day.isoformat(),
        number=lambda order: order.order_number,
        with_number=lambda order, number: msgspec.structs.replace(order, order_number=number),
        field="order_number",
    ),
)
