"""The stock in the mirror, and the stock of a state as text for scripts/stock.lua, which describes the texts."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from shared.entities.entity import Entity, Hold, micros


class Stock(NamedTuple):
    """The stock of an inventory item."""

    quantity: int
    """The counted amount, and the moves since."""
    held: int
    """The amount that orders hold since the count."""
    counted_at: datetime


def hold_text(holds: Sequence[Hold], known: frozenset[tuple[str, datetime]] | None = None) -> str:
    """`known`: the (item, time) of the holds that are not new."""
    if not holds:
        return ""
    new = "" if known is None else "!"
    return "h" + ",".join(
        f"{item}={quantity}@{micros(at)}{new if known is not None and (item, at) not in known else ''}"
        for item, quantity, at in holds
    )


def stock_text(entity: Entity, state: Any) -> str:
    """Returns the holds of an order, or the count of an inventory item, as text for scripts/stock.lua. The text is
    empty for other entities."""
    if entity.holds is not None:
        return hold_text(entity.holds(state))
    if entity.stock is None:
        return ""
    quantity, counted_at = entity.stock(state)
    return "s" if quantity is None else f"s{quantity}|{micros(counted_at)}"


def claimed_stock_text(entity: Entity, state: Any, before: Any | None, *, sold: bool = False) -> str:
    """Returns `stock_text` for a claim: holds that the state `before` does not have are marked as new. `sold`: the
    holds are taken without a check."""
    if entity.holds is not None:
        known = () if before is None else entity.holds(before)
        text = hold_text(entity.holds(state), frozenset((item, at) for item, _, at in known))
        return f"H{text[1:]}" if sold and text else text
    text = stock_text(entity, state)
    if entity.stock is None or text == "s" or (before and entity.stock(before)[1] == entity.stock(state)[1]):
        return text
    return f"{text}!"
