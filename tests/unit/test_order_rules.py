"""Status, business day, cursors and filters of orders: pure rules."""

import itertools
from datetime import UTC, date, datetime
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar.datastructures import MultiDict

from services.orders.requests import OrdersQuery
from services.orders.views import state_view
from shared.entities.contract import Head, encode
from shared.entities.order import OrderStatus, allowed_next, items_may_change
from shared.entities.selection import Selection
from shared.errors import InvalidInput
from shared.http.cursors import cursor_after, read_cursor
from shared.http.endpoint import read_query
from shared.restaurants import Restaurant
from tests.rigs.builders import RESTAURANT, order


def test_an_order_moves_forward_step_by_step_and_can_be_cancelled_until_it_is_completed() -> None:
    steps = [OrderStatus.PENDING, OrderStatus.RECEIVED, OrderStatus.PREPARING, OrderStatus.READY, OrderStatus.COMPLETED]
    for now, then in itertools.pairwise(steps):
        assert allowed_next(now) == (then, OrderStatus.CANCELLED)
    assert allowed_next(OrderStatus.COMPLETED) == allowed_next(OrderStatus.CANCELLED) == ()


def test_items_cannot_change_once_the_kitchen_has_started() -> None:
    assert [status for status in OrderStatus if items_may_change(status)] == [OrderStatus.PENDING, OrderStatus.RECEIVED]


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (datetime(2026, 7, 2, 1, 59, tzinfo=UTC), date(2026, 7, 1)),  # 03:59 in Berlin: before the cutoff hour
        (datetime(2026, 7, 2, 2, 0, tzinfo=UTC), date(2026, 7, 2)),  # 04:00 in Berlin: the cutoff hour
        (datetime(2026, 1, 2, 2, 59, tzinfo=UTC), date(2026, 1, 1)),  # 03:59 in Berlin in winter
        (datetime(2026, 1, 2, 3, 0, tzinfo=UTC), date(2026, 1, 2)),
    ],
)
def test_the_business_day_ends_at_the_cutoff_hour_in_the_restaurants_time_zone(at: datetime, expected: date) -> None:
    berlin = Restaurant(id=RESTAURANT, slug="s", name="n", time_zone="Europe/Berlin")
    assert berlin.business_day(at) == expected


@given(
    st.datetimes(
        min_value=datetime(1971, 1, 1),
        max_value=datetime(2199, 12, 30),
        timezones=st.just(UTC),
    ),
    st.uuids(),
)
def test_a_cursor_holds_time_and_id_of_its_order(at: datetime, id_: object) -> None:
    assert read_cursor(cursor_after(at, str(id_))) == (at, str(id_))


@given(st.text())
def test_an_invalid_cursor_is_refused_with_the_name_of_its_field(text: str) -> None:
    try:
        read_cursor(text)
    except InvalidInput as error:
        assert error.details["field"] == "cursor"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "201"}, "limit"),
        ({"limit": "9" * 50}, "limit"),
        ({"limit": "000000001" + "9" * 30}, "limit"),
        ({"limit": "٣"}, "limit"),
        ({"status": "eaten"}, "status"),
        ({"created_from": "yesterday"}, "created_from"),
        ({"created_to": "2026-01-01T00:00:00"}, "created_to"),
        ({"table_id": "7"}, "table_id"),
        ({"page": "2"}, "page"),
    ],
)
def test_an_invalid_parameter_is_refused_by_name(query: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_query(SimpleNamespace(query_params=MultiDict(query)), OrdersQuery)
    assert refused.value.details["field"] == field


def test_a_selection_matches_only_the_orders_that_the_list_asks_for() -> None:
    mine = order(customer_session_id="s1", status=OrderStatus.READY)
    assert Selection(equal={"customer_session_id": "s1", "status": OrderStatus.READY}).match(mine)
    assert not Selection(equal={"customer_session_id": "s2"}).match(mine)
    assert not Selection(among={"status": ("pending", "received")}).match(mine)
    assert not Selection(before=(mine.created_at, mine.id)).match(mine)
    assert not Selection().match(order(deleted_at=mine.created_at))
    assert Selection(include_deleted=True).match(order(deleted_at=mine.created_at))


@pytest.mark.parametrize("clock", ["{}", '{"till-1":7}', '{"till-1":7,"}\\"{\\\\":12}'])
def test_the_view_hides_the_clock_of_terminals_and_the_request_key(clock: str) -> None:
    state = '{"id":"one","payments":[{"id":"two","request_key":"2"}]%s,"notes":"\\",\\"clock\\":{}"}'
    view = bytes(state_view((state % f',"clock":{clock}').encode(), Head(3, "c"), {}))
    shown = state.replace(',"request_key":"2"', "") % ""
    assert msgspec.json.decode(view) == {**msgspec.json.decode(shown), "version": 3, "sync": {}}


def test_the_view_hides_only_the_request_hash() -> None:
    tricky = order(notes='","request_hash":"abc"', request_hash="ab" * 32)
    view = bytes(state_view(encode(tricky), Head(3, "c"), {"state": "pending"}))
    assert b"ab" * 32 not in view
    assert b'\\"request_hash\\":\\"abc' in view
    assert view.endswith(b'"version":3,"sync":{"state":"pending"}}')
