"""The commands on orders: their effects, their permissions, and the codes of their refusals."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from msgspec import structs

from shared.entities.contract import encode
from shared.entities.menu_item import Consumption
from shared.entities.order import lifecycle
from shared.entities.order.acts import RULES, Act, Action, CallerRole
from shared.entities.order.derive import derive
from shared.entities.order.kitchen import accept, cook, fire_due
from shared.entities.order.lifecycle import cancel, complete, delete, erase, reopen, restore, set_status
from shared.entities.order.lines import (
    NewVoid,
    Wanted,
    add_lines,
    comp,
    discount_line,
    edit_line,
    plan_items,
    put_items,
    void,
)
from shared.entities.order.merge import lifted, merge
from shared.entities.order.payments import NewPayment, NewRefund, pay, refund
from shared.entities.order.refusals import Kind, Refused
from shared.entities.order.registers import discount_order, edit_order, set_service, tell
from shared.entities.order.split import split_by_amounts, split_by_lines, split_evenly
from shared.entities.order.state import (
    AMOUNTS_DO_NOT_ADD_UP,
    FACTS_DIFFER,
    LINES_AFTER_CLOSE,
    ClosedAs,
    Customization,
    Discount,
    KitchenState,
    Order,
    OrderStatus,
    PaymentStatus,
    ServiceRate,
    Void,
)
from shared.entities.order.terms import OrderType, ServiceCharge, Tax, TaxMode, Terms
from tests.rigs.order_law import FLOUR, accepted, act, item, later, line, named, paid, placed, rates, refunded

MANAGER, STAFF, GUEST, KITCHEN = CallerRole.MANAGER, CallerRole.STAFF, CallerRole.GUEST, CallerRole.KITCHEN
SOUP, FISH = line("soup", 300, 2), line("fish", 900)


def refusal(call: Callable[[], Any]) -> Refused:
    with pytest.raises(Refused) as refused:
        call()
    return refused.value


def voiding(
    order: Order, name: str = "soup", quantity: int | None = None, act_: Act | None = None, **more: Any
) -> Order:
    new = NewVoid(**{"id": named(f"void {name}"), "line": named(name), "quantity": quantity, "reason": "cold", **more})
    return void(order, act_ or act(3), new)


def discounting(order: Order, by: Act) -> Order:
    return discount_order(order, by, Discount(bp=1_000, reason="regular"))


# -- permissions -------------------------------------------------------------------------------------------------

ORDERS: dict[str, Callable[[], Order]] = {
    "pending": lambda: placed(SOUP, FISH),
    "fired": lambda: accepted(SOUP, FISH),
    "paid": lambda: paid(accepted(SOUP, FISH), 1575),
    "completed": lambda: complete(paid(accepted(SOUP, FISH), 1000), act(4)),
    "cancelled": lambda: cancel(paid(accepted(SOUP, FISH), 1000), act(4)),
    "deleted": lambda: delete(placed(SOUP), act(4)),
}
COMMANDS: dict[str, Callable[[Order, Act], Order]] = {
    "add": lambda order, by: add_lines(order, by, [line("beer", 450)]),
    "edit": lambda order, by: edit_line(order, by, named("soup"), seat=3),
    "void": lambda order, by: voiding(order, act_=by),
    "comp": lambda order, by: comp(order, by, named("soup"), "apology"),
    "discount": discounting,
    "service": lambda order, by: set_service(order, by, ServiceRate(0, "waived")),
    "accept": accept,
    "cook": lambda order, by: cook(order, by, KitchenState.STARTED),
    "notes": lambda order, by: edit_order(order, by, notes="window"),
    "type": lambda order, by: edit_order(order, by, type=OrderType.TAKEAWAY),
    "pay": lambda order, by: pay(order, by, NewPayment(id=named("more"), amount=100, method="cash")),
    "refund": lambda order, by: refund(
        order, by, NewRefund(id=named("back"), amount=100, method="card", reason="cold")
    ),
    "complete": complete,
    "cancel": cancel,
    "reopen": reopen,
    "delete": delete,
    "restore": restore,
}
TABLE = """
    command   order      staff           manager_approval  guest      kitchen    manager
    add       pending    yes             yes               yes        forbidden  yes
    add       fired      yes             yes               yes        forbidden  yes
    add       completed  order_closed    order_closed      order_closed order_closed order_closed
    add       cancelled  order_closed    order_closed      order_closed order_closed order_closed
    add       deleted    order_deleted   order_deleted     order_deleted order_deleted order_deleted
    edit      pending    yes             yes               yes        forbidden  yes
    edit      fired      line_fired      line_fired        forbidden  forbidden  line_fired
    edit      completed  order_closed    order_closed      order_closed order_closed order_closed
    void      pending    yes             yes               yes        forbidden  yes
    void      fired      yes             manager_needed    forbidden  forbidden  yes
    void      cancelled  order_closed    order_closed      order_closed order_closed order_closed
    comp      pending    yes             manager_needed    forbidden  forbidden  yes
    comp      completed  order_closed    order_closed      order_closed order_closed order_closed
    discount  fired      yes             manager_needed    forbidden  forbidden  yes
    discount  completed  order_closed    order_closed      order_closed order_closed order_closed
    service   fired      yes             manager_needed    forbidden  forbidden  yes
    accept    pending    yes             yes               forbidden  yes        yes
    cook      pending    order_pending   order_pending     forbidden  order_pending order_pending
    cook      fired      yes             yes               forbidden  yes        yes
    cook      completed  order_closed    order_closed      order_closed order_closed order_closed
    notes     fired      yes             yes               forbidden  forbidden  yes
    notes     completed  order_closed    order_closed      order_closed order_closed order_closed
    type      fired      yes             yes               forbidden  forbidden  yes
    type      paid       order_has_payments order_has_payments forbidden forbidden order_has_payments
    pay       fired      yes             yes               forbidden  forbidden  yes
    pay       paid       overpaid        overpaid          forbidden  forbidden  overpaid
    pay       completed  yes             yes               forbidden  forbidden  yes
    pay       cancelled  order_closed    order_closed      order_closed order_closed order_closed
    pay       deleted    order_deleted   order_deleted     order_deleted order_deleted order_deleted
    refund    paid       yes             manager_needed    forbidden  forbidden  yes
    refund    completed  yes             manager_needed    forbidden  forbidden  yes
    refund    cancelled  yes             manager_needed    forbidden  forbidden  yes
    refund    fired      refund_above_paid manager_needed  forbidden  forbidden  refund_above_paid
    complete  paid       yes             yes               forbidden  forbidden  yes
    complete  fired      yes             manager_needed    forbidden  forbidden  yes
    complete  cancelled  order_closed    order_closed      order_closed order_closed order_closed
    cancel    pending    yes             yes               forbidden  forbidden  yes
    cancel    fired      yes             manager_needed    forbidden  forbidden  yes
    cancel    paid       yes             manager_needed    forbidden  forbidden  yes
    cancel    completed  order_closed    order_closed      order_closed order_closed order_closed
    reopen    fired      order_open      order_open        order_open order_open order_open
    reopen    completed  yes             manager_needed    forbidden  forbidden  yes
    reopen    cancelled  order_closed    order_closed      order_closed order_closed order_closed
    delete    pending    yes             yes               forbidden  forbidden  yes
    delete    fired      line_fired      line_fired        forbidden  forbidden  line_fired
    delete    paid       order_has_payments order_has_payments forbidden forbidden order_has_payments
    delete    completed  order_closed    order_closed      order_closed order_closed order_closed
    delete    cancelled  order_closed    order_closed      order_closed order_closed order_closed
    restore   deleted    yes             yes               forbidden  forbidden  yes
    restore   fired      not_deleted     not_deleted       forbidden  forbidden  not_deleted
"""
COLUMNS = [("staff", STAFF, False), ("manager_approval", STAFF, True), ("guest", GUEST, False)]
COLUMNS += [("kitchen", KITCHEN, False), ("manager", MANAGER, True)]


@pytest.mark.parametrize(
    "row", [row.split() for row in TABLE.strip().splitlines()[1:]], ids=lambda row: "-".join(row[:2])
)
def test_the_table_says_which_role_may_do_which_action(row: list[str]) -> None:
    command, state, *expected = row
    order = ORDERS[state]()
    found = []
    for _, role, approval in COLUMNS:
        try:
            after = COMMANDS[command](order, act(5, role=role, manager_approval=approval))
        except Refused as refused:
            found.append(refused.code)
        else:
            assert after is not order
            found.append("yes")
    assert found == expected


def test_every_action_has_a_rule() -> None:
    assert set(RULES) == set(Action)


@pytest.mark.parametrize("reason", [None, ""])
def test_voids_discounts_waivers_and_refunds_need_a_reason(reason: str | None) -> None:
    order = paid(accepted(SOUP, FISH), 1575)
    manager = act(5, role=MANAGER)
    for call in (
        lambda: voiding(order, reason=reason, act_=manager),
        lambda: discount_line(order, manager, named("soup"), Discount(bp=1, reason=reason)),
        lambda: discount_order(order, manager, Discount(bp=1, reason=reason)),
        lambda: set_service(order, manager, ServiceRate(0, reason)),
        lambda: refund(order, manager, NewRefund(id=named("back"), amount=1, method="card", reason=reason)),
    ):
        refused = refusal(call)
        assert (refused.kind, refused.code, refused.field) == (Kind.INVALID, "reason_needed", "reason")


# -- lines -------------------------------------------------------------------------------------------------------


def test_a_repeated_line_counts_once_and_its_id_with_other_content_is_refused() -> None:
    order = add_lines(placed(SOUP), act(2), [FISH])
    assert add_lines(order, act(3), [FISH]) is order
    assert add_lines(complete(order, act(3)), act(4), [FISH]).items[1].id == FISH.id
    refused = refusal(lambda: add_lines(order, act(3), [structs.replace(FISH, unit_price=1)]))
    assert (refused.kind, refused.code) == (Kind.CONFLICT, "id_reused")


def test_lines_keep_the_sequence_in_which_they_were_added() -> None:
    order = add_lines(placed(SOUP, FISH), act(2), [line("beer", 450), line("ale", 450)])
    assert [one.name for one in order.items] == ["soup", "fish", "beer", "ale"]
    assert [one.seq for one in order.items] == [1_000, 1_001, 2_000, 2_001]


def test_an_order_has_at_most_a_thousand_lines_and_a_bounded_subtotal() -> None:
    order = placed(*(line(str(number), 1) for number in range(1_000)))
    assert refusal(lambda: add_lines(order, act(2), [FISH])).code == "too_many_items"
    assert refusal(lambda: placed(line("gold", 10**11), FISH)).code == "order_too_large"


def test_a_void_takes_back_no_more_pieces_than_are_left() -> None:
    order = voiding(placed(SOUP, FISH), quantity=1)
    assert item(order, "soup").quantity == 1
    refused = refusal(lambda: voiding(order, quantity=2, id=named("second")))
    assert (refused.code, refused.details) == ("void_above_quantity", {"quantity": 1})
    assert refusal(lambda: voiding(order, quantity=0, id=named("second"))).code == "invalid_input"
    gone = voiding(order, id=named("second"))
    assert (item(gone, "soup").quantity, gone.subtotal) == (0, 900)
    assert refusal(lambda: voiding(gone, id=named("third"))).code == "void_above_quantity"
    assert voiding(gone, id=named("second")) is gone
    assert refusal(lambda: voiding(gone, id=named("second"), quantity=1)).code == "id_reused"
    assert refusal(lambda: voiding(gone, "cake")).kind is Kind.ABSENT


def test_a_discount_above_the_price_is_refused() -> None:
    order = placed(SOUP, FISH)
    refused = refusal(lambda: discount_order(order, act(2), Discount(amount=1501, reason="x")))
    assert (refused.code, refused.details) == ("discount_above_subtotal", {"limit": 1500})
    comped = comp(order, act(2), named("fish"), "x")
    assert discount_order(comped, act(3), Discount(amount=600, reason="x")).total == 30
    assert refusal(lambda: discount_order(comped, act(3), Discount(amount=601, reason="x"))).details == {"limit": 600}
    assert refusal(lambda: discount_line(order, act(2), named("soup"), Discount(amount=601, reason="x"))).field
    both = Discount(bp=1, amount=1, reason="x")
    assert refusal(lambda: discount_order(order, act(2), both)).code == "invalid_discount"
    half = Discount(bp=5_000, reason="x", comp=True)
    assert refusal(lambda: discount_line(order, act(2), named("soup"), half)).code == "invalid_discount"
    assert refusal(lambda: placed(SOUP, discount=Discount(amount=601))).field == "discount_amount"


def test_a_discount_can_be_removed() -> None:
    order = discounting(placed(SOUP), act(2))
    assert discount_order(order, act(3), None).discount is None
    comped = comp(order, act(3), named("soup"), "x")
    assert discount_line(comped, act(4), named("soup"), None).total == order.total


# -- PUT items ---------------------------------------------------------------------------------------------------


def wanted(new: Any, quantity: int = 1, **fields: Any) -> Wanted:
    return Wanted(new.menu_item_id, quantity, **fields)


def test_unchanged_items_keep_their_line_and_their_price() -> None:
    order = placed(line("steak", 2000))
    plan = plan_items(order, [wanted(line("steak", 0)), wanted(line("cola", 0), 2)])
    assert (plan.more, plan.fewer) == (((1, 2),), ())
    after = put_items(order, act(2), plan, [line("cola", 350, 2)])
    assert [(one.name, one.unit_price, one.quantity) for one in after.items] == [("steak", 2000, 1), ("cola", 350, 2)]


def test_fewer_items_become_voids_and_more_items_become_a_new_line() -> None:
    order = placed(SOUP, FISH)
    plan = plan_items(order, [wanted(SOUP, 1), wanted(SOUP, 4)])
    assert plan.more == ((0, 3),)
    assert plan.fewer == ((FISH.id, None),)
    after = put_items(order, act(2), plan, [line("more soup", 310, 3, menu_item_id=SOUP.menu_item_id)])
    assert [one.quantity for one in after.items] == [2, 0, 3]
    assert put_items(order, act(2), plan_items(order, [wanted(SOUP), wanted(FISH)]), []).items[0].quantity == 1
    assert put_items(order, act(2), plan, []) == put_items(order, act(2), plan, [])


def test_an_item_with_other_options_or_instructions_is_another_item() -> None:
    large = line("pizza", 1100, customizations=(Customization("size", "large", 200),), special_instructions="hot")
    order = placed(large)
    same = wanted(large, customizations=(("size", "large"),), special_instructions="hot")
    assert plan_items(order, [same]) == plan_items(order, [same, wanted(large, 0)])
    for other in (structs.replace(same, special_instructions=None), structs.replace(same, customizations=())):
        plan = plan_items(order, [other])
        assert (plan.more, plan.fewer) == (((0, 1),), ((large.id, None),))


def test_items_are_fixed_once_one_is_fired() -> None:
    refused = refusal(lambda: plan_items(accepted(SOUP), [wanted(SOUP)]))
    assert (refused.code, refused.field) == ("items_are_fixed", "items")


# -- the kitchen -------------------------------------------------------------------------------------------------


def states(order: Order) -> dict[str, KitchenState]:
    return {one.name: one.kitchen.state for one in order.items}


def test_accepting_fires_all_lines_except_held_ones_and_later_courses() -> None:
    order = placed(
        line("water", 200),
        line("soup", 300, course=1),
        line("fish", 900, course=2),
        line("cake", 500, course=1, hold=True),
    )
    assert set(states(order).values()) == {KitchenState.NEW, KitchenState.HOLD}
    order = accept(order, act(2))
    assert states(order) == {"water": "fired", "soup": "fired", "fish": "new", "cake": "hold"}
    order = add_lines(order, act(3), [line("bread", 100, course=1), line("wine", 600, course=2)])
    assert (states(order)["bread"], states(order)["wine"]) == ("fired", "new")
    order = cook(order, act(4), KitchenState.FIRED, course=2)
    assert (states(order)["fish"], states(order)["wine"], states(order)["cake"]) == ("fired", "fired", "hold")
    assert item(order, "fish").kitchen.times.fired == later(3)  # type: ignore[union-attr]


def test_the_first_course_is_the_first_one_with_an_active_line() -> None:
    order = placed(line("soup", 300, course=1), line("fish", 900, course=2), line("cake", 500, course=3))
    assert states(accept(voiding(order), act(4))) == {"soup": "new", "fish": "fired", "cake": "new"}
    moved = edit_line(accept(order, act(2)), act(3), named("fish"), course=1)
    assert states(moved)["fish"] == "fired"


def test_the_status_follows_the_lines() -> None:
    order = placed(SOUP, FISH)
    assert order.status is OrderStatus.PENDING
    order = accept(order, act(2))
    assert order.status is OrderStatus.RECEIVED
    order = cook(order, act(3), KitchenState.STARTED, items=[named("soup")])
    assert order.status is OrderStatus.PREPARING
    order = cook(order, act(4), KitchenState.READY, items=[named("soup")])
    assert order.status is OrderStatus.PREPARING
    order = cook(order, act(5), KitchenState.SERVED)
    assert order.status is OrderStatus.READY
    more = add_lines(order, act(6), [line("beer", 450)])
    assert more.status is OrderStatus.PREPARING
    assert voiding(more, "beer").status is OrderStatus.READY
    recalled = cook(order, act(6), KitchenState.FIRED, recall=True)
    assert recalled.status is OrderStatus.RECEIVED
    assert voiding(voiding(recalled), "fish").status is OrderStatus.RECEIVED


def test_lines_only_move_forward_and_a_repeated_step_changes_nothing() -> None:
    order = cook(accepted(SOUP), act(2), KitchenState.READY)
    assert cook(order, act(3), KitchenState.READY) is order
    assert cook(order, act(3), KitchenState.STARTED) is order
    assert cook(order, act(3), KitchenState.SERVED, recall=True) is order
    back = cook(order, act(3), KitchenState.STARTED, recall=True)
    assert (states(back)["soup"], item(back, "soup").kitchen.rev) == ("started", 3)
    times = item(back, "soup").kitchen.times
    assert times is not None
    assert (times.fired, times.started, times.ready) == (later(0), later(2), later(1))


def test_a_stale_terminal_does_not_undo_ready_but_a_recall_does() -> None:
    order = accepted(SOUP)
    ready = cook(order, act(2), KitchenState.READY)
    stale = cook(order, act(9), KitchenState.STARTED)
    assert states(merge(ready, stale))["soup"] == "ready"
    recalled = cook(ready, act(3), KitchenState.FIRED, recall=True)
    assert states(merge(recalled, stale))["soup"] == "fired"


def test_a_station_moves_only_its_own_lines() -> None:
    grill, bar = named("grill"), named("bar")
    order = accepted(line("steak", 2000, station_id=grill), line("beer", 450, station_id=bar))
    assert states(cook(order, act(2), KitchenState.READY, station=bar)) == {"steak": "fired", "beer": "ready"}


def test_a_fired_line_is_not_held_back_and_a_voided_one_does_not_move() -> None:
    order = accepted(SOUP, FISH)
    assert refusal(lambda: cook(order, act(2), KitchenState.HOLD, items=[named("soup")])).code == "line_fired"
    assert states(cook(voiding(order), act(4), KitchenState.READY))["soup"] == "fired"
    assert refusal(lambda: cook(order, act(2), KitchenState.READY, items=[named("cake")])).code == "unknown_item"
    assert refusal(lambda: cook(order, act(2), KitchenState.NEW, recall=True)).field == "state"


def test_a_scheduled_order_is_fired_in_time_for_its_slowest_dish() -> None:
    order = placed(line("roast", 1900, prep_minutes=40), line("beer", 450), scheduled_for=later(60))
    order = accept(order, act(2, minutes=19))
    assert set(states(order).values()) == {KitchenState.NEW}
    assert fire_due(order, act(3, minutes=19)) is order
    assert set(states(fire_due(order, act(3, minutes=20))).values()) == {KitchenState.FIRED}


def test_a_line_added_during_the_acceptance_is_fired_after_the_merge() -> None:
    order = placed(SOUP)
    merged = merge(accept(order, act(2)), add_lines(order, act(2), [FISH]))
    assert states(merged) == {"soup": "fired", "fish": "new"}
    assert states(fire_due(merged, act(3))) == {"soup": "fired", "fish": "fired"}


@pytest.mark.parametrize(
    ("status", "then"),
    [("pending", "received"), ("received", "preparing"), ("preparing", "ready"), ("ready", "completed")],
)
def test_the_original_systems_set_the_status_step_by_step(status: str, then: str) -> None:
    order = placed(line("soup", 300, course=1), line("fish", 900, course=2, hold=True))
    steps = [OrderStatus.RECEIVED, OrderStatus.PREPARING, OrderStatus.READY, OrderStatus.COMPLETED]
    version = 1
    while order.status != status:
        version += 1
        order = set_status(order, act(version), steps[version - 2])
    assert set_status(order, act(8), OrderStatus(status)) is order
    assert set_status(order, act(8), OrderStatus(then)).status == then
    assert set_status(order, act(8), OrderStatus.CANCELLED).status == "cancelled"
    refused = refusal(
        lambda: set_status(order, act(8), OrderStatus.COMPLETED if then != "completed" else OrderStatus.RECEIVED)
    )
    assert (refused.code, refused.details["allowed"]) == ("illegal_status", [then, "cancelled"])


# -- payments ----------------------------------------------------------------------------------------------------


def test_a_payment_above_the_balance_is_refused_unless_the_rest_is_a_tip() -> None:
    order = placed(line("menu", 3080), terms=Tax())
    order = paid(order, 1000, "first")
    refused = refusal(lambda: paid(order, 100_000, "second"))
    assert (refused.code, refused.field, refused.details) == ("overpaid", "amount", {"balance": 2080})
    tipped = paid(order, 2380, "second", tip=300)
    assert (tipped.total, tipped.balance, tipped.tip_amount) == (3380, 0, 300)
    later_tip = paid(tipped, 50, "third", version=5, tip=50)
    assert (later_tip.balance, later_tip.payment_status) == (0, PaymentStatus.PAID)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"amount": 0}, "invalid_input"),
        ({"amount": 100, "tip": 101}, "tip_above_amount"),
        ({"amount": 100, "tip": -1}, "tip_above_amount"),
        ({"amount": 100, "tendered": 99}, "tendered_too_little"),
    ],
)
def test_a_payment_that_contradicts_itself_is_refused(fields: dict[str, int], code: str) -> None:
    order = placed(SOUP)
    refused = refusal(lambda: pay(order, act(2), NewPayment(**{"id": named("a"), "method": "cash", **fields})))  # type: ignore[arg-type]
    assert (refused.kind, refused.code) == (Kind.INVALID, code)


def test_a_payment_counts_once_however_often_it_is_sent() -> None:
    order = paid(placed(SOUP), 300)
    assert paid(order, 300, version=9) is order
    assert paid(complete(order, act(4)), 300, version=9).balance == order.balance
    assert refusal(lambda: paid(order, 301, version=9)).code == "id_reused"
    back = refunded(order, 100)
    assert refunded(back, 100, version=9) is back
    assert refusal(lambda: refunded(back, 101, version=9)).code == "id_reused"


def test_a_refund_names_its_payment_and_takes_no_more_than_is_left_of_it() -> None:
    order = paid(paid(placed(SOUP, FISH), 700, "card"), 800, "cash", 4, method="cash")
    assert refusal(lambda: refunded(order, 701, version=5)).details["paid"] == 1500
    assert refusal(lambda: refunded(order, 801, refund_of=named("cash"), version=5)).details["paid"] == 800
    assert refusal(lambda: refunded(order, 1, refund_of=named("other"), version=5)).code == "unknown_payment"
    order = refunded(order, 500, refund_of=named("card"), version=5)
    assert refusal(lambda: refunded(order, 201, "again", 6, refund_of=named("card"))).details["paid"] == 200
    assert refusal(lambda: refunded(order, 1, "again", 6, refund_of=named("refund"))).code == "unknown_payment"


def test_a_refund_without_a_payment_takes_the_newest_one_with_enough_left() -> None:
    order = paid(paid(paid(placed(SOUP, FISH), 700, "old"), 600, "new", 4), 275, "cash", 5, method="cash")
    assert refunded(order, 500, version=6).payments[-1].refund_of == named("new")
    assert refunded(order, 650, version=6).payments[-1].refund_of == named("old")
    assert refunded(order, 275, version=6, method="cash").payments[-1].refund_of == named("cash")


def test_only_money_that_nobody_owed_is_a_credit() -> None:
    order = paid(placed(SOUP, terms=Tax()), 600)
    correction = refunded(order, 600, correction=True)
    assert (correction.payments[-1].credit, correction.balance, correction.payment_status) == (0, 600, "pending")
    again = paid(correction, 600, "cash", 5, method="cash")
    assert (again.balance, again.payment_status) == (0, PaymentStatus.PAID)
    partly = paid(placed(SOUP, terms=Tax()), 500)
    assert refunded(partly, 500).payments[-1].credit == 0
    voided = voiding(order, quantity=1)
    assert voided.payment_status is PaymentStatus.REFUND_DUE
    mixed = refunded(voided, 400)
    assert (mixed.payments[-1].credit, mixed.due, mixed.balance) == (100, 200, 0)


def test_a_credit_never_makes_the_due_amount_negative() -> None:
    order = refunded(paid(placed(SOUP, terms=Tax()), 600), 500)
    assert (order.due, order.balance) == (100, 0)
    less = voiding(order, act_=act(5))
    assert (less.total, less.due, less.balance) == (0, 0, -100)


def test_an_order_that_costs_nothing_is_paid() -> None:
    assert placed(SOUP, deposit_used=630).payment_status is PaymentStatus.PAID
    assert placed(SOUP).payment_status is PaymentStatus.PENDING


def test_an_order_has_at_most_a_thousand_payments() -> None:
    order = placed(line("menu", 5_000), terms=Tax())
    many = tuple(structs.replace(paid(order, 1).payments[0], id=named(str(number))) for number in range(1_000))
    order = derive(structs.replace(order, payments=many))
    assert refusal(lambda: paid(order, 1, "last")).code == "too_many_payments"


# -- splits ------------------------------------------------------------------------------------------------------


def test_a_split_refuses_amounts_that_do_not_add_up() -> None:
    order = placed(SOUP, FISH)
    assert refusal(lambda: split_by_amounts(order, [1000, 576])).details == {"balance": 1575}
    assert split_by_amounts(order, [1000]) == [1000, 575]
    assert split_by_amounts(order, [1000, 575]) == [1000, 575]
    soup, fish = named("soup"), named("fish")
    assert split_by_lines(order, [[soup], [fish]]) == [630, 945]
    assert refusal(lambda: split_by_lines(order, [[soup]])).details == {"items": [fish]}
    assert refusal(lambda: split_by_lines(order, [[soup, fish], [fish]])).code == "item_split_twice"
    assert refusal(lambda: split_by_lines(order, [[named("cake")]])).code == "unknown_item"
    assert refusal(lambda: split_evenly(order, 0)).field == "even"
    assert refusal(lambda: split_by_amounts(order, [0])).field == "amounts"
    assert refusal(lambda: split_by_lines(order, [])).field == "groups"
    assert refusal(lambda: split_evenly(paid(order, 1575), 2)).code == "nothing_due"


def test_a_voided_line_needs_no_group() -> None:
    order = voiding(placed(SOUP, FISH))
    assert split_by_lines(order, [[named("fish")], []]) == [945, 0]


# -- closing, deleting, stock ------------------------------------------------------------------------------------


def test_a_command_that_changes_nothing_returns_the_order_itself() -> None:
    order = complete(edit_order(paid(accepted(SOUP), 630), act(4), notes="window"), act(5))
    assert complete(order, act(6)) is order
    cancelled = cancel(placed(SOUP), act(2))
    assert cancel(cancelled, act(3)) is cancelled
    assert edit_order(placed(SOUP), act(2), notes=None) == placed(SOUP)
    assert accept(accepted(SOUP), act(2)) == accepted(SOUP)
    assert refusal(lambda: edit_order(placed(SOUP), act(2), total=1)).field == "total"


def test_an_unchanged_register_keeps_its_version() -> None:
    order = edit_order(placed(SOUP), act(2), notes="window", guests=2)
    order = edit_order(order, act(3), notes="window", guests=4, customer_name="Ada")
    assert order.revs == {"guests": 3, "notes": 2, "contact": 3}


def test_stock_stays_taken_for_pieces_that_were_started() -> None:
    recipe = (Consumption(FLOUR, 2),)
    order = accepted(line("soup", 300, 3, consumes=recipe), line("fish", 900, consumes=recipe))

    def held(order: Order) -> int:
        return sum(one.quantity for one in order.holds)

    assert held(order) == 8
    assert held(voiding(order, quantity=1)) == 6
    started = cook(order, act(2), KitchenState.STARTED, items=[named("soup")])
    assert item(voiding(started, quantity=1), "soup").voids[0].wasted
    assert held(voiding(started, quantity=1)) == 8
    assert held(voiding(started, quantity=1, wasted=False)) == 6
    assert held(cancel(started, act(3))) == 6
    assert held(cancel(order, act(3))) == 0
    assert held(complete(order, act(3))) == 8
    both = voiding(voiding(started, quantity=1, wasted=False), id=named("rest"))
    assert held(both) == 4 + 2


def test_a_restored_order_holds_its_stock_from_the_restoration_on() -> None:
    order = placed(line("soup", 300, consumes=(Consumption(FLOUR, 2),)))
    assert order.holds[0].held_at is None
    deleted = delete(order, act(2))
    assert (deleted.holds, deleted.due, deleted.deleted_at) == ((), 0, later(1))
    restored = restore(deleted, act(3))
    assert (restored.holds[0].quantity, restored.holds[0].held_at, restored.deleted_at) == (2, later(2), None)


def test_a_new_line_holds_its_stock_from_a_time_of_its_own() -> None:
    """This holds even if the clock stands still or goes back. The claim recognizes a new hold by its item and its
    time."""
    soup, bread, rice = [line(name, 300, consumes=(Consumption(FLOUR, 2),)) for name in ("soup", "bread", "rice")]
    order = placed(soup, FISH)
    at, micro = order.created_at, timedelta(microseconds=1)
    more = add_lines(order, act(2, minutes=0), [bread, line("beer", 450)])
    assert [(one.quantity, one.held_at) for one in more.holds] == [(2, None), (2, at + micro)]
    assert item(more, "beer").held_at is None
    # A line that replaces another one does not take over its time.
    other = put_items(order, act(2, minutes=0), plan_items(order, [wanted(rice), wanted(FISH)]), [rice])
    assert [(one.quantity, one.held_at) for one in other.holds] == [(2, at + micro)]
    restored = restore(delete(more, act(3)), act(4))
    again = add_lines(restored, act(5, minutes=3), [rice])
    assert [(one.quantity, one.held_at) for one in again.holds] == [(4, later(3)), (2, later(3) + micro)]
    assert item(add_lines(more, act(3), [rice]), "rice").held_at is None


def test_voids_of_both_sides_of_a_merge_take_no_piece_twice() -> None:
    order = accepted(line("soup", 300, 3, consumes=(Consumption(FLOUR, 1),)))
    one = voiding(order, quantity=2, id=named("one"), wasted=True)
    other = voiding(order, quantity=2, id=named("other"), wasted=False)
    merged = merge(one, other)
    assert (item(merged, "soup").quantity, merged.holds[0].quantity) == (0, 2)


def test_a_line_that_is_added_after_closing_is_kept_and_flagged() -> None:
    order = accepted(SOUP)
    closed = complete(paid(order, 630), act(4))
    merged = merge(closed, add_lines(order, act(2), [FISH]))
    assert (merged.status, merged.balance) == (OrderStatus.COMPLETED, 945)
    assert merged.flags == (LINES_AFTER_CLOSE,)
    assert reopen(merged, act(5)).flags == ()
    assert complete(reopen(merged, act(5)), act(6)).flags == ()


def test_two_facts_with_one_id_are_flagged() -> None:
    order = accepted(SOUP)
    merged = merge(paid(order, 100), paid(order, 200))
    assert merged.flags == (FACTS_DIFFER,)
    assert merged.payments[0].amount == 200
    voids = [voiding(order, quantity=quantity) for quantity in (1, 2)]
    assert merge(*voids).flags == (FACTS_DIFFER,)


def test_a_merge_refuses_two_different_orders() -> None:
    with pytest.raises(ValueError, match="two orders"):
        merge(accepted(SOUP), structs.replace(accepted(SOUP), id=named("other")))


def test_registers_written_on_an_old_base_are_lifted_above_the_head() -> None:
    base = placed(SOUP, FISH)
    head = edit_order(edit_order(base, act(2), guests=2), act(3), notes="window")
    offline = edit_order(edit_line(base, act(2), named("soup"), seat=4), act(2), notes="door")
    assert merge(head, offline).notes == "window"
    merged = merge(head, lifted(offline, 1, 4))
    assert (merged.notes, merged.guests, item(merged, "soup").seat) == ("door", 2, 4)
    assert merged.revs == {"guests": 2, "notes": 4}


def test_an_erasure_empties_the_personal_fields_and_keeps_the_amounts() -> None:
    order = placed(line("soup", 300, special_instructions="for Ada"), customer_name="Ada", notes="Ada's birthday")
    erased = erase(order, later(5))
    assert (erased.customer_name, erased.notes, erased.items[0].special_instructions) == (None, None, None)
    assert (erased.total, erased.erased_at) == (order.total, later(5))
    assert erase(erased, later(6)) is erased
    assert merge(erase(order, later(6)), erased).erased_at == later(5)


# -- told amounts ------------------------------------------------------------------------------------------------


def test_told_amounts_count_until_the_price_changes_here() -> None:
    order = tell(placed(SOUP, FISH), act(2), subtotal=1500, tax_amount=70, total=1570)
    assert (order.tax_amount, order.total, order.flags) == (70, 1570, ())
    assert [one.tax_amount for one in order.items] == [28, 42]
    assert order.taxes[0].tax == 70
    tipped = paid(order, 1600, tip=30)
    assert (tipped.total, tipped.balance) == (1600, 0)
    more = add_lines(order, act(3), [line("beer", 500)])
    assert (more.tax_amount, more.total) == (100, 2100)
    assert voiding(order).total == 945


def test_told_amounts_that_contradict_each_other_are_kept_and_flagged() -> None:
    order = tell(placed(SOUP, FISH), act(2), subtotal=1500, tax_amount=70, total=1234)
    assert (order.total, order.balance, order.flags) == (1234, 1234, (AMOUNTS_DO_NOT_ADD_UP,))
    assert tell(order, act(3), total=1575).flags == ()


def test_a_told_inclusive_tax_is_a_part_of_the_price() -> None:
    order = placed(line("soup", 1070), terms=rates(TaxMode.INCLUSIVE, standard=70_000))
    told = tell(order, act(2), tax_amount=71, total=1070)
    assert (told.items[0].net, told.taxes[0].base, told.tax_amount, told.flags) == (999, 999, 71, ())
    free = placed(line("soup", 1000), terms=Tax())
    assert tell(free, act(2), tax_amount=50, total=1050).items[0].tax_amount == 50


# -- service charge ----------------------------------------------------------------------------------------------


def test_a_service_charge_depends_on_type_and_guests_and_can_be_waived() -> None:
    terms = Terms(tax=Tax(), service_charge=ServiceCharge(bp=1_000, min_guests=6))
    assert placed(SOUP, terms=terms, guests=5).service_amount == 0
    assert placed(SOUP, terms=terms).service_amount == 0
    assert placed(SOUP, terms=terms, guests=6, type=OrderType.TAKEAWAY).service_amount == 0
    order = placed(SOUP, terms=terms, guests=6)
    assert order.service_amount == 60
    waived = set_service(order, act(2), ServiceRate(0, "slow"))
    assert (waived.service_amount, waived.total) == (0, 600)
    assert set_service(waived, act(3), None).service_amount == 60


def test_a_service_charge_with_its_own_category_is_taxed_like_one_more_line() -> None:
    terms = Terms(tax=rates(standard=100_000, service=200_000), service_charge=ServiceCharge(bp=1_000, tax="service"))
    order = placed(SOUP, terms=terms)
    assert (order.service_amount, order.service_tax, order.tax_amount, order.total) == (60, 12, 72, 732)
    assert [(one.rate_ppm, one.tax) for one in order.taxes] == [(100_000, 60), (200_000, 12)]
    inclusive = structs.replace(terms, tax=structs.replace(terms.tax, mode=TaxMode.INCLUSIVE))
    assert placed(SOUP, terms=inclusive).total == 660


def test_a_category_without_rates_is_taxed_as_standard() -> None:
    order = placed(line("soup", 1000, tax_category="unheard"), terms=rates(standard=70_000))
    assert order.tax_amount == 70


def test_a_rate_that_is_no_whole_number_of_basis_points_is_not_shown() -> None:
    assert placed(SOUP, terms=rates(standard=88_750)).tax_basis_points is None
    assert placed(SOUP, terms=rates(standard=70_000)).tax_basis_points == 700


def test_a_closed_order_has_the_kind_author_and_reason_of_its_closing() -> None:
    order = cancel(placed(SOUP), act(2), "gone")
    assert order.closed is not None
    assert (order.closed.as_, order.closed.by, order.closed.reason) == (ClosedAs.CANCELLED, "anna", "gone")
    assert lifecycle.allowed_next(order.status) == ()
    assert b'"as":"cancelled"' in encode(order)


def test_voids_above_the_quantity_are_clamped_and_not_refused() -> None:
    order = placed(SOUP)
    fact = Void(named("a"), later(1), quantity=3)
    soup = structs.replace(order.items[0], voids=(fact, structs.replace(fact, id=named("b"))))
    assert derive(structs.replace(order, items=(soup,))).items[0].quantity == 0


def test_the_time_of_a_payment_does_not_change_the_balance() -> None:
    order = accepted(SOUP)
    future = paid(order, 300, version=2)
    ahead = structs.replace(future.payments[0], created_at=future.created_at + timedelta(days=400))
    assert derive(structs.replace(future, payments=(ahead,))).balance == future.balance


def test_an_erasure_does_not_change_the_winner_of_a_merge() -> None:
    order = accepted(SOUP, structs.replace(FISH, hold=True))
    one = edit_line(order, act(2), named("fish"), special_instructions="for Ada", course=2)
    other = edit_line(order, act(2), named("fish"), special_instructions="for Ben", course=1)
    erased = erase(order, later(9))
    assert merge(merge(erased, one), other) == merge(erased, merge(one, other))
    assert item(merge(erased, merge(one, other)), "fish").course == 2
