"""The permissions of an order: which roles may do which action, and in which state of the order.

`RULES` is the table. `permit` applies it; the commands add the checks that depend on lines and payments.
"""

from enum import StrEnum

from msgspec import Struct

from shared.entities.contract import Label, Time, Version
from shared.entities.order.refusals import absent, conflict, forbidden, invalid
from shared.entities.order.state import ClosedAs, Order


class CallerRole(StrEnum):
    GUEST = "guest"
    """A guest may change only its own order; the caller checks that."""
    KITCHEN = "kitchen"
    STAFF = "staff"
    MANAGER = "manager"
    """A manager or an admin."""


class Act(Struct, frozen=True, kw_only=True):
    """The circumstances of one command: its time, its caller, and the version that the change gets."""

    version: Version
    at: Time
    by: Label | None = None
    role: CallerRole = CallerRole.STAFF
    manager_approval: bool = False
    """The restaurant's setting: whether only managers may do the actions whose rule has `approval`."""


class Action(StrEnum):
    ACCEPT = "accept"
    ADD_LINE = "add_line"
    EDIT_LINE = "edit_line"
    VOID_LINE = "void_line"
    VOID_FIRED_LINE = "void_fired_line"
    DISCOUNT = "discount"
    COMP = "comp"
    SERVICE = "service"
    COOK = "cook"
    EDIT_ORDER = "edit_order"
    PAY = "pay"
    REFUND = "refund"
    COMPLETE = "complete"
    COMPLETE_UNPAID = "complete_unpaid"
    CANCEL = "cancel"
    CANCEL_FIRED_OR_PAID = "cancel_fired_or_paid"
    REOPEN = "reopen"
    DELETE = "delete"
    RESTORE = "restore"


_GUEST, _KITCHEN, _STAFF = CallerRole.GUEST, CallerRole.KITCHEN, CallerRole.STAFF
_OPEN = frozenset({None})
_COMPLETED = frozenset({ClosedAs.COMPLETED})
_ALWAYS = frozenset({None, *ClosedAs})


class Rule(Struct, frozen=True):
    """`when`: the values of `closed` with which the action is allowed. `roles`: the roles that may do it, apart from
    the manager, who may do everything. `approval`: whether `Act.manager_approval` reserves it for managers. `reason`:
    whether it needs a reason. `guest_while_pending`: whether a guest may do it until the order is accepted."""

    when: frozenset[ClosedAs | None]
    roles: frozenset[CallerRole]
    approval: bool = False
    reason: bool = False
    guest_while_pending: bool = False


def _rule(when: frozenset[ClosedAs | None], *roles: CallerRole, pending: bool = False) -> Rule:
    return Rule(when, frozenset(roles), guest_while_pending=pending)


def _manager(when: frozenset[ClosedAs | None], *, reason: bool = False) -> Rule:
    return Rule(when, frozenset({_STAFF}), approval=True, reason=reason)


RULES: dict[Action, Rule] = {
    Action.ACCEPT: _rule(_OPEN, _STAFF, _KITCHEN),
    Action.ADD_LINE: _rule(_OPEN, _STAFF, _GUEST),
    Action.EDIT_LINE: _rule(_OPEN, _STAFF, pending=True),
    Action.VOID_LINE: _rule(_OPEN, _STAFF, pending=True),
    Action.VOID_FIRED_LINE: _manager(_OPEN, reason=True),
    Action.DISCOUNT: _manager(_OPEN, reason=True),
    Action.COMP: _manager(_OPEN, reason=True),
    Action.SERVICE: _manager(_OPEN, reason=True),
    Action.COOK: _rule(_OPEN, _STAFF, _KITCHEN),
    Action.EDIT_ORDER: _rule(_OPEN, _STAFF),
    Action.PAY: _rule(_OPEN | _COMPLETED, _STAFF),
    Action.REFUND: Rule(_ALWAYS, frozenset({_STAFF}), approval=True, reason=True),
    Action.COMPLETE: _rule(_OPEN, _STAFF),
    Action.COMPLETE_UNPAID: _manager(_OPEN),
    Action.CANCEL: _rule(_OPEN, _STAFF),
    Action.CANCEL_FIRED_OR_PAID: _manager(_OPEN),
    Action.REOPEN: _manager(_COMPLETED),
    Action.DELETE: _rule(_OPEN, _STAFF),
    Action.RESTORE: _rule(_ALWAYS, _STAFF),
}

_ON_DELETED = frozenset({Action.REFUND, Action.RESTORE})


def permit(order: Order, act: Act, action: Action, *, reason: str | None = None) -> None:
    """Checks an action against `RULES`. Raises Refused: absent `order_deleted`, conflict `order_closed`, forbidden
    `forbidden` or `manager_needed`, invalid `reason_needed`."""
    rule = RULES[action]
    if order.deleted is not None and action not in _ON_DELETED:
        raise absent("order_deleted", "the order is deleted")
    closed = order.closed.as_ if order.closed is not None else None
    if closed not in rule.when:
        if closed is None:
            raise conflict("order_open", f"{action} is not allowed while the order is open", status=order.status)
        raise conflict("order_closed", f"the order is {closed}", status=closed)
    if act.role is not CallerRole.MANAGER:
        pending_guest = rule.guest_while_pending and act.role is CallerRole.GUEST and order.accepted is None
        if act.role not in rule.roles and not pending_guest:
            raise forbidden("forbidden", f"the role {act.role} may not do this")
        if rule.approval and act.manager_approval:
            raise forbidden("manager_needed", "only a manager may do this")
    if rule.reason and not reason:
        raise invalid("reason_needed", "a reason is required", field="reason")
