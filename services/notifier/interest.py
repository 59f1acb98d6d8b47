"""Decides which events a subscriber gets: those that it requested and may see. Runs before events are encoded."""

from collections.abc import Sequence
from uuid import UUID

from msgspec import Struct

from services.notifier.events import EVERY_KIND, KINDS, PushEvent
from shared.errors import InvalidInput
from shared.security.permissions import may
from shared.security.tokens import Identity, Role


class Interest(Struct, frozen=True):
    """Subscribers with an equal interest receive the same bytes."""

    tenant: str
    kinds: int = EVERY_KIND
    order_id: str | None = None
    session_id: str | None = None
    """The session of a customer, who sees only the orders of that session; None for everybody else."""
    holds: bool = True
    """Whether the subscriber sees the stock that orders hold."""

    def wants(self, event: PushEvent) -> bool:
        """Returns whether a subscriber gets this event of its tenant. The hub separates tenants first."""
        return (
            bool(event.kind & self.kinds)
            and (self.order_id is None or event.order_id == self.order_id)
            and (self.session_id is None or event.session_id == self.session_id)
        )


def interest_of(identity: Identity, *, order_id: str, event_types: Sequence[str]) -> Interest:
    """Returns the interest that a request names. `event_types`: lists of names, separated by commas. Empty parameters
    count as absent. Raises Forbidden for a caller
    without a restaurant, and InvalidInput with the name of the parameter."""
    return Interest(
        tenant=identity.tenant,
        kinds=_kinds(event_types) or EVERY_KIND,
        order_id=_uuid(order_id) if order_id else None,
        session_id=identity.session_id if identity.role is Role.CUSTOMER else None,
        holds=may(identity, "inventory.read"),
    )


def _kinds(event_types: Sequence[str]) -> int:
    """Returns the kinds with these names, or 0 if no name is given."""
    chosen = 0
    for name in (name for names in event_types if names for name in names.split(",")):
        kind = KINDS.get(name.strip())
        if kind is None:
            raise InvalidInput(f"unknown event type {name.strip()!r}", field="eventTypes", allowed=list(KINDS))
        chosen |= kind
    return chosen


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as error:
        raise InvalidInput("not a UUID", field="orderID") from error
