"""The declaration of an entity: lane, conflict strategy, tables, mirror index, numbering.

The stores are generic: the PostgreSQL writer and the mirror writer read only these declarations.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from shared.entities.contract import BrokenContract, Change, Lane, encode, in_range
from shared.entities.overlay import overlay, with_field

# The text of msgspec's error for a negative amount.
_NEGATIVE = "Expected `int` >= 0"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

VERSION_FIELD = "schema_version"
"""The field that names the major version of an encoded state. Version 1 has no such field."""
_VERSION_FIELD = f'"{VERSION_FIELD}"'.encode()
_TYPE_VERSION = re.compile(r"\.v([1-9][0-9]{0,3})$(?!\n)")

Upcast = Callable[[dict[str, Any]], dict[str, Any]]
"""Converts a state, as plain JSON values, from one major version to the next. Must keep the fields that it does not
know. Pure."""

Hold = tuple[str, int, datetime]
"""A hold of stock: (inventory item id, quantity, time). A count of the item after this time already
lacks the quantity. The time is a stamp: the claim moves it if the clock of its process is wrong."""


class _Versioned(Struct, frozen=True):
    schema_version: Annotated[int, Meta(ge=1)] = 1


_versions = msgspec.json.Decoder(_Versioned)


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
    """The field of the state that contains the facts, itself or in its elements."""
    nested: Callable[[Any], Sequence[Struct]] | None = None
    """Returns the facts in the elements of the field as rows, which may also name their element. None if the elements
    are the facts."""

    def rows(self, state: Any) -> Sequence[Struct]:
        found: Sequence[Struct] = getattr(state, self.field) if self.nested is None else self.nested(state)
        return found


@dataclass(frozen=True)
class Numbering:
    """The numbering of an entity. Each business day is a series. A state without a number has an empty string, and its
    claim assigns the number (shared/rail/order_numbers.py)."""

    business_day: Callable[[Any], str]
    number: Callable[[Any], str]
    with_number: Callable[[Any, str], Any]
    field: str
    """The name of the number in an encoded state, which is the same in every major version."""


@dataclass(frozen=True)
class Keyed:
    """Which entities may have been created with an Idempotency-Key. The mirror keeps the heads of those that have left
    the live window, so that a repeated request does not create them again."""

    mark: str
    """A text that their encoded states contain. An empty text means all entities."""
    sql: str
    """The same as an SQL condition on their table."""


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
    keyed: Keyed | None = None
    """None if no entity leaves the live window."""
    score: Callable[[Any], float] = lambda state: state.created_at.timestamp()
    """Returns the sort key of a state in the mirror's live index."""
    children: Sequence[Children] = ()
    facts: Sequence[Facts] = ()
    numbering: Numbering | None = None
    holds: Callable[[Any], Sequence[Hold]] | None = None
    """Returns the stock that a state holds."""
    stock: Callable[[Any], tuple[int | None, datetime]] | None = None
    """Returns (quantity, time of the count) of an inventory item. The quantity is None if the item is deleted."""
    restamp: Callable[[Any, Any, Mapping[str, datetime]], Any] = lambda state, before, stamps: state
    """(state, state before or None, inventory item -> time) -> the state whose new holds, or whose count, have this
    time. The claim orders holds and counts; the clocks only propose a time."""
    partly_before: frozenset[str] = frozenset()
    """Lists that `before` in an event holds in part: only the elements that the change altered or removed. Of any other
    changed field, it holds the whole old value."""
    upcasts: Sequence[Upcast] = ()
    """The upcasts from version 1 to 2, from 2 to 3 and so on. This release reads one major version more than there are
    upcasts."""
    writes: int = 1
    """The major version that this release writes. A version is read in one release and written in the next."""
    alias: str = ""
    """The name in the terminals' contract, if it is not the name in camel case."""

    @property
    def wire_alias(self) -> str:
        """The name in the terminals' contract: `inventory_item` -> `InventoryItem`."""
        return self.alias or self.name.title().replace("_", "")

    @property
    def reads(self) -> int:
        """The newest major version that this release reads; `state` has its shape."""
        return 1 + len(self.upcasts)

    def type(self, event: str, version: int | None = None) -> str:
        """Returns the type of an event on the wire: `created` -> `ticketrail.order.created.v1`. `version`: the major
        version; by default the one that this release writes."""
        if event not in self.events:
            raise ValueError(f"{self.name} has no event {event!r}")
        return f"ticketrail.{self.name}.{event}.v{version or self.writes}"

    def encode_state(self, state: Struct, base: bytes | None = None) -> tuple[int, bytes]:
        """Returns (major version, encoded state). `base`: the encoded state that `state` was made from. Its fields that
        this release does not know are kept, and so is its major version if that is newer than the one that this release
        writes. Raises BrokenContract if `base` is newer than this release."""
        version = max(self.writes, 1 if base is None else version_of(base))
        encoded = encode(state) if base is None else overlay(self.upcast(base), state)
        if version_of(encoded) != version:
            encoded = with_field(encoded, VERSION_FIELD, None if version == 1 else encode(version))
        return version, encoded

    def upcast(self, encoded: bytes) -> bytes:
        """Returns an encoded state in the newest major version that this release reads. Raises BrokenContract if the
        state is of a newer one."""
        version = version_of(encoded)
        if version == self.reads:
            return encoded
        if version > self.reads:
            raise BrokenContract(
                "unsupported_version", f"the {self.name} has version {version}, but this release reads {self.reads}"
            )
        try:
            state: dict[str, Any] = msgspec.json.decode(encoded)
            for upcast in self.upcasts[version - 1 :]:
                state = upcast(state)
            return encode({**state, VERSION_FIELD: self.reads})
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # the state is not checked yet
            raise BrokenContract(
                "contract_broken", f"data.after is not a state of version {version}: {error}"
            ) from error

    def decode_state(self, encoded: bytes) -> Any:
        """Decodes a state from the mirror or PostgreSQL, which was validated before it was stored. Raises
        BrokenContract if a newer release wrote it in a major version that this release does not read."""
        return msgspec.json.decode(self.upcast(encoded), type=self.state)

    def decode(self, change: Change) -> Any:
        """Returns the validated state after a change. Raises BrokenContract if it is invalid or names another tenant
        or entity."""
        after = bytes(change.data.after)
        if version_of(after) != type_version(change.type):
            raise BrokenContract("contract_broken", f"data.after has not the version of the type {change.type!r}")
        try:
            state = msgspec.json.decode(self.upcast(after), type=self.state)
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


def version_of(encoded: bytes) -> int:
    """Returns the major version of an encoded state. Raises BrokenContract."""
    if _VERSION_FIELD not in encoded:
        return 1
    try:
        return _versions.decode(encoded).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenContract("contract_broken", f"data.after: {error}") from error


@lru_cache(1_000)
def type_version(type_: str) -> int:
    """Returns the major version in a type: `ticketrail.order.created.v2` -> 2. Raises BrokenContract."""
    found = _TYPE_VERSION.search(type_)
    if found is None:
        raise BrokenContract("unknown_type", f"type {type_!r} has no version such as v1")
    return int(found[1])


def at_micros(micros: int) -> datetime:
    """Returns the time that is `micros` microseconds after 1970."""
    return _EPOCH + timedelta(microseconds=micros)


def _check_time(table: str, column: Column, row: Any) -> None:
    if (at := column.of(row)) is not None and not in_range(at):
        raise BrokenContract("contract_broken", f"data.after: {table}.{column.name} is out of range")


@lru_cache(1_000)
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
