"""Merges two states of one order, which diverged by a fork, a terminal that was offline, or an import.

    merge(a, b) = derive(join(a, b))

`join` is commutative, associative and idempotent, so every store ends with the same order, in whichever sequence and
however often the states arrive.

| part          | merged value                                                                           |
|---------------|----------------------------------------------------------------------------------------|
| register      | the one with the larger (rev, canonical JSON); rev is the version that wrote it         |
| kitchen       | the state after the later recall; else the state that is further                       |
| fact          | all, by id; the larger JSON and a flag if two have one id                               |
| first times   | the earliest                                                                           |
| clock         | the largest                                                                            |
| fixed         | both are the same; else the larger JSON and a flag                                     |

No time decides which side wins. No quantity is edited: two waiters who each add a beer get two beers, and a void beats
an edit.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from shared.entities.contract import encode
from shared.entities.order.derive import derive
from shared.entities.order.state import (
    FACTS_DIFFER,
    FIXED_VALUES_DIFFER,
    PERSONAL,
    REGISTERS,
    Kitchen,
    Line,
    Order,
    Payment,
    Print,
    Times,
    Void,
)
from shared.entities.order.writing import rank

FIXED = (
    *("order_number", "business_day", "currency", "terms", "created_at", "customer_session_id", "placed_by"),
    *("external_id", "request_hash"),
)
LINE_FIXED = (
    *("menu_item_id", "name", "ordered", "unit_price", "customizations", "seq", "added_at", "added_by", "consumes"),
    *("tax_category", "station_id", "prep_minutes", "held_at"),
)
_LINE_REGISTER = ("course", "seat", "discount", "special_instructions")
_TIMES = Times.__struct_fields__

Fact = TypeVar("Fact", Void, Payment, Print)


def merge(a: Order, b: Order) -> Order:
    """Returns the order that has the changes of both states. Raises ValueError for two different orders."""
    return derive(join(a, b))


def join(a: Order, b: Order) -> Order:
    """Returns the union of two states. Its derived values and derived flags are wrong until `derive` computes them."""
    if (a.id, a.restaurant_id) != (b.id, b.restaurant_id):
        raise ValueError(f"{a.id} and {b.id} are two orders")
    flags = {*a.flags, *b.flags}
    fields, differ = _fixed(a, b, FIXED)
    registers, revs = _registers(a, b)
    items, lines_flags = _lines(a.items, b.items)
    payments, payments_differ = _facts(a.payments, b.payments)
    prints, prints_differ = _facts(a.prints, b.prints)
    if differ:
        flags.add(FIXED_VALUES_DIFFER)
    if payments_differ or prints_differ:
        flags.add(FACTS_DIFFER)
    return msgspec.structs.replace(
        a,
        **fields,
        **registers,
        revs=revs,
        items=items,
        payments=payments,
        prints=prints,
        flags=tuple(sorted(flags | lines_flags)),
        erased_at=_earliest(a.erased_at, b.erased_at),
        clock={series: max(a.clock.get(series, 0), b.clock.get(series, 0)) for series in sorted({*a.clock, *b.clock})},
        updated_at=max(a.updated_at, b.updated_at),
    )


def lifted(side: Order, above: int, version: int) -> Order:
    """Returns the state `side`, which was written on an old base, as if it were written now: registers and recalls with
    a rev above `above` get the rev `version`. The other steps of the kitchen only move forward, so they need no rev."""

    def lift(rev: int) -> int:
        return version if rev > above else rev

    items = tuple(
        msgspec.structs.replace(
            line, rev=lift(line.rev), kitchen=msgspec.structs.replace(line.kitchen, rev=lift(line.kitchen.rev))
        )
        for line in side.items
    )
    return msgspec.structs.replace(side, items=items, revs={register: lift(rev) for register, rev in side.revs.items()})


def _fixed(a: Any, b: Any, names: Iterable[str]) -> tuple[dict[str, Any], bool]:
    """Returns the values of `b` that replace values of `a`, and whether any values differ."""
    fields, differ = {}, False
    for name in names:
        one, other = getattr(a, name), getattr(b, name)
        if one != other:
            differ = True
            if encode(other) > encode(one):
                fields[name] = other
    return fields, differ


def _registers(a: Order, b: Order) -> tuple[dict[str, Any], dict[str, int]]:
    fields: dict[str, Any] = {}
    revs: dict[str, int] = {}
    for register, names in REGISTERS.items():
        one, other = a.revs.get(register, 1), b.revs.get(register, 1)
        if max(one, other) > 1:
            revs[register] = max(one, other)
        if one < other or (one == other and _is_larger(b, a, names)):
            fields |= {name: getattr(b, name) for name in names}
    return fields, revs


def _is_larger(one: Struct, other: Struct, names: Sequence[str]) -> bool:
    """Returns whether the JSON of a register is larger. Personal fields are compared last, because an erasure empties
    them and must not change the winner."""
    places = sorted(names, key=lambda name: name in PERSONAL)
    mine, theirs = [getattr(one, name) for name in places], [getattr(other, name) for name in places]
    return mine != theirs and encode(mine) > encode(theirs)


def _lines(a: Sequence[Line], b: Sequence[Line]) -> tuple[tuple[Line, ...], set[str]]:
    flags: set[str] = set()
    found = {line.id: line for line in a}
    for line in b:
        mine = found.get(line.id)
        found[line.id] = line if mine is None else _line(mine, line, flags)
    return tuple(found.values()), flags


def _line(a: Line, b: Line, flags: set[str]) -> Line:
    if a == b:
        return a
    fields, differ = _fixed(a, b, LINE_FIXED)
    if differ:
        flags.add(FIXED_VALUES_DIFFER)
    voids, voids_differ = _facts(a.voids, b.voids)
    if voids_differ:
        flags.add(FACTS_DIFFER)
    if a.rev < b.rev or (a.rev == b.rev and _is_larger(b, a, _LINE_REGISTER)):
        fields |= {name: getattr(b, name) for name in ("rev", *_LINE_REGISTER)}
    return msgspec.structs.replace(a, **fields, voids=voids, kitchen=_kitchen(a.kitchen, b.kitchen))


def _kitchen(a: Kitchen, b: Kitchen) -> Kitchen:
    further = max(a, b, key=lambda one: (one.rev, rank(one.state)))
    if a.times == b.times:
        return further
    one, other = a.times or Times(), b.times or Times()
    times = Times(**{name: _earliest(getattr(one, name), getattr(other, name)) for name in _TIMES})
    return msgspec.structs.replace(further, times=times)


def _facts(a: Sequence[Fact], b: Sequence[Fact]) -> tuple[tuple[Fact, ...], bool]:
    """Returns all facts, and whether two facts with one id differ."""
    if a == b:
        return tuple(a), False
    found, differ = {one.id: one for one in a}, False
    for one in b:
        mine = found.setdefault(one.id, one)
        if mine != one:
            differ = True
            if encode(one) > encode(mine):
                found[one.id] = one
    return tuple(found.values()), differ


def _earliest(a: datetime | None, b: datetime | None) -> datetime | None:
    if a is None or b is None:
        return a or b
    return min(a, b)
