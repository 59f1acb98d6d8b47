"""A customer of a restaurant.

What adds up is not part of it: `total_spent` and `visits` are derived from the payments of its orders, and
`loyalty_points` from what was spent and the moves below. All are facts with ids of their own, so that each counts once
however often the events that carry it come.
"""

from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Id, Label, Lane, Text, Time
from shared.entities.entity import Entity, Facts, OnConflict, Table, columns

Phone = Annotated[str, Meta(pattern=r"^\+[1-9][0-9]{3,14}$", examples=["+4930123456"])]
"""E.164."""
Points = Annotated[int, Meta(ge=-(10**9), le=10**9)]


class LoyaltyMove(Struct, frozen=True, kw_only=True):
    """Points given beside those that spending gives, or redeemed (negative)."""

    id: Id
    points: Points
    created_at: Time
    reason: Label | None = None


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
    """The latest; the table `loyalty_moves` has every one."""
    deleted_at: Time | None = None


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
            columns=tuple(columns("points int4", "reason text", "created_at timestamptz")),
            field="loyalty_moves",
        ),
    ),
)
