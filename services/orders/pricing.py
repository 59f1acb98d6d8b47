"""Computes the price of an order and the stock that it holds, with pure functions. Prices come from the menu, never
from the client."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec
from msgspec import Struct

from services.orders.requests import RequestedCustomization, RequestedItem
from shared.entities.menu_item import MenuItem
from shared.entities.order import Customization, OrderItem, StockHold
from shared.errors import InvalidInput
from shared.http.texts import nfc


class Totals(Struct, frozen=True):
    """Amounts in minor units of the currency."""

    subtotal: int
    tax_amount: int
    total: int


def tax(subtotal: int, basis_points: int) -> int:
    """Returns the tax in minor units, rounded half up once per order."""
    return (subtotal * basis_points + 5_000) // 10_000


def priced_items(requested: Sequence[RequestedItem], menu: Mapping[str, MenuItem]) -> tuple[OrderItem, ...]:
    """Returns the items with names and prices from the menu. Raises InvalidInput with the field of an item or choice
    that is unknown or unavailable."""
    items = []
    for index, item in enumerate(requested):
        dish = menu.get(str(item.menu_item_id))
        field = f"items[{index}].menu_item_id"
        if dish is None or dish.deleted_at is not None:
            raise InvalidInput("the menu has no such dish", field=field, code="unknown_menu_item")
        if not dish.is_available:
            raise InvalidInput(f"{dish.name} is not available now", field=field, code="menu_item_unavailable")
        chosen = _chosen(item.customizations, dish, f"items[{index}].customizations")
        price = dish.price + sum(choice.price for choice in chosen)
        items.append(
            OrderItem(
                menu_item_id=dish.id,
                name=dish.name,
                quantity=item.quantity,
                unit_price=price,
                line_total=price * item.quantity,
                special_instructions=item.special_instructions,
                customizations=chosen,
            )
        )
    return tuple(items)


def _chosen(requested: Sequence[RequestedCustomization], dish: MenuItem, field: str) -> tuple[Customization, ...]:
    if not requested and not dish.customizations:
        return ()
    # Other systems and older releases may have named the groups and options in another normal form.
    groups = {nfc(group.name): {nfc(option.name): option for option in group.options} for group in dish.customizations}
    chosen = []
    for index, one in enumerate(requested):
        options = groups.get(nfc(one.name))
        if options is None:
            raise InvalidInput(
                f"{dish.name} has no customization {one.name!r}",
                field=f"{field}[{index}].name",
                code="unknown_customization",
            )
        option = options.get(nfc(one.option))
        if option is None or not option.is_available:
            raise InvalidInput(
                f"{one.name} of {dish.name} cannot be {one.option!r}",
                field=f"{field}[{index}].option",
                code="unknown_customization" if option is None else "option_unavailable",
            )
        chosen.append(Customization(one.name, one.option, option.price))
    counted = Counter(nfc(one.name) for one in chosen)
    for group in dish.customizations:
        number = counted[nfc(group.name)]
        if not group.min_choices <= number <= group.max_choices:
            raise InvalidInput(
                f"choose {group.min_choices} to {group.max_choices} options of {group.name}, not {number}",
                field=field,
                code="customization_count",
                group=group.name,
                min_choices=group.min_choices,
                max_choices=group.max_choices,
            )
    return tuple(chosen)


def holds(
    items: Sequence[OrderItem],
    menu: Mapping[str, MenuItem],
    before: Sequence[StockHold] = (),
    at: datetime | None = None,
) -> tuple[StockHold, ...]:
    """Returns the stock that the items hold. A hold in `before` keeps the quantity that is still needed. A further need
    becomes a new hold at `at`."""
    needed: Counter[str] = Counter()
    for item in items:
        dish = menu.get(item.menu_item_id)
        for one in dish.consumes if dish is not None else ():
            needed[one.inventory_item_id] += one.quantity * item.quantity
    found = []
    for hold in before:
        if kept := min(hold.quantity, needed[hold.inventory_item_id]):
            needed[hold.inventory_item_id] -= kept
            found.append(msgspec.structs.replace(hold, quantity=kept))
    found += [StockHold(id_, needed[id_], at) for id_ in sorted(needed) if needed[id_]]
    return tuple(found)


def totals(items: Sequence[OrderItem], *, basis_points: int, tip: int, discount: int, deposit: int) -> Totals:
    """Returns the totals: total = subtotal + tax + tip - discount - deposit, but at least 0. Raises InvalidInput for a
    discount above the subtotal and for a subtotal above 10^11 minor units."""
    subtotal = sum(item.line_total for item in items)
    if subtotal > _MAX_SUBTOTAL_MINOR_UNITS:
        raise InvalidInput("the order is too large", field="items", code="order_too_large")
    if discount > subtotal:
        raise InvalidInput(
            f"a discount of {discount} is more than the subtotal of {subtotal}",
            field="discount_amount",
            code="discount_above_subtotal",
        )
    tax_amount = tax(subtotal, basis_points)
    return Totals(subtotal, tax_amount, max(0, subtotal + tax_amount + tip - discount - deposit))


# A tenth of the largest amount of the contract, so that the sum of subtotal, tax and tip stays below it.
_MAX_SUBTOTAL_MINOR_UNITS = 10**11
