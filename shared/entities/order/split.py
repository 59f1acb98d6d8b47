"""Splits the balance of an order into shares that sum to it. Nothing is stored; each share is paid like any other
payment."""

from collections.abc import Sequence

from shared.entities.order.pricing import apportion
from shared.entities.order.refusals import conflict, invalid
from shared.entities.order.state import Order
from shared.entities.order.writing import line_of

MAX_SHARES = 1_000


def split_evenly(order: Order, shares: int) -> list[int]:
    """Returns equal shares, which differ by at most one unit. Raises Refused: `nothing_due`."""
    if not 1 <= shares <= MAX_SHARES:
        raise invalid("invalid_input", f"must be from 1 to {MAX_SHARES}", field="even")
    return apportion(_balance(order), [1] * shares)


def split_by_amounts(order: Order, amounts: Sequence[int]) -> list[int]:
    """Returns these amounts, and the rest of the balance as the last share. Raises Refused: `overpaid`,
    `nothing_due`."""
    balance = _balance(order)
    if not 1 <= len(amounts) <= MAX_SHARES or any(amount < 1 for amount in amounts):
        raise invalid("invalid_input", f"give 1 to {MAX_SHARES} amounts above 0", field="amounts")
    if (left := balance - sum(amounts)) < 0:
        raise conflict(
            "overpaid", f"{sum(amounts)} is more than the {balance} left to pay", field="amounts", balance=balance
        )
    return [*amounts, left] if left else list(amounts)


def split_by_lines(order: Order, groups: Sequence[Sequence[str]]) -> list[int]:
    """Returns a share for each group of lines, weighted by the cost of its lines. Every line that costs something must
    be in exactly one group. Tips, deposits, earlier payments and a service charge with its own tax category are
    apportioned by the same weights. Raises Refused: `items_not_split`, `item_split_twice`, `unknown_item`,
    `nothing_due`."""
    balance = _balance(order)
    if not 1 <= len(groups) <= MAX_SHARES:
        raise invalid("invalid_input", f"give 1 to {MAX_SHARES} groups", field="groups")
    weights, seen = [], set()
    for group in groups:
        weight = 0
        for id_ in group:
            line = line_of(order, id_)
            if id_ in seen:
                raise invalid("item_split_twice", "an item is in two groups", field="groups", item=id_)
            seen.add(id_)
            weight += line.net + line.tax_amount
        weights.append(weight)
    left = [line.id for line in order.items if line.id not in seen and line.net + line.tax_amount]
    if left:
        raise invalid("items_not_split", "each item must be in a group", field="groups", items=left)
    return apportion(balance, weights)


def _balance(order: Order) -> int:
    if order.balance <= 0:
        raise conflict("nothing_due", "nothing is left to pay", balance=order.balance)
    return order.balance
