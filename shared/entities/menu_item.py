"""A dish on the menu: its name, price, customizations and the stock that it consumes."""

from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import SENTENCE, Id, Label, Lane, Money, Text, Time, encode
from shared.entities.entity import Column, Entity, OnConflict, Table, columns

# Python's `$` alone also matches before a final line break.
Url = Annotated[
    str,
    Meta(
        max_length=2_000,
        pattern=r"^https?://[^\s\x00]+$(?!\n)",
        extra={SENTENCE: "must be a URL that begins with https:// or http://"},
        examples=["https://trattoria.example/dish.jpg"],
    ),
]
Choices = Annotated[int, Meta(ge=0, le=100)]
Units = Annotated[int, Meta(ge=1, le=10**6)]


class Option(Struct, frozen=True):
    name: Label
    price: Money = 0
    """The amount that this option adds to the price of one piece, in minor units."""
    is_available: bool = True


class CustomizationGroup(Struct, frozen=True):
    """An order must choose `min_choices` to `max_choices` of the options."""

    name: Label
    options: Annotated[tuple[Option, ...], Meta(min_length=1, max_length=100)]
    min_choices: Choices = 0
    max_choices: Choices = 1


class Consumption(Struct, frozen=True):
    """The stock that one piece consumes, in the unit of the inventory item."""

    inventory_item_id: Id
    quantity: Units


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
    brand: Label | None = None
    image_url: Url | None = None
    customizations: Annotated[tuple[CustomizationGroup, ...], Meta(max_length=50)] = ()
    consumes: Annotated[tuple[Consumption, ...], Meta(max_length=50)] = ()
    request_hash: str | None = None
    """SHA-256 of the request that created it, if that had an Idempotency-Key."""


ENTITY = Entity(
    name="menu_item",
    alias="Product",
    state=MenuItem,
    events=frozenset({"created", "updated", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.MERGE,
    live=lambda item: item.deleted_at is None,
    table=Table(
        "menu_items",
        (
            *columns(
                "name text",
                "price int8",
                "category text",
                "description text",
                "is_available bool",
                "brand text",
                "image_url text",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            ),
            Column("customizations", "jsonb", lambda item: encode(item.customizations).decode()),
            Column("consumes", "jsonb", lambda item: encode(item.consumes).decode()),
        ),
    ),
)
