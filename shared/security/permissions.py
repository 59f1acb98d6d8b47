"""Authorization: the complete tables of roles and actions, and of the scopes of API keys and actions.

Every route names one of these actions, and the authorization middleware checks it before the handler runs. Two more
rules apply everywhere: a tenant sees only its own data, and a customer sees only the orders of its session.
"""

from enum import StrEnum

from shared.security.tokens import Identity, Role

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
    "password.change": _ANYBODY,
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
    "api_keys.manage": _ADMIN,
    "audit.read": _ADMIN,
    "deleted.read": _ADMIN,
    "sync.read": _STAFF | _OPERATORS,
    "sync.import": frozenset(),  # only API keys
    "events.follow": _GUESTS,
    "dead_letters.read": frozenset({Role.OPERATOR, Role.ADMIN}),
    "dead_letters.repair": _OPERATORS,
    "conflicts.read": frozenset({Role.OPERATOR, Role.ADMIN}),
    "conflicts.resolve": _OPERATORS,
    "ops.read": _OPERATORS,
}


class Scope(StrEnum):
    """The permissions of an API key. A key has one or more of them, and never more than its restaurant's staff."""

    MENU_READ = "menu:read"
    MENU_WRITE = "menu:write"
    ORDERS_READ = "orders:read"
    ORDERS_WRITE = "orders:write"
    """Places orders, and does nothing else with them."""
    ORDERS_CHANGE = "orders:change"
    PAYMENTS_READ = "payments:read"
    PAYMENTS_WRITE = "payments:write"
    TABLES_READ = "tables:read"
    CUSTOMERS_READ = "customers:read"
    CUSTOMERS_WRITE = "customers:write"
    INVENTORY_READ = "inventory:read"
    INVENTORY_WRITE = "inventory:write"
    EVENTS_READ = "events:read"
    SYNC_READ = "sync:read"
    SYNC_WRITE = "sync:write"
    """Imports orders of another system by `POST /api/sync/order`."""
    TERMINAL = "terminal"
    """Everything that a terminal in the restaurant needs."""


SCOPES: dict[Scope, frozenset[str]] = {
    Scope.MENU_READ: frozenset({"menu.read"}),
    Scope.MENU_WRITE: frozenset({"menu.change", "menu.availability"}),
    Scope.ORDERS_READ: frozenset({"orders.read", "orders.summary"}),
    Scope.ORDERS_WRITE: frozenset({"orders.place"}),
    Scope.ORDERS_CHANGE: frozenset({"orders.change"}),
    Scope.PAYMENTS_READ: frozenset({"payments.read"}),
    Scope.PAYMENTS_WRITE: frozenset({"payments.record"}),
    Scope.TABLES_READ: frozenset({"tables.read"}),
    Scope.CUSTOMERS_READ: frozenset({"customers.read"}),
    Scope.CUSTOMERS_WRITE: frozenset({"customers.change"}),
    Scope.INVENTORY_READ: frozenset({"inventory.read"}),
    Scope.INVENTORY_WRITE: frozenset({"inventory.change"}),
    Scope.EVENTS_READ: frozenset({"events.follow"}),
    Scope.SYNC_READ: frozenset({"sync.read"}),
    Scope.SYNC_WRITE: frozenset({"sync.import"}),
    Scope.TERMINAL: frozenset(
        {
            "menu.read",
            "menu.availability",
            "orders.place",
            "orders.read",
            "orders.change",
            "payments.record",
            "payments.read",
            "tables.read",
            "tables.change",
            "work.read",
            "work.change",
            "customers.read",
            "inventory.read",
            "sync.read",
            "events.follow",
        }
    ),
}


def allowed(action: str, role: Role) -> bool:
    """Returns whether a role may do an action. Raises KeyError for an unknown action."""
    return role in ACTIONS[action]


def may(identity: Identity, action: str) -> bool:
    """Returns whether a caller may do an action: by its role, or with an API key by its scopes alone. A scope that this
    release does not know allows nothing."""
    if identity.scopes is None:
        return allowed(action, identity.role)
    return any(action in actions for scope, actions in SCOPES.items() if scope in identity.scopes)


def scopes_for(action: str) -> list[str]:
    """Returns the scopes that allow an action."""
    return sorted(scope.value for scope, actions in SCOPES.items() if action in actions)
