"""An inventory item. Its available amount is `quantity` minus the holds of the orders accepted since the count."""

from datetime import datetime, timedelta
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.entities.contract import Id, Label, Lane, Time
from shared.entities.entity import Column, Entity, Facts, OnConflict, Table, columns

Quantity = Annotated[int, Meta(ge=-(10**12), le=10**12)]
Count = Annotated[int, Meta(ge=0, le=10**12)]


def recount_at(item: "InventoryItem", at: datetime) -> datetime:
    """Returns the time of a count that follows the last count of the item, whatever the clock says."""
    return max(at, item.counted_at + timedelta(microseconds=1))


class StockMove(Struct, frozen=True, kw_only=True):
    """A delivery (positive) or a loss (negative), in the item's unit."""

    id: Id
    quantity: Quantity
    created_at: Time
    reason: Label | None = None
    request_key: Id | UnsetType = UNSET
    """The id that was derived from the Idempotency-Key of a request that also had an id."""


class InventoryItem(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    name: Label
    quantity: Quantity
    """The amount counted at `counted_at` plus all moves since, in `unit`."""
    counted_at: Time
    created_at: Time
    updated_at: Time
    unit: Label = "piece"
    low_at: Count | None = None
    """The item is reported as low when its available amount is at most this."""
    moves: tuple[StockMove, ...] = ()
    """The latest moves. The table `stock_moves` has all of them."""
    deleted_at: Time | None = None
    request_hash: str | None = None
    """SHA-256 of the request that created it, if that had an Idempotency-Key."""


ENTITY = Entity(
    name="inventory_item",
    state=InventoryItem,
    events=frozenset({"created", "updated", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.CENTRAL_WINS,
    live=lambda item: item.deleted_at is None,
    stock=lambda item: (item.quantity if item.deleted_at is None else None, item.counted_at),
    restamp=lambda item, _, stamps: msgspec.structs.replace(item, counted_at=stamps[item.id]),
    table=Table(
        "inventory_items",
        tuple(
            columns(
                "name text",
                "quantity int8",
                "unit text",
                "low_at int8",
                "counted_at timestamptz",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            )
        ),
    ),
    facts=(
        Facts(
            name="stock_moves",
            parent="inventory_item_id",
            columns=(
                *columns("quantity int8", "reason text", "created_at timestamptz"),
                Column("request_key", "uuid", lambda one: None if one.request_key is UNSET else one.request_key),
            ),
            field="moves",
        ),
    ),
)
