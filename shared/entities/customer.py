"""A customer of a restaurant.

Sums are not part of the state. `total_spent` and `visits` are derived from the payments of the customer's orders;
`loyalty_points` is derived from these payments and from `loyalty_moves`. Payments and moves are facts with their own
ids, so that each one counts once, however often an event repeats it.
"""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.entities.contract import Id, Label, Lane, Text, Time
from shared.entities.entity import Column, Entity, Facts, OnConflict, Table, columns

Phone = Annotated[str, Meta(pattern=r"^\+[1-9][0-9]{3,14}$", examples=["+4930123456"])]
"""A phone number in E.164 format."""
Points = Annotated[int, Meta(ge=-(10**9), le=10**9)]


class LoyaltyMove(Struct, frozen=True, kw_only=True):
    """A change of the loyalty points that does not come from a payment: points that are added or
    redeemed (negative)."""

    id: Id
    points: Points
    created_at: Time
    reason: Label | None = None
    request_key: Id | UnsetType = UNSET
    """The id that was derived from the Idempotency-Key of a request that also had an id."""


class Customer(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    name: Label
    created_at: Time
    updated_at: Time
    phone: Phone | None = None
    email: Label | None = None
    notes: Text | None = None
    loyalty_moves: tuple[LoyaltyMove, ...] = ()
    """The latest moves. The table `loyalty_moves` has all of them."""
    deleted_at: Time | None = None
    request_hash: str | None = None
    """SHA-256 of the request that created it, if that had an Idempotency-Key."""


ENTITY = Entity(
    name="customer",
    state=Customer,
    events=frozenset({"created", "updated", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.MERGE,
    live=lambda customer: customer.deleted_at is None,
    table=Table(
        "customers",
        tuple(
            columns(
                "name text",
                "phone text",
                "email text",
                "notes text",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            )
        ),
    ),
    facts=(
        Facts(
            name="loyalty_moves",
            parent="customer_id",
            columns=(
                *columns("points int4", "reason text", "created_at timestamptz"),
                Column("request_key", "uuid", lambda one: None if one.request_key is UNSET else one.request_key),
            ),
            field="loyalty_moves",
        ),
    ),
)
