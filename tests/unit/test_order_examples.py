"""Twelve bills, calculated by hand, that fix the rules of prices. docs/orders.md explains two of them."""

from typing import Any

from msgspec import structs

from shared.entities.order import lifecycle
from shared.entities.order.derive import derive
from shared.entities.order.lines import NewVoid, add_lines, comp, discount_line, void
from shared.entities.order.merge import merge
from shared.entities.order.split import split_by_lines, split_evenly
from shared.entities.order.state import Discount, Order, PaymentStatus, RateTax
from shared.entities.order.terms import OrderType, Rounding, ServiceCharge, Tax, TaxedDiscounts, TaxMode, Terms
from tests.rigs.order_law import accepted, act, item, line, named, paid, placed, rates, refunded

INCLUSIVE = TaxMode.INCLUSIVE


def taxes(order: Order) -> list[tuple[int, int]]:
    return [(one.rate_ppm, one.tax) for one in order.taxes]


def test_1_the_original_systems_tax_the_full_price() -> None:
    fields: dict[str, Any] = {"discount": Discount(amount=100), "tip": 200, "deposit_used": 50}
    order = placed(line("dosa", 980, 2), **fields)
    assert (order.subtotal, order.tax_amount, order.tip_amount, order.total) == (1960, 98, 200, 2108)
    assert order.tax_basis_points == 500
    reduced = placed(line("dosa", 980, 2), terms=rates(standard=50_000), **fields)
    assert (reduced.tax_amount, reduced.total) == (93, 2103)


def test_2_a_half_is_rounded_up() -> None:
    order = placed(line("dosa", 990))
    assert (order.tax_amount, order.total, order.total_amount) == (50, 1040, 1040)


def test_3_a_discount_is_apportioned_to_lines_of_several_rates() -> None:
    order = placed(
        line("book", 1000, tax_category="reduced"),
        line("beer", 500),
        line("bread", 333, tax_category="reduced"),
        terms=rates(standard=190_000, reduced=70_000),
        discount=Discount(amount=100),
    )
    assert [one.discount_amount for one in order.items] == [55, 27, 18]
    assert order.taxes == (RateTax(70_000, 1260, 88), RateTax(190_000, 473, 90))
    assert (order.tax_amount, order.total, order.tax_basis_points) == (178, 1911, None)
    assert split_by_lines(order, [[named("book")], [named("beer"), named("bread")]]) == [1011, 900]


def test_4_an_inclusive_tax_is_a_part_of_the_price() -> None:
    terms = rates(INCLUSIVE, standard=190_000, food=70_000)
    dishes = line("menu", 1890, tax_category="food"), line("wine", 450, 2)
    order = placed(*dishes, terms=terms)
    assert (taxes(order), order.total) == ([(70_000, 124), (190_000, 144)], 2790)
    assert [one.net for one in order.items] == [1890 - 124, 900 - 144]
    off = placed(*dishes, terms=terms, discount=Discount(bp=1_000))
    assert [one.discount_amount for one in off.items] == [189, 90]
    assert (taxes(off), off.total) == ([(70_000, 111), (190_000, 129)], 2511)


def test_5_the_rate_depends_on_the_type_of_the_order() -> None:
    tax = rates(INCLUSIVE, standard={"default": 100_000, "takeaway": 80_000})
    dishes = line("ramen", 1100), line("gyoza", 550)
    here = placed(*dishes, terms=tax, currency="JPY")
    away = placed(*dishes, terms=tax, currency="JPY", type=OrderType.TAKEAWAY)
    assert [(one.tax_amount, one.total) for one in (here, away)] == [(150, 1650), (122, 1650)]


def test_6_a_tax_is_rounded_once_per_order_or_once_per_line() -> None:
    dishes = [line(str(place), price) for place, price in enumerate((1500, 800, 695, 695))]
    tax = rates(standard=88_750)
    assert placed(*dishes, terms=tax).tax_amount == 327
    assert placed(*dishes, terms=structs.replace(tax, rounding=Rounding.LINE)).tax_amount == 328


def test_7_a_service_charge_is_taxed_like_the_lines() -> None:
    dishes = line("steak", 1880), line("wine", 695)
    terms = Terms(tax=rates(standard=88_750), service_charge=ServiceCharge(bp=1_800))
    order = placed(*dishes, terms=terms)
    assert (order.service_amount, [one.net for one in order.items]) == (464, [1880 + 339, 695 + 125])
    assert (order.tax_amount, order.total) == (270, 3309)
    untaxed = placed(*dishes, terms=structs.replace(terms, service_charge=ServiceCharge(bp=1_800, tax="untaxed")))
    assert (untaxed.service_amount, untaxed.tax_amount, untaxed.total) == (464, 229, 3268)


def test_8_a_currency_with_three_decimals_is_counted_in_its_minor_units() -> None:
    order = placed(
        line("lamb", 1250, 3),
        line("tea", 875),
        terms=Terms(tax=Tax(), service_charge=ServiceCharge(bp=1_000)),
        currency="KWD",
        discount=Discount(bp=1_500),
    )
    assert (order.subtotal, order.discount_amount, order.service_amount) == (4625, 694, 393)
    assert (order.tax_amount, order.total) == (0, 4324)
    assert split_evenly(order, 3) == [1442, 1441, 1441]


def test_9_a_void_a_comp_and_two_discounts_on_one_bill() -> None:
    order = placed(line("curry", 1200, 3), line("cake", 890), terms=rates(INCLUSIVE, standard=190_000))
    order = void(order, act(2), NewVoid(id=named("void"), line=named("curry"), quantity=1))
    order = discount_line(order, act(3), named("curry"), Discount(bp=1_000, reason="late"))
    order = comp(order, act(4), named("cake"), "birthday")
    order = derive(structs.replace(order, discount=Discount(bp=500)))
    assert order.subtotal == 3290
    assert [one.discount_amount for one in order.items] == [240 + 108, 890]
    assert (order.discount_amount, order.tax_amount, order.total) == (240 + 890 + 108, 328, 2052)


def test_10_a_card_then_cash_with_a_tip_and_change() -> None:
    order = placed(line("menu", 4190), terms=Tax())
    order = paid(order, 2000, "card")
    order = paid(order, 2390, "cash", 4, method="cash", tip=200, tendered=3000)
    assert order.payments[-1].change == 610
    assert (order.total, order.balance, order.payment_status) == (4390, 0, PaymentStatus.PAID)


def test_11_a_paid_order_is_cancelled_or_partly_refunded() -> None:
    order = paid(placed(line("dosa", 2108), terms=Tax()), 2108)
    cancelled = lifecycle.cancel(order, act(4), "fire alarm")
    assert (cancelled.balance, cancelled.payment_status) == (-2108, PaymentStatus.REFUND_DUE)
    half = refunded(cancelled, 1000, "first", 5)
    assert (half.balance, half.payments[-1].credit, half.payment_status) == (-1108, 0, PaymentStatus.REFUND_DUE)
    whole = refunded(half, 1108, "second", 6)
    assert (whole.balance, whole.payment_status) == (0, PaymentStatus.REFUNDED)
    goodwill = refunded(order, 500)
    assert (goodwill.payments[-1].credit, goodwill.due, goodwill.balance) == (500, 1608, 0)
    assert goodwill.payment_status is PaymentStatus.PARTIALLY_REFUNDED


def test_12_all_lines_that_two_waiters_add_offline_are_on_the_bill() -> None:
    order = accepted(line("soup", 300))
    one = add_lines(order, act(2), [line("beer", 450, 2)])
    other = add_lines(order, act(2), [line("fish", 1250, 2), line("rice", 400, 3), line("flan", 600, 2)])
    merged = merge(one, other)
    assert len(merged.items) == 5
    assert (merged.subtotal, merged.tax_amount, merged.total) == (6100, 305, 6405)
    assert merge(other, one) == merged
    assert item(merged, "beer").quantity == 2


def test_the_full_price_is_taxed_only_if_the_tax_is_added_to_it() -> None:
    inclusive = structs.replace(rates(INCLUSIVE, standard=190_000), discounts=TaxedDiscounts.FULL_PRICE)
    order = placed(line("book", 1190), terms=inclusive, discount=Discount(amount=595))
    assert (order.tax_amount, order.total) == (95, 595)
