"""Prices, totals and stock holds of an order, computed from the menu."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest

from services.orders.pricing import holds, priced_items, tax, totals
from services.orders.requests import RequestedCustomization, RequestedItem
from shared.entities.menu_item import Consumption, CustomizationGroup, MenuItem, Option
from shared.entities.order import StockHold
from shared.errors import InvalidInput
from tests.rigs.builders import CREATED_AT, item, menu_item, new_id

DISH = menu_item(name="Dosa", price=933)


def requested(**fields: object) -> RequestedItem:
    values: dict[str, Any] = {"menu_item_id": UUID(DISH.id), "quantity": 3, **fields}
    return RequestedItem(**values)


def test_names_and_prices_come_from_the_menu() -> None:
    (priced,) = priced_items([requested()], {DISH.id: DISH})
    assert (priced.name, priced.unit_price, priced.line_total) == ("Dosa", 933, 2799)


SIZED = msgspec.structs.replace(
    DISH,
    customizations=(
        CustomizationGroup("size", (Option("regular"), Option("large", 250), Option("giant", 900, False)), 1, 1),
        CustomizationGroup("extras", (Option("egg", 120), Option("cheese", 80)), 0, 2),
    ),
)


def test_customizations_are_priced_by_the_server() -> None:
    chosen = [RequestedCustomization("size", "large"), RequestedCustomization("extras", "egg")]
    (priced,) = priced_items([requested(customizations=chosen)], {DISH.id: SIZED})
    assert (priced.unit_price, priced.line_total) == (933 + 250 + 120, 3 * (933 + 250 + 120))
    assert [(one.option, one.price) for one in priced.customizations] == [("large", 250), ("egg", 120)]


@pytest.mark.parametrize(
    ("chosen", "code", "field"),
    [
        ([], "customization_count", "items[0].customizations"),
        ([("size", "large"), ("size", "regular")], "customization_count", "items[0].customizations"),
        ([("size", "huge")], "unknown_customization", "items[0].customizations[0].option"),
        ([("size", "giant")], "option_unavailable", "items[0].customizations[0].option"),
        ([("size", "large"), ("sauce", "hot")], "unknown_customization", "items[0].customizations[1].name"),
        ([("size", "large"), *[("extras", "egg")] * 3], "customization_count", "items[0].customizations"),
    ],
)
def test_a_customization_that_the_dish_does_not_offer_is_refused_by_its_field(
    chosen: list[tuple[str, str]], code: str, field: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        priced_items([requested(customizations=[RequestedCustomization(*one) for one in chosen])], {DISH.id: SIZED})
    assert (refused.value.error_code, refused.value.details["field"]) == (code, field)


def test_an_order_holds_the_stock_that_its_dishes_consume() -> None:
    flour, eggs = sorted((new_id(), new_id()))
    dish = msgspec.structs.replace(DISH, consumes=(Consumption(flour, 2), Consumption(eggs, 1)))
    items = priced_items([requested(quantity=3)], {DISH.id: dish})
    assert holds(items, {DISH.id: dish}) == (StockHold(flour, 6), StockHold(eggs, 3))
    assert holds((), {}, holds(items, {DISH.id: dish})) == ()


def test_added_stock_is_held_from_then_on_and_the_latest_hold_is_released_first() -> None:
    flour, at, later = new_id(), CREATED_AT, CREATED_AT + timedelta(minutes=5)
    menu = {DISH.id: msgspec.structs.replace(DISH, consumes=(Consumption(flour, 2),))}

    def taking(quantity: int) -> Any:
        return priced_items([requested(quantity=quantity)], menu)

    placed = holds(taking(1), menu)
    more = holds(taking(3), menu, placed, at)
    assert more == (StockHold(flour, 2), StockHold(flour, 4, at))
    assert holds(taking(3), menu, more, later) == more
    assert holds(taking(2), menu, more, later) == (StockHold(flour, 2), StockHold(flour, 2, at))
    assert holds(taking(4), menu, more, later) == (*more, StockHold(flour, 2, later))


@pytest.mark.parametrize(
    ("dish", "code"),
    [
        (menu_item(is_available=False), "menu_item_unavailable"),
        (menu_item(deleted_at=CREATED_AT), "unknown_menu_item"),
        (None, "unknown_menu_item"),
    ],
)
def test_an_unavailable_dish_is_refused_by_its_index(dish: MenuItem | None, code: str) -> None:
    other = RequestedItem(menu_item_id=UUID(dish.id if dish else new_id()), quantity=1)
    menu = {DISH.id: DISH, **({dish.id: dish} if dish else {})}
    with pytest.raises(InvalidInput) as refused:
        priced_items([requested(), other], menu)
    assert refused.value.error_code == code
    assert refused.value.details["field"] == "items[1].menu_item_id"


@pytest.mark.parametrize(
    ("subtotal", "basis_points", "expected"),
    [(0, 500, 0), (10, 500, 1), (9, 500, 0), (30, 500, 2), (29, 500, 1), (1, 10_000, 1), (10_009, 500, 500)],
)
def test_tax_is_rounded_half_up(subtotal: int, basis_points: int, expected: int) -> None:
    assert tax(subtotal, basis_points) == expected


def test_total_is_subtotal_tax_and_tip_less_discount_and_deposit() -> None:
    sums = totals([item(quantity=2, unit_price=1000)], basis_points=500, tip=150, discount=300, deposit=50)
    assert (sums.subtotal, sums.tax_amount, sums.total) == (2000, 100, 1900)


def test_total_never_falls_below_zero() -> None:
    assert totals([item(unit_price=100)], basis_points=500, tip=0, discount=100, deposit=5000).total == 0


def test_a_discount_above_the_subtotal_is_refused() -> None:
    with pytest.raises(InvalidInput) as refused:
        totals([item(unit_price=100)], basis_points=500, tip=0, discount=101, deposit=0)
    assert refused.value.details["field"] == "discount_amount"
