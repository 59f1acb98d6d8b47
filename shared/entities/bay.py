"""A bay: a place where jobs are done one after the other, such as a washing bay or a kitchen station."""

from msgspec import Struct

from shared.entities.contract import Id, Label, Lane, Time
from shared.entities.entity import Entity, OnConflict, Table, columns


class Bay(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    name: Label
    created_at: Time
    updated_at: Time
    kind: Label | None = None
    is_open: bool = True
    """A closed bay starts no job and keeps its queue."""
    deleted_at: Time | None = None
    request_hash: str | None = None
    """SHA-256 of the request that created it, if that had an Idempotency-Key."""


ENTITY = Entity(
    name="bay",
    state=Bay,
    events=frozenset({"created", "updated", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.TERMINAL_WINS,
    live=lambda bay: bay.deleted_at is None,
    table=Table(
        "bays",
        tuple(
            columns(
                "name text",
                "kind text",
                "is_open bool",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            )
        ),
    ),
)
