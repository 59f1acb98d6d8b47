"""What stands after the other side of a conflict was chosen."""

from typing import Any

import msgspec
import pytest
from msgspec import structs

from services.sync.conflicts.decisions import event_between, holding
from shared.entities import inventory_item
from shared.entities import order as orders
from shared.entities.contract import encode
from shared.entities.inventory_item import InventoryItem
from shared.entities.order import Order, OrderStatus, PaymentStatus, StockHold
from shared.errors import Conflict
from tests.rigs.builders import new_id, order, payment

BASE = order(notes="as it was", customer_name="Ada")


def plain(state: Order) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(encode(state))
    return found


def chosen(present: Order, winner: Order, loser: Order) -> Order:
    """The loser."""
    found: Order = holding(orders.ENTITY, present, kept=plain(loser), dropped=plain(winner), strict=True)
    return found


def confirmed(present: Order, winner: Order, loser: Order) -> Order:
    """The winner."""
    found: Order = holding(orders.ENTITY, present, kept=plain(winner), dropped=plain(loser), strict=False)
    return found


def test_what_differs_comes_from_the_one_that_holds_and_the_rest_stays() -> None:
    winner, loser = structs.replace(BASE, notes="one"), structs.replace(BASE, notes="two", special_instructions="hot")
    present = structs.replace(winner, customer_name="Grace")
    after = chosen(present, winner, loser)
    assert (after.notes, after.special_instructions, after.customer_name) == ("two", "hot", "Grace")
    assert confirmed(present, winner, loser) == present


def test_a_winner_that_does_not_stand_is_brought_back_too() -> None:
    """What stands was built on the loser, or an earlier decision for that one was not noted."""
    winner, loser = structs.replace(BASE, notes="one"), structs.replace(BASE, notes="two", special_instructions="hot")
    after = confirmed(structs.replace(loser, customer_name="Grace"), winner, loser)
    assert (after.notes, after.special_instructions, after.customer_name) == ("one", None, "Grace")


def test_a_third_value_is_named_or_stays() -> None:
    winner, loser = structs.replace(BASE, notes="one", total=1), structs.replace(BASE, notes="two", total=2)
    present = structs.replace(winner, notes="three", total=2)
    with pytest.raises(Conflict) as refused:
        chosen(present, winner, loser)
    assert (refused.value.error_code, refused.value.details["fields"]) == ("changed_since", ["notes"])
    after = confirmed(present, winner, loser)
    assert (after.notes, after.total) == ("three", 1)


def test_payments_stay_and_what_they_make_of_a_total_is_reckoned_anew() -> None:
    winner = structs.replace(BASE, total=1_000, payments=(payment(amount=1_000),), payment_status=PaymentStatus.PAID)
    loser = structs.replace(BASE, total=1_500, payments=(payment(amount=300),))
    present = structs.replace(winner, payments=(*winner.payments, *loser.payments))
    after = chosen(present, winner, loser)
    assert (after.total, after.payments) == (1_500, present.payments)
    assert after.payment_status is PaymentStatus.PARTIALLY_PAID


def test_when_each_side_was_written_does_not_matter() -> None:
    loser = structs.replace(BASE, updated_at=BASE.updated_at.replace(year=2025))
    assert chosen(BASE, BASE, loser) == structs.replace(BASE, payment_status=PaymentStatus.PENDING)


def test_an_order_that_comes_back_takes_anew_what_it_gave_back() -> None:
    hold = StockHold(inventory_item_id=new_id(), quantity=2)
    loser = structs.replace(BASE, holds=(hold,))
    for winner in (
        structs.replace(loser, status=OrderStatus.CANCELLED),
        structs.replace(loser, deleted_at=BASE.updated_at),
    ):
        after = chosen(winner, winner, loser)
        [held] = after.holds
        assert (held.quantity, after.deleted_at, after.status) == (2, None, loser.status)
        assert held.held_at is not None
        assert held.held_at > BASE.created_at
        assert confirmed(winner, winner, loser).holds == (hold,)


def test_of_a_stock_that_moved_on_both_sides_nobody_can_say_what_is_there() -> None:
    at = BASE.created_at
    item = InventoryItem(
        id=new_id(), restaurant_id=BASE.restaurant_id, name="Flour", quantity=10, counted_at=at, created_at=at,
        updated_at=at,
    )  # fmt: skip
    sides = [structs.replace(item, quantity=item.quantity + n, name=f"Flour {n}") for n in (5, 3)]
    winner, loser = (msgspec.json.decode(encode(side)) for side in sides)
    with pytest.raises(Conflict) as refused:
        holding(inventory_item.ENTITY, sides[0], kept=loser, dropped=winner, strict=True)
    assert (refused.value.error_code, refused.value.details["fields"]) == ("changed_since", ["quantity"])
    after = holding(inventory_item.ENTITY, sides[0], kept=winner, dropped=loser, strict=False)
    assert after == sides[0]


def test_a_deletion_and_its_undoing_are_told_as_what_they_are() -> None:
    gone = structs.replace(BASE, deleted_at=BASE.updated_at)
    for before, after, event in ((BASE, gone, "deleted"), (gone, BASE, "restored"), (BASE, BASE, "updated")):
        assert event_between(orders.ENTITY, before, after) == event
