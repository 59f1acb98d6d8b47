"""The entities of a newer release, as a test registers them. The product has none of these fields.

Minor: an order has `fiscal_id` more, each of its items `course`, each of its payments `card_brand`.
Major: version 2 of a table has `places`, by area, instead of `seats`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import Struct

from shared.entities import registry
from shared.entities.contract import Id, Label, Time, encode
from shared.entities.entity import Column, Entity, Table
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import Order, OrderItem, Payment
from shared.entities.table import ENTITY as TABLE
from shared.entities.table import TableState
from tests.rigs import builders


class NewerItem(OrderItem, frozen=True, kw_only=True):
    course: int | None = None


class NewerPayment(Payment, frozen=True, kw_only=True):
    card_brand: Label | None = None


class NewerOrder(Order, frozen=True, kw_only=True):
    items: tuple[NewerItem, ...]
    payments: tuple[NewerPayment, ...] = ()
    fiscal_id: Label | None = None


NEWER_ORDER = replace(ORDER, state=NewerOrder)


def newer_order(*, course: int, card_brand: str, fiscal_id: str, **fields: Any) -> NewerOrder:
    """An order of the newer release with one item and one payment. `fields` are those of `builders.order`."""
    plain = builders.order(items=1, payments=(builders.payment(),), **fields)
    state = msgspec.json.decode(encode(plain))
    (item,), (payment,) = state["items"], state["payments"]
    newer = {"items": [{**item, "course": course}], "payments": [{**payment, "card_brand": card_brand}]}
    return msgspec.convert({**state, **newer, "fiscal_id": fiscal_id}, NewerOrder)


class Places(Struct, frozen=True):
    area: Label
    seats: int


class TableV2(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    label: Label
    places: tuple[Places, ...]
    created_at: Time
    updated_at: Time
    state: TableState = TableState.FREE
    deleted_at: Time | None = None


def seats_to_places(table: dict[str, Any]) -> dict[str, Any]:
    """The upcast of a table from version 1 to 2."""
    seats = table.pop("seats")
    return {**table, "places": [{"area": "inside", "seats": seats}]}


def _seats(table: TableV2) -> int:
    return sum(one.seats for one in table.places)


_COLUMNS = tuple(Column("seats", "int4", _seats) if one.name == "seats" else one for one in TABLE.table.columns)
READS_V2 = replace(TABLE, state=TableV2, table=Table("tables", _COLUMNS), upcasts=(seats_to_places,))
"""The first release with version 2. It would write `seats` too, as version 1 needs; no test reads what it writes."""
WRITES_V2 = replace(READS_V2, writes=2)


@contextmanager
def registered(entity: Entity) -> Iterator[Entity]:
    """Registers an entity in this process for the block, as its release does."""
    before = registry.ENTITIES[entity.name]
    registry.ENTITIES[entity.name] = entity
    try:
        yield entity
    finally:
        registry.ENTITIES[entity.name] = before
