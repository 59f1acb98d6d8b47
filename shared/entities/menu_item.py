"""A dish on the menu: what it is called, what it costs, whether it can be ordered now."""

from msgspec import Struct

from shared.entities.contract import Id, Label, Lane, Money, Text, Time
from shared.entities.entity import Entity, OnConflict, Table, columns


class MenuItem(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    name: Label
    price: Money
    category: Label
    created_at: Time
    updated_at: Time
    description: Text | None = None
    is_available: bool = True
    deleted_at: Time | None = None


ENTITY = Entity(
    name="menu_item",
    state=MenuItem,
    events=frozenset({"created", "updated", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.MERGE,
    live=lambda item: item.deleted_at is None,
    table=Table(
        "menu_items",
        tuple(
            columns(
                "name text",
                "price int8",
                "category text",
                "description text",
                "is_available bool",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            )
        ),
    ),
)
