"""Orders of other systems: what they send, and the state that it makes. Pure.

The other system is the one that priced it: its prices, names and numbers are kept. What it leaves out is computed. Its
payments are facts: they are added to those that are known, never taken away, from what comes late too.
"""

from datetime import datetime, timedelta
from typing import Annotated
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec
from msgspec import Meta, Struct

from shared.entities.contract import Amount, Label, Lane, Money, Text, Time, in_range
from shared.entities.order import (
    Customization,
    Order,
    OrderItem,
    OrderStatus,
    Payment,
    Quantity,
    payment_status,
)
from shared.errors import Conflict, InvalidInput
from shared.restaurants import Restaurant

_NAMESPACE = uuid5(NAMESPACE_URL, "https://ticketrail.example/external-order")
_MOST = 10**12
_MOST_PAYMENTS = 1_000
_TODAY = timedelta(days=1)
_OVER = (OrderStatus.COMPLETED, OrderStatus.CANCELLED)
_RANK = {status: rank for rank, status in enumerate(OrderStatus)}


class _External(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class ExternalCustomization(_External):
    name: Label
    option: Label
    price: Money = 0


class ExternalItem(_External):
    """`unit_price` with its customizations; without a `menu_item_id` the name stands for the dish."""

    name: Label
    quantity: Quantity
    unit_price: Annotated[int, Meta(ge=0, le=10**9)]
    menu_item_id: UUID | None = None
    special_instructions: Text | None = None
    customizations: Annotated[list[ExternalCustomization], Meta(max_length=50)] = []


class ExternalPayment(_External):
    """`id`: whatever the other system calls it."""

    id: Label
    amount: Amount
    method: Label
    created_at: Time | None = None
    reference: Label | None = None


class ExternalOrder(_External):
    """`external_id` or `convex_id` says which order it is; money is in minor units. Of two updates the one with the
    later `updated_at` stands, in whatever order they come; without one a status does not go back."""

    restaurant_id: UUID
    items: Annotated[list[ExternalItem], Meta(min_length=1, max_length=1_000)]
    external_id: Annotated[str, Meta(min_length=1, max_length=200, pattern="^[^\\x00]*$")] | None = None
    convex_id: Annotated[str, Meta(min_length=1, max_length=200, pattern="^[^\\x00]*$")] | None = None
    order_number: Annotated[str, Meta(max_length=40, pattern="^[^\\x00]*$")] = ""
    status: OrderStatus = OrderStatus.PENDING
    table_id: UUID | None = None
    customer_id: UUID | None = None
    customer_name: Label | None = None
    customer_phone: Label | None = None
    tip_amount: Annotated[int, Meta(ge=0, le=10**11)] = 0
    discount_amount: Annotated[int, Meta(ge=0, le=10**11)] = 0
    deposit_used: Annotated[int, Meta(ge=0, le=10**11)] = 0
    tax_amount: Annotated[int, Meta(ge=0, le=10**11)] | None = None
    total: Annotated[int, Meta(ge=0, le=10**11)] | None = None
    payment_method: Label | None = None
    payments: Annotated[list[ExternalPayment], Meta(max_length=1_000)] = []
    notes: Text | None = None
    special_instructions: Text | None = None
    created_at: Time | None = None
    updated_at: Time | None = None

    @property
    def name(self) -> str:
        """Raises InvalidInput without one, or with two that differ."""
        if self.external_id and self.convex_id and self.external_id != self.convex_id:
            raise InvalidInput("external_id and convex_id name two orders", field="convex_id")
        if found := self.external_id or self.convex_id:
            return found
        raise InvalidInput("external_id or convex_id is needed", field="external_id")


def order_id(restaurant: str, name: str) -> str:
    """The same for the same order, wherever it arrives and however often."""
    return str(uuid5(_NAMESPACE, f"{restaurant}|{name}"))


def new_order(wanted: ExternalOrder, restaurant: Restaurant, at: datetime) -> Order:
    """Raises InvalidInput."""
    created = wanted.created_at or at
    updated = max(created, wanted.updated_at or created)
    times = [("created_at", created), ("updated_at", updated)]
    times += [(f"payments[{i}].created_at", one.created_at or created) for i, one in enumerate(wanted.payments)]
    for field, moment in times:
        if not in_range(moment):
            raise InvalidInput("a time between 1970 and 2200", field=field)
    ids: set[str] = set()
    for place, payment in enumerate(wanted.payments):
        if payment.id in ids:
            raise InvalidInput("two payments with one id", field=f"payments[{place}].id")
        ids.add(payment.id)
    items = tuple(_item(one) for one in wanted.items)
    subtotal = sum(one.line_total for one in items)
    tax = wanted.tax_amount
    if tax is None:
        tax = (subtotal * restaurant.tax_basis_points + 5_000) // 10_000
    total = wanted.total
    if total is None:
        total = max(0, subtotal + tax + wanted.tip_amount - wanted.discount_amount - wanted.deposit_used)
    if max(subtotal, total) > _MOST:
        raise InvalidInput("the order is too large", field="items", code="order_too_large")
    id_ = order_id(restaurant.id, wanted.name)
    payments = tuple(_payment(one, id_, created) for one in wanted.payments)
    return Order(
        id=id_,
        restaurant_id=restaurant.id,
        order_number=wanted.order_number,
        business_day=restaurant.business_day(created),
        status=wanted.status,
        items=items,
        currency=restaurant.currency,
        subtotal=subtotal,
        tax_basis_points=restaurant.tax_basis_points,
        tax_amount=tax,
        tip_amount=wanted.tip_amount,
        discount_amount=wanted.discount_amount,
        deposit_used=wanted.deposit_used,
        total=total,
        created_at=created,
        updated_at=updated,
        table_id=str(wanted.table_id) if wanted.table_id else None,
        customer_id=str(wanted.customer_id) if wanted.customer_id else None,
        customer_name=wanted.customer_name,
        customer_phone=wanted.customer_phone,
        payment_method=wanted.payment_method,
        payments=payments,
        payment_status=payment_status(payments, total),
        notes=wanted.notes,
        special_instructions=wanted.special_instructions,
        external_id=wanted.name,
    )


def merged(before: Order, wanted: Order, *, dated: bool, at: datetime) -> Order | None:
    """What stands after `wanted` was sent for an order that is known; None when that changes nothing. `dated`: the
    other system said when, so that what it sent earlier and came later is known as such. Raises Conflict."""
    payments = _with_payments(before, wanted)
    if dated and wanted.updated_at < before.updated_at:
        if payments == before.payments:
            return None
        return msgspec.structs.replace(before, payments=payments, payment_status=payment_status(payments, before.total))
    # What says no time may be a repetition of what was sent long ago.
    back = not dated and _RANK[wanted.status] < _RANK[before.status]
    after = msgspec.structs.replace(
        wanted,
        status=before.status if back else wanted.status,
        order_number=wanted.order_number or before.order_number,
        business_day=before.business_day,
        created_at=before.created_at,
        # Noted also where nothing else is new: what was sent before this and comes after it is late.
        updated_at=wanted.updated_at if dated else before.updated_at,
        customer_session_id=before.customer_session_id,
        placed_by=before.placed_by,
        request_hash=before.request_hash,
        deleted_at=before.deleted_at,
        holds=before.holds,
        payments=payments,
        payment_status=payment_status(payments, wanted.total),
    )
    if after == before:
        return None
    return after if dated else msgspec.structs.replace(after, updated_at=max(at, before.updated_at))


def _with_payments(before: Order, wanted: Order) -> tuple[Payment, ...]:
    known = {one.id: one for one in before.payments}
    for place, one in enumerate(wanted.payments):
        earlier = known.get(one.id)
        if earlier is not None and (earlier.amount, earlier.method) != (one.amount, one.method):
            raise Conflict(
                "this id was used for another payment", code="payment_id_reused", field=f"payments[{place}].id"
            )
    payments = (*before.payments, *(one for one in wanted.payments if one.id not in known))
    if len(payments) > _MOST_PAYMENTS:
        raise Conflict("the order has too many payments", code="too_many_payments", field="payments")
    return payments


def event_of(before: Order | None, after: Order) -> str:
    if before is None:
        return "created"
    if after.status is not before.status:
        return "status_changed"
    paid = msgspec.structs.replace(
        before, payments=after.payments, payment_status=after.payment_status, updated_at=after.updated_at
    )
    return "payment_recorded" if after.payments != before.payments and after == paid else "updated"


def lane_of(wanted: ExternalOrder, before: Order | None, after: Order, at: datetime) -> Lane:
    """An order of today goes with the orders, whatever its status: somebody waits for it. What is older is history, and
    waits behind everything; so is what is over, was not known and says no time."""
    known = None if before is None else before.updated_at
    said = [one for one in (wanted.created_at, wanted.updated_at, known) if one is not None]
    if not said:
        return Lane.BACKGROUND if after.status in _OVER else Lane.CRITICAL
    return Lane.CRITICAL if at - max(said) < _TODAY else Lane.BACKGROUND


def _item(one: ExternalItem) -> OrderItem:
    return OrderItem(
        menu_item_id=str(one.menu_item_id or uuid5(_NAMESPACE, f"dish|{one.name}")),
        name=one.name,
        quantity=one.quantity,
        unit_price=one.unit_price,
        line_total=one.unit_price * one.quantity,
        special_instructions=one.special_instructions,
        customizations=tuple(Customization(c.name, c.option, c.price) for c in one.customizations),
    )


def _payment(one: ExternalPayment, order: str, created: datetime) -> Payment:
    return Payment(
        id=str(uuid5(_NAMESPACE, f"{order}|payment|{one.id}")),
        amount=one.amount,
        method=one.method,
        created_at=one.created_at or created,
        reference=one.reference,
    )
