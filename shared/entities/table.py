"""A table of the restaurant."""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Id, Label, Lane, Time
from shared.entities.entity import Entity, OnConflict, Table, columns

Seats = Annotated[int, Meta(ge=1, le=1_000)]


class TableState(StrEnum):
    FREE = "free"
    OCCUPIED = "occupied"
    RESERVED = "reserved"


class DiningTable(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    label: Label
    seats: Seats
    created_at: Time
    updated_at: Time
    state: TableState = TableState.FREE
    deleted_at: Time | None = None
    request_hash: str | None = None
    """SHA-256 of the request that created it, if that had an Idempotency-Key."""


ENTITY = Entity(
    name="table",
    state=DiningTable,
    events=frozenset({"created", "updated", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.TERMINAL_WINS,
    live=lambda table: table.deleted_at is None,
    table=Table(
        "tables",
        tuple(
            columns(
                "label text",
                "seats int4",
                "state text",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            )
        ),
    ),
)
