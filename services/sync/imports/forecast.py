"""Computes the outcome of an import without changing anything.

An order may have several rows, and each row is compared with the state that the rows before it would have produced.
These states are kept in a temporary file, because an import may have more orders than fit into memory.
"""

import sqlite3
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import msgspec

from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.external_orders import ExternalOrder, new_order, order_id, updated
from shared.entities.contract import now
from shared.entities.order import Order


class ImportForecast:
    def __init__(self, upserts: ExternalOrderUpserts) -> None:
        self._upserts = upserts
        self._new: set[str] = set()

    def __enter__(self) -> "ImportForecast":
        self._states = sqlite3.connect("")  # a temporary file, which SQLite removes
        self._states.execute("create table states (id text primary key, state blob not null) without rowid")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._states.close()

    async def look_up(self, orders: Sequence[ExternalOrder]) -> None:
        """Looks up which of the orders do not exist yet, for the next calls of `outcome`. Raises one of UNAVAILABLE."""
        self._new = await self._upserts.unknown(orders)

    async def outcome(self, order: ExternalOrder) -> Literal["created", "updated", "unchanged"]:
        """Returns the outcome that one row would have after the rows before it. Raises the errors of
        `ExternalOrderUpserts.upsert`."""
        restaurant, at = await self._upserts.restaurant(str(order.restaurant_id)), now()
        id_, sent = order_id(restaurant.id, order.name), new_order(order, restaurant, at)
        before = await self._before(id_, order)
        after = sent if before is None else updated(before, sent, order, restaurant, at)
        if after is None:
            return "unchanged"
        self._states.execute("insert or replace into states values (?, ?)", (id_, msgspec.json.encode(after)))
        return "created" if before is None else "updated"

    async def _before(self, id_: str, order: ExternalOrder) -> Order | None:
        row = self._states.execute("select state from states where id = ?", (id_,)).fetchone()
        if row is not None:
            return msgspec.json.decode(row[0], type=Order)
        return None if id_ in self._new else await self._upserts.state(order)
