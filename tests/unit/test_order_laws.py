"""Invariants of prices, commands and merges of orders, tested with random histories."""

import hypothesis.strategies as st
import msgspec
from hypothesis import assume, given, settings
from msgspec import structs

from shared.entities.contract import encode
from shared.entities.order.derive import derive
from shared.entities.order.kitchen import fire_due
from shared.entities.order.lines import NewVoid, edit_line, void
from shared.entities.order.merge import merge
from shared.entities.order.pricing import apportion, half_up
from shared.entities.order.refusals import Refused
from shared.entities.order.split import split_by_amounts, split_by_lines, split_evenly
from shared.entities.order.state import (
    FIXED_VALUES_DIFFER,
    PERSONAL,
    Discount,
    KitchenState,
    Order,
    PaymentStatus,
)
from shared.entities.order.terms import Rounding, TaxedDiscounts, TaxMode
from shared.entities.order.writing import rank
from shared.entities.overlay import overlay
from tests.rigs.order_law import (
    History,
    accepted,
    act,
    histories,
    item,
    later,
    line,
    named,
    new_lines,
    orders,
    shuffled,
)

amounts = st.integers(0, 10**11)


many = settings(max_examples=300)


def ids(order: Order) -> set[str]:
    voids = {one.id for each in order.items for one in each.voids}
    return {one.id for one in order.items} | {one.id for one in order.payments} | voids


def priced_here(order: Order) -> Order:
    """Returns the order without its told amounts."""
    return derive(structs.replace(order, told=None))


# -- arithmetic --------------------------------------------------------------------------------------------------


@given(amounts, st.integers(1, 10**6))
def test_half_up_returns_the_nearest_unit_and_rounds_a_half_up(numerator: int, denominator: int) -> None:
    rounded = half_up(numerator, denominator)
    assert -denominator < 2 * (numerator - rounded * denominator) < denominator or (
        2 * (rounded * denominator - numerator) == denominator
    )


@given(amounts, st.lists(amounts, min_size=1, max_size=20))
def test_shares_sum_exactly_and_each_is_within_one_unit(amount: int, weights: list[int]) -> None:
    shares = apportion(amount, weights)
    assert sum(shares) == amount
    fair = weights if sum(weights) else [1] * len(weights)
    assert all(abs(share * sum(fair) - amount * weight) < sum(fair) for share, weight in zip(shares, fair, strict=True))


@given(amounts, st.integers(1, 10), st.integers(1, 100))
def test_units_that_are_left_go_to_the_earlier_of_equal_weights(amount: int, number: int, weight: int) -> None:
    shares = apportion(amount, [weight] * number)
    assert shares == sorted(shares, reverse=True)


# -- prices ------------------------------------------------------------------------------------------------------


@many
@given(histories(1))
def test_the_amounts_of_the_lines_sum_to_those_of_the_order(history: History) -> None:
    for state in (history.trunk, *history.branches):
        order = priced_here(state)
        tax = order.terms.tax
        inclusive = tax.mode is TaxMode.INCLUSIVE
        assert sum(one.tax_amount for one in order.items) + order.service_tax == order.tax_amount
        assert sum(one.tax for one in order.taxes) == order.tax_amount
        assert sum(one.line_total for one in order.items) == order.subtotal
        assert sum(one.discount_amount for one in order.items) == order.discount_amount
        assert all(0 <= one.discount_amount <= one.line_total for one in order.items)
        added = 0 if inclusive else order.tax_amount
        gross = order.subtotal - order.discount_amount + order.service_amount + added + order.tip_amount
        assert order.total == max(0, gross - order.deposit_used)
        sold = sum(one.net + one.tax_amount for one in order.items)
        charge = order.service_amount + (0 if inclusive else order.service_tax)
        assert gross - order.tip_amount - sold in (0, charge)
        assert all(one.net >= 0 for one in order.items)


@many
@given(histories(1))
def test_a_told_tax_is_apportioned_without_loss(history: History) -> None:
    for order in (history.trunk, *history.branches):
        assert sum(one.tax_amount for one in order.items) + order.service_tax == order.tax_amount
        assert sum(one.tax for one in order.taxes) == order.tax_amount


@many
@given(histories(1))
def test_a_tax_is_rounded_once_for_each_rate_or_once_for_each_line(history: History) -> None:
    for state in (history.trunk, *history.branches):
        order = priced_here(state)
        tax = order.terms.tax
        if tax.rounding is Rounding.ORDER:
            for one in order.taxes:
                exact = one.base * one.rate_ppm
                if tax.mode is TaxMode.INCLUSIVE:
                    gross = one.base + one.tax
                    assert one.tax == half_up(gross * one.rate_ppm, 1_000_000 + one.rate_ppm)
                else:
                    assert one.tax == half_up(exact, 1_000_000)
        elif tax.mode is TaxMode.EXCLUSIVE and tax.discounts is TaxedDiscounts.REDUCED_PRICE:
            for line_ in order.items:
                rate = tax.rate(line_.tax_category, order.type)
                assert line_.tax_amount == half_up(line_.net * rate, 1_000_000)


@many
@given(histories(1), st.data())
def test_the_sequence_of_facts_changes_nothing(history: History, data: st.DataObject) -> None:
    (order,) = history.branches
    assert derive(data.draw(shuffled(order))) == order


@many
@given(histories(2))
def test_deriving_twice_changes_nothing_and_a_state_survives_its_encoding(history: History) -> None:
    for order in (history.trunk, merge(*history.branches)):
        assert encode(derive(order)) == encode(order)
        decoded = msgspec.json.decode(encode(order), type=Order)
        assert decoded == order
        assert encode(decoded) == encode(order)


@many
@given(histories(1))
def test_a_command_keeps_the_fields_of_a_newer_release(history: History) -> None:
    for step in history.steps:
        base = encode(step.before)[:-1] + b',"newer":{"a":[1]}}'
        kept = msgspec.json.decode(overlay(base, step.after))
        assert kept.pop("newer") == {"a": [1]}
        assert kept == msgspec.json.decode(encode(step.after))


@many
@given(histories(2))
def test_the_balance_is_the_due_amount_less_the_payments(history: History) -> None:
    for order in (*history.branches, merge(*history.branches)):
        paid = sum(one.amount for one in order.payments)
        assert order.balance == order.due - paid
        assert 0 <= order.due <= order.total
        assert (order.payment_status is PaymentStatus.REFUND_DUE) == (bool(order.payments) and order.balance < 0)


@many
@given(histories(1))
def test_commands_never_take_more_than_is_owed_and_give_back_no_more_than_was_paid(history: History) -> None:
    for step in history.steps:
        if step.name == "pay" and step.after is not step.before:
            assert step.after.balance >= 0
        if step.name == "refund":
            assert sum(one.amount for one in step.after.payments) >= 0


# -- splits ------------------------------------------------------------------------------------------------------


@many
@given(histories(1), st.integers(1, 7), st.data())
def test_every_split_sums_to_the_balance(history: History, number: int, data: st.DataObject) -> None:
    (order,) = history.branches
    assume(order.balance > 0)
    even = split_evenly(order, number)
    assert sum(even) == order.balance
    assert max(even) - min(even) <= 1
    first = data.draw(st.integers(1, order.balance))
    assert sum(split_by_amounts(order, [first])) == order.balance
    places = [data.draw(st.integers(0, number - 1)) for _ in order.items]
    groups = [[one.id for one, place in zip(order.items, places, strict=True) if place == n] for n in range(number)]
    assert sum(split_by_lines(order, groups)) == order.balance


# -- merges ------------------------------------------------------------------------------------------------------


@many
@given(histories(3))
def test_a_merge_is_commutative_associative_and_idempotent(history: History) -> None:
    a, b, c = history.branches
    ab = merge(a, b)
    assert encode(ab) == encode(merge(b, a))
    assert encode(merge(ab, c)) == encode(merge(a, merge(b, c)))
    assert encode(merge(a, a)) == encode(a)
    assert encode(merge(ab, b)) == encode(ab)


@many
@given(histories(2))
def test_merging_the_states_before_and_after_a_command_gives_the_latter(history: History) -> None:
    for step in history.steps:
        assert encode(merge(step.before, step.after)) == encode(step.after), step.name
        assert encode(merge(step.after, step.before)) == encode(step.after), step.name


@many
@given(histories(3))
def test_no_line_payment_or_void_ever_vanishes(history: History) -> None:
    for step in history.steps:
        assert ids(step.before) <= ids(step.after)
    a, b, c = history.branches
    assert ids(merge(merge(a, b), c)) == ids(a) | ids(b) | ids(c)


@given(orders(), st.data())
def test_contradictory_states_are_merged_too(order: Order, data: st.DataObject) -> None:
    """Two states may differ in fixed values, and two facts may have one id, after a bug or on a copied disk."""
    sides = []
    for number in range(3):
        items = data.draw(st.lists(new_lines("line"), max_size=2, unique_by=lambda one: one.id))
        other = accepted(*items, terms=order.terms)
        sides.append(structs.replace(other, order_number=f"{data.draw(st.integers(0, number))}"))
    a, b, c = (derive(one) for one in sides)
    assert encode(merge(a, b)) == encode(merge(b, a))
    assert encode(merge(merge(a, b), c)) == encode(merge(a, merge(b, c)))
    assert (FIXED_VALUES_DIFFER in merge(a, b).flags) == (
        a.order_number != b.order_number
        or any(
            (mine.unit_price, mine.ordered, mine.tax_category, mine.consumes)
            != (theirs.unit_price, theirs.ordered, theirs.tax_category, theirs.consumes)
            for mine in a.items
            for theirs in b.items
            if mine.id == theirs.id
        )
        or any(mine.seq != theirs.seq for mine in a.items for theirs in b.items if mine.id == theirs.id)
    )


@many
@given(histories(2))
def test_the_kitchen_moves_back_only_by_a_recall(history: History) -> None:
    for step in history.steps:
        after = {one.id: one.kitchen for one in step.after.items}
        for one in step.before.items:
            if after[one.id].rev == one.kitchen.rev:
                assert rank(after[one.id].state) >= rank(one.kitchen.state)
            else:
                assert step.name == "recall"
    a, b = history.branches
    for merged in merge(a, b).items:
        for side in (a, b):
            for one in side.items:
                if one.id == merged.id and one.kitchen.rev == merged.kitchen.rev:
                    assert rank(merged.kitchen.state) >= rank(one.kitchen.state)


@given(st.integers(1, 3), st.integers(0, 9), st.sampled_from([KitchenState.NEW, KitchenState.HOLD]))
def test_a_void_beats_an_edit(pieces: int, course: int, state: KitchenState) -> None:
    order = accepted(line("soup", 300, 3, course=1), line("fish", 900, 1, course=2, hold=state is KitchenState.HOLD))
    voided = void(order, act(2), NewVoid(id=named("void"), line=named("fish"), reason="sold out"))
    edited = edit_line(order, act(7), named("fish"), special_instructions="well done", course=course)
    merged = merge(edited, voided)
    assert item(merged, "fish").quantity == 0
    assert merged.total == voided.total
    part = void(order, act(2), NewVoid(id=named("part"), line=named("soup"), quantity=pieces, reason="less"))
    assert item(merge(edited, part), "soup").quantity == 3 - pieces


@many
@given(histories(2))
def test_nothing_personal_is_left_after_an_erasure(history: History) -> None:
    a, b = history.branches
    erased = derive(structs.replace(a, erased_at=later(500)))
    for order in (merge(erased, b), merge(b, erased)):
        assert all(getattr(order, name) is None for name in PERSONAL)
        assert all(one.special_instructions is None for one in order.items)
        assert not any(name in encode(order) for name in (b"Ada", b"Ben", b"birthday", b"window", b"+49"))
        assert order.total == merge(a, b).total


@many
@given(histories(2))
def test_lines_that_are_due_after_a_merge_are_fired_once(history: History) -> None:
    merged = fire_due(merge(*history.branches), act(50))
    assert fire_due(merged, act(51)) is merged
    assert encode(merge(merged, merged)) == encode(merged)


# -- commands ----------------------------------------------------------------------------------------------------


@many
@given(histories(1))
def test_a_command_changes_no_price_and_no_ordered_quantity(history: History) -> None:
    for step in history.steps:
        after = {one.id: one for one in step.after.items}
        for one in step.before.items:
            same = after[one.id]
            assert (same.unit_price, same.ordered, same.seq) == (one.unit_price, one.ordered, one.seq)


@many
@given(histories(1), st.integers(1, 10**6))
def test_a_discount_is_limited_to_the_price_of_the_lines(history: History, discount: int) -> None:
    (order,) = history.branches
    cut = derive(structs.replace(order, discount=Discount(amount=discount)))
    assert 0 <= cut.discount_amount <= cut.subtotal


@many
@given(histories(1))
def test_stock_is_held_for_all_active_pieces_and_at_most_for_all_ordered_ones(history: History) -> None:
    for order in (history.trunk, *history.branches):
        held = sum(one.quantity for one in order.holds)
        active = sum(2 * one.quantity for one in order.items if one.consumes)
        most = sum(2 * one.ordered for one in order.items if one.consumes)
        assert held <= most
        if order.deleted is None and order.status != "cancelled":
            assert held >= active


@given(st.text(max_size=20))
def test_a_refusal_has_a_code_and_a_sentence(text: str) -> None:
    order = accepted(line("soup", 300))
    try:
        void(order, act(2), NewVoid(id=named("void"), line=text))
    except Refused as refused:
        assert (refused.code, str(refused)) == ("unknown_item", "the order has no such item")
