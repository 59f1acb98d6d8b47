"""The declaration of an entity: lane, conflict strategy, tables, mirror index, numbering.

The stores are generic: the PostgreSQL writer and the mirror writer read only these declarations.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from typing import Any

import msgspec
from msgspec import Struct

from shared.entities.contract import BrokenContract, Change, Lane, in_range

# The text of msgspec's error for a negative amount.
_NEGATIVE = "Expected `int` >= 0"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Hold = tuple[str, int, datetime]
"""A hold of stock: (inventory item id, quantity, time). A count of the item after this time already
lacks the quantity."""


class OnConflict(StrEnum):
    """The side that wins when a terminal and the central system changed the same entity."""

    TERMINAL_WINS = "terminal_wins"
    CENTRAL_WINS = "central_wins"
    MERGE = "merge"
    MANUAL_MERGE = "manual_merge"


@dataclass(frozen=True)
class Column:
    name: str
    pg_type: str
    value: Callable[[Any], Any] | None = None
    """Reads the value from the row's struct; the default is the attribute of the same name."""

    def of(self, row: Any) -> Any:
        return getattr(row, self.name) if self.value is None else self.value(row)


@dataclass(frozen=True)
class _Rows:
    """Name and columns of a table."""

    name: str
    columns: Sequence[Column]

    @cached_property
    def times(self) -> Sequence[Column]:
        """The columns of type timestamptz. Their times must be in range in every change."""
        return tuple(column for column in self.columns if column.pg_type == "timestamptz")


@dataclass(frozen=True)
class Table(_Rows):
    """The table with the current state of each entity, which readers use. Its key is (restaurant_id, id); version and
    change_id are the guard."""


@dataclass(frozen=True, kw_only=True)
class Children(_Rows):
    """Rows that belong to one state. The rows of the next state replace them. Their key is (restaurant_id, <parent>,
    position)."""

    parent: str
    rows: Callable[[Any], Sequence[Struct]]


@dataclass(frozen=True, kw_only=True)
class Facts(_Rows):
    """Rows of facts, each with its own id and a parent. They are kept from every snapshot, including superseded and
    forked ones."""

    parent: str
    field: str
    """The field of the state that contains the facts."""

    def rows(self, state: Any) -> Sequence[Struct]:
        found: Sequence[Struct] = getattr(state, self.field)
        return found


@dataclass(frozen=True)
class Numbering:
    """The numbering of an entity. Each business day is a series. A state without a number has an empty string, and its
    claim assigns the number (shared/rail/order_numbers.py)."""

    business_day: Callable[[Any], str]
    number: Callable[[Any], str]
    with_number: Callable[[Any, str], Any]


@dataclass(frozen=True)
class Entity:
    name: str
    state: type[Struct]
    events: frozenset[str]
    lane: Lane
    on_conflict: OnConflict
    table: Table
    live: Callable[[Any], bool]
    """Returns whether a state belongs to the mirror's live window whatever its age, such as an open order or a dish on
    the menu."""
    window_sql: str = ""
    """The live window as an SQL condition on the table `t`; `$1` is the time when the window begins. An empty text
    means all rows."""
    score: Callable[[Any], float] = lambda state: state.created_at.timestamp()
    """Returns the sort key of a state in the mirror's live index."""
    children: Sequence[Children] = ()
    facts: Sequence[Facts] = ()
    numbering: Numbering | None = None
    holds: Callable[[Any], Sequence[Hold]] | None = None
    """Returns the stock that a state holds."""
    stock: Callable[[Any], tuple[int, datetime] | None] | None = None
    """Returns (quantity, time of the count) of an inventory item, or None if the item is deleted."""

    def type(self, event: str) -> str:
        """Returns the type of an event on the wire: `created` -> `ticketrail.order.created.v1`."""
        if event not in self.events:
            raise ValueError(f"{self.name} has no event {event!r}")
        return f"ticketrail.{self.name}.{event}.v1"

    def decode_state(self, encoded: bytes) -> Any:
        """Decodes a state from the mirror or PostgreSQL, which was validated before it was stored."""
        return msgspec.json.decode(encoded, type=self.state)

    def decode(self, change: Change) -> Any:
        """Returns the validated state after a change. Raises BrokenContract, also if the state names another tenant or
        entity."""
        try:
            state = msgspec.json.decode(change.data.after, type=self.state)
        except msgspec.ValidationError as error:
            reason = "negative_amount" if _NEGATIVE in str(error) else "contract_broken"
            raise BrokenContract(reason, f"data.after: {error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BrokenContract("contract_broken", f"data.after: {error}") from error
        if state.restaurant_id != change.restaurantid:  # type: ignore[attr-defined]
            raise BrokenContract("wrong_tenant", "data.after.restaurant_id is not the restaurantid of the change")
        if state.id != change.entity_id:  # type: ignore[attr-defined]
            raise BrokenContract("contract_broken", "data.after.id is not the id in the subject")
        for column in self.table.times:
            _check_time(self.table.name, column, state)
        for part in (*self.children, *self.facts):
            for column in part.times:
                for row in part.rows(state):  # type: ignore[attr-defined]
                    _check_time(part.name, column, row)
        return state


def micros(at: datetime) -> int:
    """Returns the exact microseconds since 1970, so that all stores order two times in the same way."""
    return (at - _EPOCH) // timedelta(microseconds=1)


def _check_time(table: str, column: Column, row: Any) -> None:
    if (at := column.of(row)) is not None and not in_range(at):
        raise BrokenContract("contract_broken", f"data.after: {table}.{column.name} is out of range")


def event_of(type_: str) -> tuple[str, str, str]:
    """Splits a type: `ticketrail.order.created.v1` -> ("order", "created", "v1"). Raises BrokenContract for a type of
    another system."""
    parts = type_.split(".")
    if len(parts) != 4 or parts[0] != "ticketrail":
        raise BrokenContract("unknown_type", f"type {type_!r} is not a type of Ticketrail")
    return parts[1], parts[2], parts[3]


def columns(*names_and_types: str) -> Iterable[Column]:
    """Yields columns whose values are the attributes of the same name: `columns("name text", "price int8")`."""
    for text in names_and_types:
        name, _, pg_type = text.partition(" ")
        yield Column(name, pg_type)
