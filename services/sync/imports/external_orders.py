"""Converts an order of another system into our order, and merges its updates. Pure.

The order keeps the prices, names and numbers of the other system, and missing amounts are computed. Payments are facts:
an update, even a late one, adds payments and never removes any.
"""

from datetime import datetime, timedelta
from typing import Annotated, Any
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec
from msgspec import Meta, Struct

from shared.entities.contract import SENTENCE, Amount, Lane, Money, Text, Time, in_range
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
from shared.http.texts import END, FORM, LABEL, LABEL_FORM, Label
from shared.restaurants import Restaurant

_NAMESPACE = uuid5(NAMESPACE_URL, "https://ticketrail.example/external-order")
_MAX_AMOUNT = 10**12  # minor units
_MAX_PAYMENTS = 1_000
_MAX_CRITICAL_AGE = timedelta(days=1)
_FINAL_STATUSES = (OrderStatus.COMPLETED, OrderStatus.CANCELLED)
_OPTIONAL_LABEL: dict[str, Any] = {
    "pattern": rf"^(?:{LABEL})?{END}",
    "extra": {SENTENCE: "must have no control characters or invisible ones", FORM: LABEL_FORM},
}
_RANK = {status: rank for rank, status in enumerate(OrderStatus)}


class _External(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class ExternalCustomization(_External):
    name: Label
    option: Label
    price: Money = 0


class ExternalItem(_External):
    """A line of an external order. `unit_price` includes the customizations. Without `menu_item_id`, the name
    identifies the dish."""

    name: Label
    quantity: Quantity
    unit_price: Annotated[int, Meta(ge=0, le=10**9)]
    menu_item_id: UUID | None = None
    special_instructions: Text | None = None
    customizations: Annotated[list[ExternalCustomization], Meta(max_length=50)] = []


class ExternalPayment(_External):
    """A payment of an external order. `id` is the id in the other system."""

    id: Label
    amount: Amount
    method: Label
    created_at: Time | None = None
    reference: Label | None = None


class ExternalOrder(_External):
    """An order of another system, identified by `external_id` or `convex_id`. Money is in minor units. Of two updates,
    the one with the later `updated_at` wins, in whichever order they arrive. An update without `updated_at` never moves
    the status back."""

    restaurant_id: UUID
    items: Annotated[list[ExternalItem], Meta(min_length=1, max_length=1_000)]
    external_id: Label | None = None
    convex_id: Label | None = None
    order_number: Annotated[str, Meta(max_length=40, **_OPTIONAL_LABEL)] = ""
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
        """The id in the other system. Raises InvalidInput if it is missing, or if both fields are given and differ."""
        if self.external_id and self.convex_id and self.external_id != self.convex_id:
            raise InvalidInput("external_id and convex_id must not differ", field="convex_id")
        if found := self.external_id or self.convex_id:
            return found
        raise InvalidInput("external_id or convex_id is required", field="external_id")


def order_id(restaurant: str, name: str) -> str:
    """Returns our id of an external order. The same restaurant and name always give the same id."""
    return str(uuid5(_NAMESPACE, f"{restaurant}|{name}"))


def new_order(external: ExternalOrder, restaurant: Restaurant, at: datetime) -> Order:
    """Returns our order for an external order. Raises InvalidInput."""
    created = external.created_at or at
    updated = max(created, external.updated_at or created)
    times = [("created_at", created), ("updated_at", updated)]
    times += [
        (f"payments[{i}].created_at", payment.created_at or created) for i, payment in enumerate(external.payments)
    ]
    for field, moment in times:
        if not in_range(moment):
            raise InvalidInput("must be a time between 1970 and 2200", field=field)
    ids: set[str] = set()
    for place, payment in enumerate(external.payments):
        if payment.id in ids:
            raise InvalidInput("must differ from the ids of other payments", field=f"payments[{place}].id")
        ids.add(payment.id)
    items = tuple(_item(item) for item in external.items)
    subtotal = sum(item.line_total for item in items)
    tax = external.tax_amount
    if tax is None:
        tax = (subtotal * restaurant.tax_basis_points + 5_000) // 10_000
    total = external.total
    if total is None:
        total = max(0, subtotal + tax + external.tip_amount - external.discount_amount - external.deposit_used)
    if max(subtotal, total) > _MAX_AMOUNT:
        raise InvalidInput("the order is too large", field="items", code="order_too_large")
    id_ = order_id(restaurant.id, external.name)
    payments = tuple(_payment(payment, id_, created) for payment in external.payments)
    return Order(
        id=id_,
        restaurant_id=restaurant.id,
        order_number=external.order_number,
        business_day=restaurant.business_day(created),
        status=external.status,
        items=items,
        currency=restaurant.currency,
        subtotal=subtotal,
        tax_basis_points=restaurant.tax_basis_points,
        tax_amount=tax,
        tip_amount=external.tip_amount,
        discount_amount=external.discount_amount,
        deposit_used=external.deposit_used,
        total=total,
        created_at=created,
        updated_at=updated,
        table_id=str(external.table_id) if external.table_id else None,
        customer_id=str(external.customer_id) if external.customer_id else None,
        customer_name=external.customer_name,
        customer_phone=external.customer_phone,
        payment_method=external.payment_method,
        payments=payments,
        payment_status=payment_status(payments, total),
        notes=external.notes,
        special_instructions=external.special_instructions,
        external_id=external.name,
    )


def updated(before: Order, sent: Order, external: ExternalOrder, restaurant: Restaurant, at: datetime) -> Order | None:
    """Returns the state of the order `before` after the update `external`, or None if the update changes nothing.
    `sent`: the result of `new_order` for the update. Raises InvalidInput, Conflict."""
    if (before.currency, before.tax_basis_points) != (sent.currency, sent.tax_basis_points):
        # An order keeps its currency and its tax rate, even if those of the restaurant have changed.
        terms = msgspec.structs.replace(restaurant, currency=before.currency, tax_basis_points=before.tax_basis_points)
        sent = new_order(external, terms, at)
    return merged(before, sent, dated=external.updated_at is not None, at=at)


def merged(before: Order, sent: Order, *, dated: bool, at: datetime) -> Order | None:
    """Returns the state of the order `before` after the update `sent`, or None if the update changes nothing. `dated`:
    whether the other system has set `updated_at`, so that a late update can be recognized. Raises Conflict."""
    payments = _with_payments(before, sent)
    if dated and sent.updated_at < before.updated_at:
        if payments == before.payments:
            return None
        return msgspec.structs.replace(before, payments=payments, payment_status=payment_status(payments, before.total))
    # An update without a time may be sent a second time, after later updates.
    moves_back = not dated and _RANK[sent.status] < _RANK[before.status]
    after = msgspec.structs.replace(
        sent,
        status=before.status if moves_back else sent.status,
        order_number=sent.order_number or before.order_number,
        business_day=before.business_day,
        created_at=before.created_at,
        # The new time is stored even if nothing else is new, so that an older update that arrives later is recognized.
        updated_at=sent.updated_at if dated else before.updated_at,
        customer_session_id=before.customer_session_id,
        placed_by=before.placed_by,
        request_hash=before.request_hash,
        deleted_at=before.deleted_at,
        holds=before.holds,
        payments=payments,
        payment_status=payment_status(payments, sent.total),
    )
    if after == before:
        return None
    return after if dated else msgspec.structs.replace(after, updated_at=max(at, before.updated_at))


def _with_payments(before: Order, sent: Order) -> tuple[Payment, ...]:
    known = {payment.id: payment for payment in before.payments}
    for place, payment in enumerate(sent.payments):
        earlier = known.get(payment.id)
        if earlier is not None and (earlier.amount, earlier.method) != (payment.amount, payment.method):
            raise Conflict(
                "this id belongs to another payment", code="payment_id_reused", field=f"payments[{place}].id"
            )
    payments = (*before.payments, *(payment for payment in sent.payments if payment.id not in known))
    if len(payments) > _MAX_PAYMENTS:
        raise Conflict("the order has too many payments", code="too_many_payments", field="payments")
    return payments


def event_of(before: Order | None, after: Order) -> str:
    """Returns the event of a change from `before` to `after`."""
    if before is None:
        return "created"
    if after.status is not before.status:
        return "status_changed"
    paid = msgspec.structs.replace(
        before, payments=after.payments, payment_status=after.payment_status, updated_at=after.updated_at
    )
    return "payment_recorded" if after.payments != before.payments and after == paid else "updated"


def lane_of_external(external: ExternalOrder, before: Order | None, after: Order, at: datetime) -> Lane:
    """Returns the critical lane for an order of the last day, because people wait for it, and the background lane for
    an older order. An order without any time goes to the background lane only if its status is final."""
    known = None if before is None else before.updated_at
    known_times = [moment for moment in (external.created_at, external.updated_at, known) if moment is not None]
    if not known_times:
        return Lane.BACKGROUND if after.status in _FINAL_STATUSES else Lane.CRITICAL
    return Lane.CRITICAL if at - max(known_times) < _MAX_CRITICAL_AGE else Lane.BACKGROUND


def _item(item: ExternalItem) -> OrderItem:
    return OrderItem(
        menu_item_id=str(item.menu_item_id or uuid5(_NAMESPACE, f"dish|{item.name}")),
        name=item.name,
        quantity=item.quantity,
        unit_price=item.unit_price,
        line_total=item.unit_price * item.quantity,
        special_instructions=item.special_instructions,
        customizations=tuple(Customization(c.name, c.option, c.price) for c in item.customizations),
    )


def _payment(payment: ExternalPayment, order: str, created: datetime) -> Payment:
    return Payment(
        id=str(uuid5(_NAMESPACE, f"{order}|payment|{payment.id}")),
        amount=payment.amount,
        method=payment.method,
        created_at=payment.created_at or created,
        reference=payment.reference,
    )
