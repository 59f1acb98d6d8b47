"""Functions for all commands: they write registers, find lines and check limits."""

from typing import Any

import msgspec

from shared.entities.order.acts import Act
from shared.entities.order.derive import derive
from shared.entities.order.refusals import absent, invalid
from shared.entities.order.state import MAX_SUBTOTAL, REGISTERS, Discount, KitchenState, Line, Order

ON_THE_HOUSE = 10_000
"""The basis points of a comp."""


def written(order: Order, act: Act, **fields: Any) -> Order:
    """Returns the derived order with these fields, each of which is a register or a part of one. A register with an
    unchanged value keeps its rev, so that it overrules nothing in a merge. Returns the order itself if nothing
    changes."""
    changed = {name for name, value in fields.items() if getattr(order, name) != value}
    if not changed:
        return order
    revs = {}
    for register, names in REGISTERS.items():
        rev = order.revs.get(register, 1) if changed.isdisjoint(names) else act.version
        if rev > 1:  # absent means 1, so that equal states have equal bytes
            revs[register] = rev
    return derive(msgspec.structs.replace(order, **fields, revs=revs, updated_at=act.at))


def line_of(order: Order, id_: str) -> Line:
    """Returns the line with this id. Raises Refused: `unknown_item`."""
    for line in order.items:
        if line.id == id_:
            return line
    raise absent("unknown_item", "the order has no such item")


def with_line(order: Order, act: Act, line: Line) -> Order:
    """Returns the derived order with `line` in place of the line with the same id."""
    items = tuple(line if one.id == line.id else one for one in order.items)
    return derive(msgspec.structs.replace(order, items=items, updated_at=act.at))


_RANKS = {state: rank for rank, state in enumerate(KitchenState)}


def rank(state: KitchenState) -> int:
    return _RANKS[state]


def is_fired(line: Line) -> bool:
    return rank(line.kitchen.state) >= rank(KitchenState.FIRED)


def check_subtotal(order: Order) -> None:
    """Raises Refused: `order_too_large`."""
    if order.subtotal > MAX_SUBTOTAL:
        raise invalid("order_too_large", "the order is too large", field="items")


def check_discount(discount: Discount, price: int, field: str) -> None:
    """`price`: the amount from which the discount is taken. Raises Refused: `invalid_discount`,
    `discount_above_subtotal`."""
    if (discount.bp is None) == (discount.amount is None):
        raise invalid("invalid_discount", "give basis points or an amount", field=field)
    if discount.comp and discount.bp != ON_THE_HOUSE:
        raise invalid("invalid_discount", f"a comp has {ON_THE_HOUSE} basis points", field=field)
    if discount.amount is not None and discount.amount > price:
        raise invalid(
            "discount_above_subtotal", f"a discount of {discount.amount} is more than {price}", field=field, limit=price
        )
