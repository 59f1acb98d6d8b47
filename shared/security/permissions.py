"""Authorization: the complete table of roles and actions.

Every route names one of these actions, and the authorization middleware checks it before the handler runs. Two more
rules apply everywhere: a tenant sees only its own data, and a customer sees only the orders of its session.
"""

from shared.security.tokens import Role

_ADMIN = frozenset({Role.ADMIN})
_STAFF = frozenset({Role.ADMIN, Role.STAFF})
_GUESTS = frozenset({Role.ADMIN, Role.STAFF, Role.CUSTOMER})
_OPERATORS = frozenset({Role.OPERATOR})
_ANYBODY = frozenset(Role)

PUBLIC = "public"
"""The action of routes that need no token."""

ACTIONS: dict[str, frozenset[Role]] = {
    PUBLIC: _ANYBODY,
    "me.read": _ANYBODY,
    "orders.place": _GUESTS,
    "orders.read": _GUESTS,
    "orders.change": _STAFF,
    "orders.summary": _STAFF,
    "payments.record": _STAFF,
    "payments.read": _STAFF,
    "menu.read": _GUESTS,
    "menu.change": _ADMIN,
    "menu.availability": _STAFF,
    "tables.read": _GUESTS,
    "tables.change": _STAFF,
    "work.read": _STAFF,
    "work.change": _STAFF,
    "customers.read": _STAFF,
    "customers.change": _STAFF,
    "inventory.read": _STAFF,
    "inventory.change": _STAFF,
    "users.manage": _ADMIN,
    "audit.read": _ADMIN,
    "deleted.read": _ADMIN,
    "sync.read": _STAFF | _OPERATORS,
    "events.follow": _GUESTS,
    "dead_letters.read": frozenset({Role.OPERATOR, Role.ADMIN}),
    "dead_letters.repair": _OPERATORS,
    "conflicts.read": frozenset({Role.OPERATOR, Role.ADMIN}),
    "conflicts.resolve": _OPERATORS,
    "ops.read": _OPERATORS,
}


def allowed(action: str, role: Role) -> bool:
    """Returns whether a role may do an action. Raises KeyError for an unknown action."""
    return role in ACTIONS[action]
