"""What an order costs. Pure: prices and names come from the menu that is passed in, never from the client."""

from collections.abc import Mapping, Sequence

from msgspec import Struct

from services.orders.requests import RequestedItem
from shared.entities.menu_item import MenuItem
from shared.entities.order import OrderItem
from shared.errors import InvalidInput


class Totals(Struct, frozen=True):
    """Minor units."""

    subtotal: int
    tax_amount: int
    total: int


def tax(subtotal: int, basis_points: int) -> int:
    """Rounded half up, once per order."""
    return (subtotal * basis_points + 5_000) // 10_000


def priced_items(requested: Sequence[RequestedItem], menu: Mapping[str, MenuItem]) -> tuple[OrderItem, ...]:
    """Raises InvalidInput that names the item which is unknown or not to be had."""
    items = []
    for place, item in enumerate(requested):
        dish = menu.get(str(item.menu_item_id))
        field = f"items[{place}].menu_item_id"
        if dish is None or dish.deleted_at is not None:
            raise InvalidInput("no such dish on the menu", field=field, code="unknown_menu_item")
        if not dish.is_available:
            raise InvalidInput(f"{dish.name} is not available now", field=field, code="menu_item_unavailable")
        items.append(
            OrderItem(
                menu_item_id=dish.id,
                name=dish.name,
                quantity=item.quantity,
                unit_price=dish.price,
                line_total=dish.price * item.quantity,
                special_instructions=item.special_instructions,
                customizations=tuple(chosen.kept() for chosen in item.customizations),
            )
        )
    return tuple(items)


def totals(items: Sequence[OrderItem], *, basis_points: int, tip: int, discount: int, deposit: int) -> Totals:
    """total = subtotal + tax + tip - discount - deposit, never below 0. A discount above the subtotal is refused."""
    subtotal = sum(item.line_total for item in items)
    if subtotal > _MOST:
        raise InvalidInput("the order is too large", field="items", code="order_too_large")
    if discount > subtotal:
        raise InvalidInput(
            f"a discount of {discount} is more than the subtotal of {subtotal}",
            field="discount_amount",
            code="discount_above_subtotal",
        )
    tax_amount = tax(subtotal, basis_points)
    return Totals(subtotal, tax_amount, max(0, subtotal + tax_amount + tip - discount - deposit))


# A tenth of what the contract allows for one amount, so that the sum of subtotal, tax and tip stays inside it.
_MOST = 10**11
