"""The state of an entity after an operator has resolved a conflict."""

from typing import Any

import msgspec
import pytest
from msgspec import structs

from services.sync.conflicts.decisions import event_between, with_decision
from shared.entities import inventory_item
from shared.entities import order as orders
from shared.entities.contract import encode
from shared.entities.inventory_item import InventoryItem
from shared.entities.order import Order, OrderStatus, PaymentStatus, StockHold
from shared.errors import Conflict
from tests.rigs.builders import new_id, order, payment, with_status

BASE = order(notes="as it was", customer_name="Ada")


def plain(state: Order) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(encode(state))
    return found


def chosen(present: Order, winner: Order, loser: Order) -> Order:
    """`present` after the operator has chosen the losing side."""
    found: Order
    found, _ = with_decision(orders.ENTITY, encode(present), kept=plain(loser), dropped=plain(winner), strict=True)
    return found


def confirmed(present: Order, winner: Order, loser: Order) -> Order:
    """`present` after the operator has confirmed the winning side."""
    found: Order
    found, _ = with_decision(orders.ENTITY, encode(present), kept=plain(winner), dropped=plain(loser), strict=False)
    return found


def test_differing_fields_come_from_the_chosen_side_and_other_fields_stay() -> None:
    winner, loser = structs.replace(BASE, notes="one"), structs.replace(BASE, notes="two", special_instructions="hot")
    present = structs.replace(winner, customer_name="Grace")
    after = chosen(present, winner, loser)
    assert (after.notes, after.special_instructions, after.customer_name) == ("two", "hot", "Grace")
    assert confirmed(present, winner, loser) == present


def test_a_confirmed_winner_is_restored_if_it_is_not_the_head() -> None:
    """The head was built on the losing side, or an earlier decision for that side was not stored."""
    winner, loser = structs.replace(BASE, notes="one"), structs.replace(BASE, notes="two", special_instructions="hot")
    after = confirmed(structs.replace(loser, customer_name="Grace"), winner, loser)
    assert (after.notes, after.special_instructions, after.customer_name) == ("one", None, "Grace")


def test_a_field_with_a_third_value_is_refused_by_name_or_kept() -> None:
    winner, loser = structs.replace(BASE, notes="one", total=1), structs.replace(BASE, notes="two", total=2)
    present = structs.replace(winner, notes="three", total=2)
    with pytest.raises(Conflict) as refused:
        chosen(present, winner, loser)
    assert (refused.value.error_code, refused.value.details["fields"]) == ("changed_since", ["notes"])
    after = confirmed(present, winner, loser)
    assert (after.notes, after.total) == ("three", 1)


def test_payments_stay_and_the_payment_status_is_computed_from_the_new_total() -> None:
    winner = structs.replace(BASE, total=1_000, payments=(payment(amount=1_000),), payment_status=PaymentStatus.PAID)
    loser = structs.replace(BASE, total=1_500, payments=(payment(amount=300),))
    present = structs.replace(winner, payments=(*winner.payments, *loser.payments))
    after = chosen(present, winner, loser)
    assert (after.total, after.payments) == (1_500, present.payments)
    assert after.payment_status is PaymentStatus.PARTIALLY_PAID


def test_the_times_of_both_sides_do_not_matter() -> None:
    loser = structs.replace(BASE, updated_at=BASE.updated_at.replace(year=2025))
    assert chosen(BASE, BASE, loser) == structs.replace(BASE, payment_status=PaymentStatus.PENDING)


def test_an_order_that_is_restored_holds_its_stock_again() -> None:
    hold = StockHold(inventory_item_id=new_id(), quantity=2)
    loser = structs.replace(BASE, holds=(hold,))
    for winner in (
        with_status(loser, OrderStatus.CANCELLED),
        structs.replace(loser, deleted_at=BASE.updated_at),
    ):
        after = chosen(winner, winner, loser)
        [held] = after.holds
        assert (held.quantity, after.deleted_at, after.status) == (2, None, loser.status)
        assert held.held_at is not None
        assert held.held_at > BASE.created_at
        assert confirmed(winner, winner, loser).holds == (hold,)


def test_a_quantity_that_both_sides_changed_is_refused_or_kept() -> None:
    at = BASE.created_at
    item = InventoryItem(
        id=new_id(), restaurant_id=BASE.restaurant_id, name="Flour", quantity=10, counted_at=at, created_at=at,
        updated_at=at,
    )  # fmt: skip
    sides = [structs.replace(item, quantity=item.quantity + n, name=f"Flour {n}") for n in (5, 3)]
    winner, loser = (msgspec.json.decode(encode(side)) for side in sides)
    with pytest.raises(Conflict) as refused:
        with_decision(inventory_item.ENTITY, encode(sides[0]), kept=loser, dropped=winner, strict=True)
    assert (refused.value.error_code, refused.value.details["fields"]) == ("changed_since", ["quantity"])
    after, _ = with_decision(inventory_item.ENTITY, encode(sides[0]), kept=winner, dropped=loser, strict=False)
    assert after == sides[0]


def test_a_decision_covers_the_fields_of_a_newer_release() -> None:
    """The release that decides does not know `fiscal_id` and `course`."""

    def newer(notes: str, **fields: Any) -> dict[str, Any]:
        found = plain(structs.replace(BASE, notes=notes))
        found["items"][0]["course"] = 2
        return {**found, **fields}

    winner, loser = newer("one", fiscal_id="DE-1", covers=4), newer("two", fiscal_id="DE-2")
    for present, kept, dropped, fiscal_id in ((winner, loser, winner, "DE-2"), (loser, winner, loser, "DE-1")):
        state, encoded = with_decision(orders.ENTITY, encode(present), kept=kept, dropped=dropped, strict=True)
        after = msgspec.json.decode(encoded)
        assert (state.notes, after["notes"], after["fiscal_id"]) == (kept["notes"], kept["notes"], fiscal_id)
        assert after.get("covers") == kept.get("covers")
        assert after["items"][0]["course"] == 2
        assert orders.ENTITY.decode_state(encoded) == state
    changed = {**winner, "fiscal_id": "DE-3"}
    with pytest.raises(Conflict) as refused:
        with_decision(orders.ENTITY, encode(changed), kept=loser, dropped=winner, strict=True)
    assert refused.value.details["fields"] == ["fiscal_id"]


def test_a_decision_that_deletes_or_restores_has_that_event() -> None:
    deleted = structs.replace(BASE, deleted_at=BASE.updated_at)
    for before, after, event in ((BASE, deleted, "deleted"), (deleted, BASE, "restored"), (BASE, BASE, "updated")):
        assert event_between(orders.ENTITY, before, after) == event
