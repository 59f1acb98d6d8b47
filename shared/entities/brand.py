"""A brand of dishes."""

from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Id, Label, Lane, Text, Time
from shared.entities.entity import Entity, OnConflict, Table, columns
from shared.entities.menu_item import Url


class Brand(Struct, frozen=True, kw_only=True):
    """Dishes refer to it by name: their `brand` is this `name`."""

    id: Id
    restaurant_id: Id
    name: Label
    created_at: Time
    updated_at: Time
    description: Text | None = None
    image_url: Url | None = None
    position: Annotated[int, Meta(ge=0, le=10_000)] = 0
    deleted_at: Time | None = None


ENTITY = Entity(
    name="brand",
    state=Brand,
    events=frozenset({"created", "updated", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.TERMINAL_WINS,
    live=lambda one: one.deleted_at is None,
    table=Table(
        "brands",
        tuple(
            columns(
                "name text",
                "description text",
                "image_url text",
                "position int4",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            )
        ),
    ),
)
