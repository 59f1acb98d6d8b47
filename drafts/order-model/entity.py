"""An order with its lines and payments, as one aggregate with one version (docs/orders.md): its contract, tables and
mirror index. `state.py` has its shape; the other files have its rules."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec
from msgspec import UNSET, Struct

from shared.entities.contract import Label, Id, Lane, Time, encode
from shared.entities.entity import Children, Column, Entity, Facts, Hold, Keyed, Numbering, OnConflict, Table, columns
from shared.entities.order.derive import derive
from shared.entities.order.state import Line, Order, OrderStatus, StockHold

_CLOSED = (OrderStatus.COMPLETED, OrderStatus.CANCELLED)


class _VoidRow(Struct, frozen=True):
    """A void with its line, as a row."""

    id: Id
    line_id: Id
    quantity: int | None
    reason: Label | None
    wasted: bool
    at: Time
    by: Label | None


def _voids(order: Order) -> list[_VoidRow]:
    return [
        _VoidRow(void.id, line.id, void.quantity, void.reason, void.wasted, void.at, void.by)
        for line in order.items
        for void in line.voids
    ]


def _held(order: Order) -> Sequence[Hold]:
    return [(hold.inventory_item_id, hold.quantity, hold.held_at or order.created_at) for hold in order.holds]


def _hold_rows(order: Order) -> list[StockHold]:
    """Returns the holds with `held_at` set in each one, because the index of the table contains that column."""
    return [msgspec.structs.replace(hold, held_at=hold.held_at or order.created_at) for hold in order.holds]


def _restamped(order: Order, before: Order | None, stamps: Mapping[str, datetime]) -> Order:
    """Moves the holds of new lines, and those of an order that was restored, to their stamps. A line has one time, so it
    gets the latest stamp of its stock: the claim asks again until none of its holds is below a count."""
    known = {line.id for line in before.items} if before is not None else set()
    restored = order.held_from is not None and (before is None or before.held_from != order.held_from)

    def stamped(line: Line, now: datetime | None) -> datetime | None:
        found = [stamps[one.inventory_item_id] for one in line.consumes if one.inventory_item_id in stamps]
        return max(found, default=now) if now is None else max([*found, now])

    if restored:
        return derive(msgspec.structs.replace(order, held_from=max([order.held_from, *stamps.values()])))
    items = tuple(
        line if line.id in known else msgspec.structs.replace(line, held_at=stamped(line, line.held_at))
        for line in order.items
    )
    return derive(msgspec.structs.replace(order, items=items))


def _json(name: str) -> Column:
    return Column(name, "jsonb", lambda row: encode(getattr(row, name)).decode())


ENTITY = Entity(
    name="order",
    alias="SaleOrder",
    state=Order,
    events=frozenset({"created", "updated", "status_changed", "payment_recorded", "deleted", "restored", "erased"}),
    lane=Lane.CRITICAL,
    on_conflict=OnConflict.TERMINAL_WINS,
    live=lambda order: order.status not in _CLOSED and order.deleted_at is None,
    window_sql="(t.updated_at >= $1 or (t.status not in ('completed', 'cancelled') and t.deleted_at is null))",
    keyed=Keyed(mark='"request_hash":"', sql="request_hash is not null"),
    table=Table(
        "orders",
        (
            *columns("order_number text", "business_day date", "status text", "type text", "table_id uuid"),
            *columns("guests int4", "scheduled_for timestamptz", "customer_name text", "customer_phone text"),
            *columns("customer_email text", "delivery_address text", "customer_session_id text", "currency text"),
            *columns("subtotal int8", "tax_basis_points int4", "tax_amount int8", "service_amount int8"),
            *columns("tip int8", "tip_amount int8", "discount_amount int8", "deposit_used int8", "total int8"),
            *columns("due int8", "balance int8", "payment_method text", "payment_status text", "notes text"),
            *columns("special_instructions text", "placed_by text", "request_hash text", "customer_id uuid"),
            *columns("external_id text", "created_at timestamptz", "updated_at timestamptz", "deleted_at timestamptz"),
            *columns("erased_at timestamptz"),
            Column("accepted_at", "timestamptz", lambda order: order.accepted.at if order.accepted else None),
            Column("closed_at", "timestamptz", lambda order: order.closed.at if order.closed else None),
            _json("terms"),
            _json("taxes"),
            _json("flags"),
        ),
    ),
    children=(
        Children(
            name="order_items",
            parent="order_id",
            columns=(
                *columns("id uuid", "menu_item_id uuid", "name text", "ordered int4", "quantity int4"),
                *columns("unit_price int8", "line_total int8", "discount_amount int8", "tax_amount int8", "net int8"),
                *columns("special_instructions text", "tax_category text", "course int4", "seat int4"),
                *columns("station_id uuid", "added_at timestamptz", "added_by text", "seq int8"),
                Column("kitchen_state", "text", lambda line: line.kitchen.state.value),
                _json("customizations"),
            ),
            rows=lambda order: order.items,
        ),
        Children(
            name="order_holds",
            parent="order_id",
            columns=tuple(columns("inventory_item_id uuid", "quantity int8", "held_at timestamptz")),
            rows=_hold_rows,
        ),
    ),
    facts=(
        Facts(
            name="payments",
            parent="order_id",
            columns=(
                *columns("amount int8", "method text", "reference text", "created_at timestamptz", "tip int8"),
                *columns("tendered int8", "change int8", "refund_of uuid", "credit int8", "reason text"),
                *columns("business_day date", "by text"),
                Column("request_key", "uuid", lambda one: None if one.request_key is UNSET else one.request_key),
            ),
            field="payments",
        ),
        Facts(
            name="order_voids",
            parent="order_id",
            field="items",
            nested=_voids,
            columns=tuple(
                columns("line_id uuid", "quantity int4", "reason text", "wasted bool", "at timestamptz", "by text")
            ),
        ),
    ),
    holds=_held,
    restamp=_restamped,
    partly_before=frozenset({"items"}),
    numbering=Numbering(
        business_day=lambda order: order.business_day.isoformat(),
        number=lambda order: order.order_number,
        with_number=lambda order, number: msgspec.structs.replace(order, order_number=number),
        field="order_number",
    ),
)
