"""Payments and refunds.

A payment is a fact: it is never changed. The balance is a sum, so it does not depend on the sequence of payments. The
part of a refund that exceeds the money owed back lowers the cost of the order. It is the
`credit` of the refund and is stored with it.
"""

from collections.abc import Sequence
from datetime import date, datetime

import msgspec
from msgspec import UNSET, Struct

from shared.entities.order.acts import Act, Action, permit
from shared.entities.order.derive import derive
from shared.entities.order.refusals import conflict, invalid
from shared.entities.order.state import MAX_PAYMENTS, Order, Payment

MAX_PAID = 10**12


class NewPayment(Struct, frozen=True, kw_only=True):
    """`amount` is positive and includes `tip`. `tendered`: the cash that the guest gave."""

    id: str
    amount: int
    method: str
    tip: int = 0
    tendered: int | None = None
    reference: str | None = None
    business_day: date | None = None
    request_key: str | None = None


class NewRefund(Struct, frozen=True, kw_only=True):
    """`amount`: the positive amount that goes back. `correction`: whether the payment was recorded wrongly and the
    guest will pay in another way; such a refund has no credit."""

    id: str
    amount: int
    method: str
    refund_of: str | None = None
    reason: str | None = None
    correction: bool = False
    reference: str | None = None
    business_day: date | None = None
    request_key: str | None = None


def pay(order: Order, act: Act, new: NewPayment) -> Order:
    """Records a payment. A repeated payment changes nothing. Raises Refused: `id_reused`, `overpaid` with the balance,
    `too_many_payments`, codes for invalid amounts, and the codes of `permit`."""
    if new.amount <= 0:
        raise invalid("invalid_input", "must be more than 0", field="amount")
    if not 0 <= new.tip <= new.amount:
        raise invalid("tip_above_amount", "the tip is a part of the amount", field="tip")
    if new.tendered is not None and new.tendered < new.amount:
        raise invalid("tendered_too_little", f"{new.tendered} does not pay {new.amount}", field="tendered")
    payment = Payment(
        id=new.id,
        amount=new.amount,
        method=new.method,
        created_at=act.at,
        reference=new.reference,
        tip=new.tip,
        tendered=new.tendered,
        change=new.tendered - new.amount if new.tendered is not None else 0,
        business_day=new.business_day,
        by=act.by,
        request_key=new.request_key if new.request_key is not None else UNSET,
    )
    if _known(order, payment):
        return order
    permit(order, act, Action.PAY)
    if new.amount - new.tip > order.balance:
        raise conflict(
            "overpaid",
            f"{new.amount - new.tip} is more than the {max(0, order.balance)} that is left to pay; give the"
            " rest as a tip, or as cash with change",
            field="amount",
            balance=order.balance,
        )
    return _with(order, act.at, payment)


def refund(order: Order, act: Act, new: NewRefund) -> Order:
    """Records a refund of one payment. Raises Refused: `id_reused`, `refund_above_paid` with the amount that was paid,
    `unknown_payment`, `too_many_payments`, codes for invalid amounts, and the codes of `permit`."""
    if new.amount <= 0:
        raise invalid("invalid_input", "must not be 0", field="amount")
    known = next((one for one in order.payments if one.id == new.id), None)
    owed = max(0, -order.balance)
    none_left = new.correction or order.balance > 0
    payment = Payment(
        id=new.id,
        amount=-new.amount,
        method=new.method,
        created_at=act.at,
        reference=new.reference,
        # A repeated request without `refund_of` gets the payment that the first request found.
        refund_of=new.refund_of or (known.refund_of if known is not None else _bearer(order, new)),
        credit=0 if none_left else max(0, new.amount - owed),
        reason=new.reason,
        business_day=new.business_day,
        by=act.by,
        request_key=new.request_key if new.request_key is not None else UNSET,
    )
    if _known(order, payment):
        return order
    permit(order, act, Action.REFUND, reason=new.reason)
    if payment.refund_of is None:
        raise conflict(
            "refund_above_paid",
            f"no payment with {new.method} has {new.amount} left to refund",
            field="amount",
            paid=sum(one.amount for one in order.payments),
        )
    left = refundable(order.payments).get(payment.refund_of)
    if left is None:
        raise conflict("unknown_payment", "the order has no such payment", field="refund_of")
    if new.amount > left:
        raise conflict(
            "refund_above_paid", f"{new.amount} is more than the {left} left of this payment", field="amount", paid=left
        )
    return _with(order, act.at, payment)


def refundable(payments: Sequence[Payment]) -> dict[str, int]:
    """Returns payment id -> the amount that is left of the payment after its refunds."""
    left = {one.id: one.amount for one in payments if one.amount > 0}
    for one in payments:
        if one.refund_of in left:
            left[one.refund_of] += one.amount
    return left


def _bearer(order: Order, new: NewRefund) -> str | None:
    """Returns the id of the newest payment that has the method of the refund and enough left for its amount."""
    left = refundable(order.payments)
    for one in reversed(order.payments):
        if one.method == new.method and left.get(one.id, 0) >= new.amount:
            return one.id
    return None


def _known(order: Order, payment: Payment) -> bool:
    """Returns whether the order has this payment. Its time, its author and its credit may differ, because a repeat
    comes later. Raises Refused if this id has other content."""
    known = next((one for one in order.payments if one.id == payment.id), None)
    if known is None:
        return False
    repeated = ("created_at", "by", "business_day", "credit", "request_key")
    if known != msgspec.structs.replace(payment, **{name: getattr(known, name) for name in repeated}):
        raise conflict("id_reused", "this id belongs to another payment", field="id")
    return True


def _with(order: Order, at: datetime, payment: Payment) -> Order:
    if len(order.payments) >= MAX_PAYMENTS:
        raise conflict("too_many_payments", f"an order has at most {MAX_PAYMENTS} payments", field="amount")
    if sum(one.amount for one in order.payments) + payment.amount > MAX_PAID:
        raise conflict("too_many_payments", f"an order has at most {MAX_PAID} paid", field="amount")
    return derive(msgspec.structs.replace(order, payments=(*order.payments, payment), updated_at=at))
