"""The commands that set values of an order: table, guests, contact, notes, tip, discount, service charge."""

from typing import Any

from shared.entities.order.acts import Act, Action, permit
from shared.entities.order.pricing import basis
from shared.entities.order.refusals import conflict, invalid
from shared.entities.order.state import CONTACT, Discount, Order, ServiceRate, Told
from shared.entities.order.writing import check_discount, written

EDITABLE = frozenset(
    {
        *("type", "table_id", "guests", "scheduled_for", "notes", "special_instructions", *CONTACT),
        *("payment_method", "tip", "deposit_used"),
    }
)


def edit_order(order: Order, act: Act, **fields: Any) -> Order:
    """Sets some of the fields in EDITABLE. Raises Refused: `order_has_payments` if the type of a paid order would
    change, and the codes of `permit`."""
    if unknown := fields.keys() - EDITABLE:
        raise invalid("invalid_input", "cannot be set", field=min(unknown))
    permit(order, act, Action.EDIT_ORDER)
    retyped = fields.get("type", order.type) is not order.type
    if retyped and sum(one.amount for one in order.payments) != 0:
        raise conflict("order_has_payments", "the type of an order with payments cannot change", field="type")
    return written(order, act, **fields)


def discount_order(order: Order, act: Act, discount: Discount | None) -> Order:
    """Sets or removes the discount of the whole order; `reason` is a part of it. Raises Refused:
    `discount_above_subtotal`, and the codes of `permit`."""
    permit(order, act, Action.DISCOUNT, reason="removed" if discount is None else discount.reason)
    if discount is not None:
        ours = written(order, act, discount=None)
        check_discount(discount, ours.subtotal - ours.discount_amount, "discount")
    return written(order, act, discount=discount)


def set_service(order: Order, act: Act, service: ServiceRate | None) -> Order:
    """Replaces the service charge of the terms: 0 basis points waive it, None restores it. Raises Refused with the
    codes of `permit`."""
    permit(order, act, Action.SERVICE, reason="removed" if service is None else service.reason)
    return written(order, act, service=service)


def tell(
    order: Order,
    act: Act,
    *,
    subtotal: int | None = None,
    discount_amount: int | None = None,
    tax_amount: int | None = None,
    total: int | None = None,
) -> Order:
    """Stores the amounts that another system computed. They count until a part of the price changes here. The order
    gets the flag `amounts_do_not_add_up` if they contradict each other."""
    told = Told(basis(order), subtotal, discount_amount, tax_amount, total)
    return written(order, act, told=told)
