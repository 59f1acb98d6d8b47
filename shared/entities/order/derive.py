"""Computes the derived values of an order: amounts, status, balance, stock. Pure.

`derive(derive(order)) == derive(order)`, and the result does not depend on the sequence of lines and payments.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from msgspec import Struct

from shared.entities.order import pricing
from shared.entities.order.pricing import Priced, apportion, priced, wasted
from shared.entities.order.state import (
    AMOUNTS_DO_NOT_ADD_UP,
    DERIVED_FLAGS,
    LINES_AFTER_CLOSE,
    PERSONAL,
    ClosedAs,
    KitchenState,
    Line,
    Order,
    OrderStatus,
    Payment,
    PaymentStatus,
    RateTax,
    StockHold,
)
from shared.entities.order.terms import TaxMode

_DONE = (KitchenState.READY, KitchenState.SERVED)
_BEGUN = (KitchenState.STARTED, *_DONE)
_NOTHING_PERSONAL = dict.fromkeys(PERSONAL)


def derive(order: Order) -> Order:
    """Returns the order with all derived values. Lines are sorted by (seq, id), payments by (time, id)."""
    lines = sorted(order.items, key=_line_place)
    payments = sorted(order.payments, key=_payment_place)
    tip = order.tip + sum([payment.tip for payment in payments])
    amounts = priced(order, lines, tip)
    flags = set(order.flags) - DERIVED_FLAGS
    if order.told is not None and order.told.basis == pricing.basis(order):
        amounts, add_up = _told(order, amounts, tip, tip - order.tip)
        if not add_up:
            flags.add(AMOUNTS_DO_NOT_ADD_UP)
    if order.closed is not None and len(lines) > order.closed.lines:
        flags.add(LINES_AFTER_CLOSE)
    items = tuple(
        [_derived_line(line, amounts, place, order.erased_at is not None) for place, line in enumerate(lines)]
    )
    money = _money(order, amounts.total, payments)
    return msgspec.structs.replace(
        order,
        items=items,
        payments=tuple(payments),
        flags=tuple(sorted(flags)),
        status=_status(order, items),
        payment_status=money.status,
        deleted_at=order.deleted.at if order.deleted is not None else None,
        subtotal=amounts.subtotal,
        discount_amount=amounts.discount_amount,
        service_amount=amounts.service_amount,
        service_tax=amounts.service_tax,
        tax_basis_points=_basis_points(order, amounts.taxes),
        tax_amount=amounts.tax_amount,
        tip_amount=tip,
        total=amounts.total,
        total_amount=amounts.total,
        taxes=amounts.taxes,
        due=money.due,
        balance=money.balance,
        holds=_holds(order, items),
        **(_NOTHING_PERSONAL if order.erased_at is not None else {}),
    )


def _line_place(line: Line) -> tuple[int, str]:
    return line.seq, line.id


def _payment_place(payment: Payment) -> tuple[datetime, str]:
    return payment.created_at, payment.id


def _derived_line(line: Line, amounts: Priced, place: int, erased: bool) -> Line:
    voids = line.voids
    if len(voids) > 1:
        voids = tuple(sorted(voids, key=lambda void: (void.at, void.id)))
    return msgspec.structs.replace(
        line,
        quantity=amounts.quantities[place],
        line_total=amounts.line_totals[place],
        discount_amount=amounts.discounts[place],
        tax_amount=amounts.line_taxes[place],
        net=amounts.nets[place],
        voids=voids,
        special_instructions=None if erased else line.special_instructions,
    )


def _status(order: Order, lines: Sequence[Line]) -> OrderStatus:
    if order.closed is not None:
        return OrderStatus(order.closed.as_)
    if order.accepted is None:
        return OrderStatus.PENDING
    states = [line.kitchen.state for line in lines if line.quantity]
    if states and all(state in _DONE for state in states):
        return OrderStatus.READY
    return OrderStatus.PREPARING if any(state in _BEGUN for state in states) else OrderStatus.RECEIVED


class _Money(Struct, frozen=True):
    due: int
    balance: int
    status: PaymentStatus


def _money(order: Order, total: int, payments: Sequence[Payment]) -> _Money:
    """Returns the amount due, the balance and the payment status. The amount due is never negative: if the total falls
    after a credit, the guest already has that money."""
    paid = sum([payment.amount for payment in payments])
    credit = sum([payment.credit for payment in payments])
    void = order.deleted is not None or (order.closed is not None and order.closed.as_ is ClosedAs.CANCELLED)
    due = 0 if void else max(0, total - credit)
    balance = due - paid
    if not payments:
        status = PaymentStatus.PENDING if total else PaymentStatus.PAID
    elif balance > 0:
        status = PaymentStatus.PARTIALLY_PAID if paid else PaymentStatus.PENDING
    elif balance < 0:
        status = PaymentStatus.REFUND_DUE
    elif not paid:
        status = PaymentStatus.REFUNDED
    else:
        status = PaymentStatus.PARTIALLY_REFUNDED if credit else PaymentStatus.PAID
    return _Money(due, balance, status)


def _basis_points(order: Order, taxes: Sequence[RateTax]) -> int | None:
    """Returns the tax rate of the whole order for the original systems. None if the order has several rates, or if the
    rate is no whole number of basis points."""
    rates = {tax.rate_ppm for tax in taxes} or {order.terms.tax.rate(None, order.type)}
    rate = rates.pop()
    return rate // 100 if not rates and rate % 100 == 0 and rate <= 1_000_000 else None


def _holds(order: Order, lines: Sequence[Line]) -> tuple[StockHold, ...]:
    """Returns the stock that the order holds. A cancelled order keeps the stock of started lines and wasted pieces; a
    deleted order holds nothing."""
    if order.deleted is not None:
        return ()
    cancelled = order.closed is not None and order.closed.as_ is ClosedAs.CANCELLED
    taken: dict[tuple[str, datetime], int] = {}
    for line in lines:
        if not line.consumes:
            continue
        pieces = wasted(line, line.quantity) if line.voids else 0
        if not cancelled or line.kitchen.state in _BEGUN:
            pieces += line.quantity
        since = line.held_at or line.added_at
        if order.held_from is not None:
            since = max(since, order.held_from)
        for one in line.consumes if pieces else ():
            key = one.inventory_item_id, since
            taken[key] = taken.get(key, 0) + one.quantity * pieces
    return tuple(
        StockHold(id_, quantity, at if at != order.created_at else None)
        for (id_, at), quantity in sorted(taken.items())
    )


def _told(order: Order, amounts: Priced, tip: int, payment_tips: int) -> tuple[Priced, bool]:
    """Returns the amounts with the told amounts in their place, and whether they add up. A told tax is apportioned to
    the lines in proportion to our own taxes."""
    told = order.told
    assert told is not None
    changes: dict[str, object] = {
        name: value for name in ("subtotal", "discount_amount") if (value := getattr(told, name)) is not None
    }
    if told.total is not None:
        changes["total"] = told.total + payment_tips
    if told.tax_amount is not None:
        changes |= _told_tax(order, amounts, told.tax_amount)
    found = msgspec.structs.replace(amounts, **changes)
    added = 0 if order.terms.tax.mode is TaxMode.INCLUSIVE else found.tax_amount
    gross = found.subtotal - found.discount_amount + found.service_amount + added + tip
    return found, found.total == max(0, gross - order.deposit_used)


def _told_tax(order: Order, amounts: Priced, tax: int) -> dict[str, object]:
    ours = [*amounts.line_taxes, amounts.service_tax]
    weights = ours if any(ours) else [*amounts.nets, 0]
    *line_taxes, service_tax = apportion(tax, weights)
    inclusive = order.terms.tax.mode is TaxMode.INCLUSIVE
    by_rate = apportion(tax, [one.tax for one in amounts.taxes] if any(ours) else [one.base for one in amounts.taxes])
    return {
        "line_taxes": line_taxes,
        "service_tax": service_tax,
        "tax_amount": tax,
        "nets": [
            max(0, net + old - new) if inclusive else net
            for net, old, new in zip(amounts.nets, amounts.line_taxes, line_taxes, strict=True)
        ],
        "taxes": tuple(
            msgspec.structs.replace(one, tax=share, base=max(0, one.base + one.tax - share) if inclusive else one.base)
            for one, share in zip(amounts.taxes, by_rate, strict=True)
        ),
    }
