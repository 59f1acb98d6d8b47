"""External orders: how an order of another system becomes or updates our order. The rules alone, without a store."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from services.sync.imports.external_orders import ExternalOrder, event_of, lane_of_external, merged, new_order, order_id
from shared.entities.contract import Lane
from shared.entities.order import Order, OrderStatus, PaymentStatus
from shared.errors import Conflict, InvalidInput, TicketrailError
from shared.restaurants import Restaurant
from tests.rigs.builders import CREATED_AT, RESTAURANT, order

SHOP = Restaurant(id=RESTAURANT, slug="r", name="R", tax_basis_points=700, time_zone="Europe/Berlin")
NOW = CREATED_AT + timedelta(minutes=30)
MINUTE = timedelta(minutes=1)


def sent(**fields: Any) -> ExternalOrder:
    body = {
        "restaurant_id": RESTAURANT,
        "external_id": "pos-1",
        "items": [{"name": "Margherita", "quantity": 2, "unit_price": 980}],
        **fields,
    }
    return msgspec.json.decode(msgspec.json.encode(body), type=ExternalOrder)


def known(**fields: Any) -> Order:
    return new_order(sent(**fields), SHOP, CREATED_AT)


def after(before: Order, *, at: datetime = NOW, **fields: Any) -> Order | None:
    update = sent(**fields)
    return merged(before, new_order(update, SHOP, at), dated=update.updated_at is not None, at=at)


def paid(name: str, amount: int, **fields: Any) -> dict[str, Any]:
    return {"id": name, "amount": amount, "method": "card", **fields}


def test_left_out_amounts_are_computed() -> None:
    made = known(tip_amount=100, discount_amount=60, payments=[paid("a", 500)])
    assert (made.subtotal, made.tax_amount, made.total) == (1960, 137, 1960 + 137 + 100 - 60)
    assert made.payment_status is PaymentStatus.PARTIALLY_PAID
    assert (made.external_id, made.order_number, made.currency) == ("pos-1", "", "EUR")
    assert made.created_at == made.updated_at == CREATED_AT


def test_the_prices_names_and_numbers_of_the_other_system_are_kept() -> None:
    made = known(tax_amount=1, total=5, order_number="B-17", items=[{"name": "Öl", "quantity": 3, "unit_price": 7}])
    assert (made.tax_amount, made.total, made.order_number) == (1, 5, "B-17")
    assert (made.items[0].name, made.items[0].line_total) == ("Öl", 21)


def test_the_business_day_follows_the_restaurants_time_zone() -> None:
    at_night = datetime(2026, 7, 2, 1, 30, tzinfo=UTC)  # 3:30 in Berlin: still yesterday
    assert known(created_at=at_night).business_day.isoformat() == "2026-07-01"


def test_either_external_id_names_the_same_order_within_one_restaurant() -> None:
    ids = {
        known(external_id="x").id,
        known(external_id=None, convex_id="x").id,
        known(external_id="x", convex_id="x").id,
    }
    assert ids == {order_id(RESTAURANT, "x")}
    assert order_id("22222222-2222-4222-8222-222222222222", "x") not in ids


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"external_id": None}, "external_id"),
        ({"convex_id": "other"}, "convex_id"),
        ({"created_at": "1800-01-01T00:00:00Z"}, "created_at"),
        ({"updated_at": "9999-12-31T23:59:59Z"}, "updated_at"),
        ({"payments": [paid("a", 1), paid("b", 1, created_at="0001-01-01T00:00:00Z")]}, "payments[1].created_at"),
        ({"payments": [paid("a", 1), paid("b", 1), paid("a", 1)]}, "payments[2].id"),
        ({"items": [{"name": "x", "quantity": 1000, "unit_price": 10**9}] * 2}, "items"),
    ],
    ids=str,
)
def test_an_invalid_order_is_refused_with_the_name_of_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        known(**fields)
    assert refused.value.details["field"] == field


def test_a_repeated_order_changes_nothing() -> None:
    for fields in (
        {},
        {"created_at": CREATED_AT},
        {"created_at": CREATED_AT, "updated_at": CREATED_AT + MINUTE},
        {"payments": [paid("a", 500)], "status": "completed"},
    ):
        assert after(known(**fields), **fields) is None, fields


def test_a_later_update_is_applied_and_keeps_our_own_fields() -> None:
    before = msgspec.structs.replace(known(), order_number="0042", placed_by="someone", customer_session_id="s")
    made = after(before, status="ready", notes="no salt")
    assert made is not None
    assert (made.status, made.notes, made.updated_at) == (OrderStatus.READY, "no salt", NOW)
    assert (made.id, made.order_number, made.placed_by, made.customer_session_id, made.created_at) == (
        before.id,
        "0042",
        "someone",
        "s",
        CREATED_AT,
    )


def test_an_older_update_that_arrives_late_is_ignored() -> None:
    before = known(created_at=CREATED_AT, updated_at=CREATED_AT + 2 * MINUTE, status="ready")
    assert after(before, created_at=CREATED_AT, updated_at=CREATED_AT + MINUTE, status="preparing") is None


def test_payments_of_an_older_update_that_arrives_late_are_kept() -> None:
    before = known(
        created_at=CREATED_AT, updated_at=CREATED_AT + 2 * MINUTE, status="ready", payments=[paid("b", 1000)]
    )
    late: dict[str, Any] = {"created_at": CREATED_AT, "updated_at": CREATED_AT + MINUTE, "payments": [paid("a", 1097)]}
    made = after(before, status="preparing", **late)
    assert made is not None
    assert (made.status, made.updated_at) == (OrderStatus.READY, before.updated_at)
    assert sorted(one.amount for one in made.payments) == [1000, 1097]
    assert made.payment_status is PaymentStatus.PAID
    assert after(made, status="preparing", **late) is None


def test_updates_give_the_same_order_in_any_sequence() -> None:
    """This also holds if the last update looks like the first one."""
    updates: list[dict[str, Any]] = [
        {"created_at": CREATED_AT, "updated_at": CREATED_AT + place * MINUTE, "status": status}
        for place, status in enumerate(("ready", "preparing", "ready"))
    ]
    for first, second, third in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        head = known(**updates[first])
        for place in (second, third):
            head = after(head, **updates[place]) or head
        assert (head.status, head.updated_at) == (OrderStatus.READY, CREATED_AT + 2 * MINUTE)


def test_an_update_without_a_time_never_moves_the_status_back() -> None:
    """The update may have been sent before our own staff moved the order on."""
    before = msgspec.structs.replace(known(), status=OrderStatus.PREPARING)
    assert after(before, status="pending") is None
    assert after(before, status="ready") is not None
    back = after(before, status="received", updated_at=NOW)
    assert back is not None
    assert back.status is OrderStatus.RECEIVED


def test_payments_are_added_and_never_removed() -> None:
    before = known(payments=[paid("a", 500)])
    made = after(before, payments=[paid("b", 1597)])
    assert made is not None
    assert [one.amount for one in made.payments] == [500, 1597]
    assert made.payment_status is PaymentStatus.PAID
    assert after(made, payments=[]) is None


@pytest.mark.parametrize(
    ("payments", "field", "code"),
    [
        ([paid("a", 501)], "payments[0].id", "payment_id_reused"),
        ([paid("z", 1), paid("a", 500, method="cash")], "payments[1].id", "payment_id_reused"),
        ([paid(f"n{i}", 1) for i in range(1000)], "payments", "too_many_payments"),
    ],
    ids=["amount", "method", "many"],
)
def test_a_payment_that_contradicts_a_known_one_is_refused(
    payments: list[dict[str, Any]], field: str, code: str
) -> None:
    with pytest.raises(TicketrailError) as refused:
        after(known(payments=[paid("a", 500)]), payments=payments)
    assert isinstance(refused.value, Conflict)
    assert (refused.value.details["field"], refused.value.error_code) == (field, code)


def test_a_deleted_order_stays_deleted() -> None:
    before = msgspec.structs.replace(known(), deleted_at=NOW)
    made = after(before, notes="x")
    assert made is not None
    assert made.deleted_at == NOW


def test_the_event_of_an_update_names_its_kind_of_change() -> None:
    before = known(status="ready")

    def event(**fields: Any) -> str:
        made = after(before, **fields)
        assert made is not None
        return event_of(before, made)

    assert event_of(None, before) == "created"
    assert event(status="completed", payments=[paid("a", 1)]) == "status_changed"
    assert event(status="ready", payments=[paid("a", 1)]) == "payment_recorded"
    assert event(status="ready", payments=[paid("a", 1)], notes="x") == "updated"
    assert event(status="ready", notes="x") == "updated"


DAYS = timedelta(days=1)


@pytest.mark.parametrize(
    ("fields", "before", "lane"),
    [
        ({}, None, Lane.CRITICAL),
        ({"status": "completed"}, None, Lane.BACKGROUND),
        ({"created_at": NOW - MINUTE}, None, Lane.CRITICAL),
        ({"created_at": NOW - MINUTE, "status": "completed"}, None, Lane.CRITICAL),
        ({"created_at": NOW - 2 * DAYS}, None, Lane.BACKGROUND),
        ({"created_at": NOW - 2 * DAYS, "status": "cancelled"}, None, Lane.BACKGROUND),
        ({"created_at": NOW - 2 * DAYS, "updated_at": NOW - MINUTE}, None, Lane.CRITICAL),
        ({"status": "completed"}, NOW - MINUTE, Lane.CRITICAL),
        ({"status": "completed"}, NOW - 2 * DAYS, Lane.BACKGROUND),
        ({"status": "cancelled", "created_at": NOW + DAYS}, None, Lane.CRITICAL),
    ],
    ids=[
        "open, no time",
        "closed, no time",
        "open today",
        "closed today",
        "open, days ago",
        "closed, days ago",
        "old, changed today",
        "known since today, now closed",
        "known for days, now closed",
        "from a clock that is ahead",
    ],
)
def test_recent_orders_use_the_critical_lane_and_history_the_background_lane(
    fields: dict[str, Any], before: datetime | None, lane: Lane
) -> None:
    update = sent(**fields)
    head = None if before is None else order(created_at=before, updated_at=before)
    assert lane_of_external(update, head, new_order(update, SHOP, NOW), NOW) is lane
