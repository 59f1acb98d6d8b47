"""The commands that close an order or bring it back: complete, cancel, reopen, delete, restore, erase. `set_status` is
for the original systems, which set the status of a whole order."""

from datetime import datetime

import msgspec

from shared.entities.order.acts import Act, Action, permit
from shared.entities.order.derive import derive
from shared.entities.order.kitchen import accept, cook
from shared.entities.order.refusals import conflict
from shared.entities.order.state import Closed, ClosedAs, KitchenState, Mark, Order, OrderStatus
from shared.entities.order.writing import is_fired, written


def complete(order: Order, act: Act, reason: str | None = None) -> Order:
    """Completes an order. Raises Refused: `manager_needed` if the order is not paid, and the other codes of
    `permit`."""
    if order.closed is not None and order.closed.as_ is ClosedAs.COMPLETED and order.deleted is None:
        return order
    permit(order, act, Action.COMPLETE_UNPAID if order.balance > 0 else Action.COMPLETE)
    return _closed(order, act, ClosedAs.COMPLETED, reason)


def cancel(order: Order, act: Act, reason: str | None = None) -> Order:
    """Cancels an order. Raises Refused: `manager_needed` if it has fired lines or payments, and the other codes of
    `permit`."""
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
    """Deletes an order without payments and without fired lines. Raises Refused: `order_has_payments`, `line_fired`,
    and the codes of `permit`."""
    permit(order, act, Action.DELETE)
    if order.payments:
        raise conflict(
            "order_has_payments", "an order with payments cannot be deleted; cancel it", balance=order.balance
        )
    if any(is_fired(line) for line in order.items):
        raise conflict("line_fired", "an order with fired items cannot be deleted; cancel it")
    return written(order, act, deleted=Mark(at=act.at, by=act.by, reason=reason))


def restore(order: Order, act: Act) -> Order:
    """Brings a deleted order back. It holds its stock from now on and not from its creation, because somebody may have
    counted the stock in between. Raises Refused: `not_deleted`, and the codes of `permit`."""
    permit(order, act, Action.RESTORE)
    if order.deleted is None:
        raise conflict("not_deleted", "the order is not deleted")
    return written(order, act, deleted=None, held_from=act.at)


def erase(order: Order, at: datetime) -> Order:
    """Empties the personal fields of an order. An erasure cannot be undone: a merge keeps the earliest one."""
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
    """Sets the status of a whole order: accepts it, moves all its lines, or closes it. Raises Refused: `illegal_status`
    with the allowed statuses, and the codes of these commands."""
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
