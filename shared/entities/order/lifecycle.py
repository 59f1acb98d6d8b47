"""The commands that end an order or bring it back: complete, cancel, reopen, delete, restore, erase; and the status as
the original systems set it."""

from datetime import datetime

import msgspec

from shared.entities.order.acts import Act, Action, permit
from shared.entities.order.derive import derive
from shared.entities.order.kitchen import accept, cook
from shared.entities.order.refusals import conflict
from shared.entities.order.state import Closed, ClosedAs, KitchenState, Mark, Order, OrderStatus
from shared.entities.order.writing import is_fired, written


def complete(order: Order, act: Act, reason: str | None = None) -> Order:
    """Raises Refused: `manager_needed` for an order that is not paid, and what else `permit` raises."""
    if order.closed is not None and order.closed.as_ is ClosedAs.COMPLETED and order.deleted is None:
        return order
    permit(order, act, Action.COMPLETE_UNPAID if order.balance > 0 else Action.COMPLETE)
    return _closed(order, act, ClosedAs.COMPLETED, reason)


def cancel(order: Order, act: Act, reason: str | None = None) -> Order:
    """Raises Refused: `manager_needed` for an order that the kitchen has or that has payments, and what else `permit`
    raises."""
    if order.closed is not None and order.closed.as_ is ClosedAs.CANCELLED and order.deleted is None:
        return order
    paid = sum(payment.amount for payment in order.payments)
    begun = paid or any(is_fired(line) and line.quantity for line in order.items)
    permit(order, act, Action.CANCEL_FIRED_OR_PAID if begun else Action.CANCEL)
    return _closed(order, act, ClosedAs.CANCELLED, reason)


def _closed(order: Order, act: Act, as_: ClosedAs, reason: str | None) -> Order:
    closed = Closed(as_=as_, at=act.at, lines=len(order.items), by=act.by, reason=reason)
    return written(order, act, closed=closed)


def reopen(order: Order, act: Act) -> Order:
    """Opens a completed order again. Raises Refused."""
    permit(order, act, Action.REOPEN)
    return written(order, act, closed=None)


def delete(order: Order, act: Act, reason: str | None = None) -> Order:
    """Deletes an order that never became anything. Raises Refused: `order_has_payments`, `line_fired`, and what
    `permit` raises."""
    permit(order, act, Action.DELETE)
    if order.payments:
        raise conflict(
            "order_has_payments", "an order with payments cannot be deleted; cancel it", balance=order.balance
        )
    if any(is_fired(line) for line in order.items):
        raise conflict("line_fired", "an order that the kitchen has cannot be deleted; cancel it")
    return written(order, act, deleted=Mark(at=act.at, by=act.by, reason=reason))


def restore(order: Order, act: Act) -> Order:
    """Brings a deleted order back. Its stock is held again from now on, because it may have been counted meanwhile.
    Raises Refused: `not_deleted`, and what `permit` raises."""
    permit(order, act, Action.RESTORE)
    if order.deleted is None:
        raise conflict("not_deleted", "the order is not deleted")
    return written(order, act, deleted=None, held_from=act.at)


def erase(order: Order, at: datetime) -> Order:
    """Empties what belongs to a person. It cannot be undone: a merge keeps the earliest erasure."""
    if order.erased_at is not None:
        return order
    return derive(msgspec.structs.replace(order, erased_at=at, updated_at=max(at, order.updated_at)))


_NEXT = {
    OrderStatus.PENDING: (OrderStatus.RECEIVED, OrderStatus.CANCELLED),
    OrderStatus.RECEIVED: (OrderStatus.PREPARING, OrderStatus.CANCELLED),
    OrderStatus.PREPARING: (OrderStatus.READY, OrderStatus.CANCELLED),
    OrderStatus.READY: (OrderStatus.COMPLETED, OrderStatus.CANCELLED),
    OrderStatus.COMPLETED: (),
    OrderStatus.CANCELLED: (),
}


def allowed_next(status: OrderStatus) -> tuple[OrderStatus, ...]:
    """Returns the statuses that the original systems may set next."""
    return _NEXT[status]


def set_status(order: Order, act: Act, status: OrderStatus) -> Order:
    """Sets the status of a whole order, step by step: it accepts the order, moves all its lines, or closes it. Raises
    Refused: `illegal_status` with the allowed ones, and what these commands raise."""
    if status is order.status:
        return order
    allowed = allowed_next(order.status)
    if status not in allowed:
        raise conflict(
            "illegal_status",
            f"an order that is {order.status} cannot become {status}",
            field="status",
            status=order.status,
            allowed=list(allowed),
        )
    if status is OrderStatus.RECEIVED:
        return accept(order, act)
    if status is OrderStatus.PREPARING:
        return cook(order, act, KitchenState.STARTED)
    if status is OrderStatus.READY:
        return cook(order, act, KitchenState.READY)
    return complete(order, act) if status is OrderStatus.COMPLETED else cancel(order, act)
