"""Groups of dishes: categories and brands. They have the same fields and rules, but different names and tables."""

from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Id, Label, Lane, Text, Time
from shared.entities.entity import Entity, OnConflict, Table, columns
from shared.entities.menu_item import Url


class MenuGroup(Struct, frozen=True, kw_only=True):
    """A group of dishes. Dishes refer to the group by its `name`."""

    id: Id
    restaurant_id: Id
    name: Label
    created_at: Time
    updated_at: Time
    description: Text | None = None
    image_url: Url | None = None
    position: Annotated[int, Meta(ge=0, le=10_000)] = 0
    deleted_at: Time | None = None
    request_hash: str | None = None
    """SHA-256 of the request that created it, if that had an Idempotency-Key."""


def menu_group_entity(name: str, state: type[MenuGroup], *, table: str) -> Entity:
    """Returns the entity of one kind of group. `table`: the name of its PostgreSQL table."""
    return Entity(
        name=name,
        state=state,
        events=frozenset({"created", "updated", "deleted", "restored"}),
        lane=Lane.NORMAL,
        on_conflict=OnConflict.TERMINAL_WINS,
        live=lambda group: group.deleted_at is None,
        table=Table(
            table,
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
