"""A change becomes a push event, which the interested subscribers receive."""

import json
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from msgspec import Raw, structs

from services.notifier.cursor import Cursor
from services.notifier.events import EVERY_KIND, KINDS, PushEvent, PushKind, push_event
from services.notifier.interest import Interest, interest_of
from services.notifier.transports.sse import FORM
from shared.entities import order as order_module
from shared.entities.contract import BrokenContract, Change, ChangeData, encode
from shared.entities.order import OrderStatus, StockHold
from shared.errors import Forbidden, InvalidInput
from shared.security.tokens import Identity, Role
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, menu_item, order, with_status

AT = Cursor(7, 0xE, 2)


def pushed(change: Change) -> PushEvent:
    event = push_event(encode(change), AT)
    assert event is not None
    return event


def payload(event: PushEvent, *, of_one_order: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(event.payload(of_one_order=of_one_order))
    return found


@pytest.mark.parametrize(
    ("event", "name"),
    [
        ("created", "order_created"),
        ("deleted", "order_deleted"),
        ("status_changed", "stage_change"),
        ("updated", "status_update"),
        ("restored", "status_update"),
    ],
)
def test_each_order_event_becomes_the_push_event_of_the_same_name(event: str, name: str) -> None:
    made = pushed(change(order(), event=event))
    assert made.name(of_one_order=False) == payload(made)["eventType"] == name


def test_every_event_of_an_order_has_a_push_event() -> None:
    for event in order_module.ENTITY.events:
        assert pushed(change(order(), event=event)).kind in PushKind


def test_the_payload_is_the_whole_state_with_order_id_time_and_version() -> None:
    state = order(notes="no onions", customer_session_id="table-7")
    made = change(state, entityversion=4, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    event = pushed(made)
    expected = json.loads(encode(state))
    del expected["request_hash"]
    assert payload(event) == {
        "eventType": "order_created",
        "data": expected,
        "orderID": state.id,
        "timestamp": json.loads(encode(made.time)),
        "version": 4,
        "changeId": made.id,
        "traceId": "0af7651916cd43dd8448eb211c80319c",
    }
    assert (event.tenant, event.order_id, event.session_id) == (RESTAURANT, state.id, "table-7")
    assert (event.cursor, event.change_id) == (AT, made.id)


def test_a_stage_change_has_both_stages_and_the_event_name_of_the_subscription() -> None:
    before = order(status=OrderStatus.RECEIVED)
    after = with_status(before, OrderStatus.PREPARING)
    event = pushed(change(after, event="status_changed", before=before, base=change(before)))
    every, one = payload(event), payload(event, of_one_order=True)
    assert (every["eventType"], one["eventType"]) == ("stage_change", "order_stage_change")
    assert (every["data"]["previousStage"], every["data"]["newStage"]) == ("received", "preparing")
    assert every["data"]["status"] == "preparing"
    assert {**every, "eventType": ""} == {**one, "eventType": ""}


@pytest.mark.parametrize("before", [b"{}", b"[]", b"7", b'{"notes":null}'])
def test_a_stage_change_without_its_old_stage_is_still_pushed(before: bytes) -> None:
    made = change(order(status=OrderStatus.READY), event="status_changed")
    made = structs.replace(made, data=ChangeData(after=made.data.after, before=Raw(before)))
    data = payload(pushed(made))["data"]
    assert (data["previousStage"], data["newStage"]) == (None, "ready")


def test_only_stage_changes_have_stages() -> None:
    assert "previousStage" not in payload(pushed(change(order())))["data"]


def test_the_request_hash_is_never_pushed() -> None:
    assert b"hash" not in pushed(change(order(request_hash="ab" * 32))).payload(of_one_order=False)


def test_clock_of_terminals_is_never_pushed() -> None:
    made = change(order(notes="late"))
    counted = bytes(made.data.after).replace(b',"notes"', b',"clock":{"till-1":7},"notes"')
    assert b"clock" in counted
    event = pushed(structs.replace(made, data=ChangeData(after=Raw(counted))))
    assert payload(event)["data"] == payload(pushed(made))["data"]


def test_stock_that_an_order_holds_is_pushed_only_to_those_who_may_read_the_stock() -> None:
    held = (StockHold(str(uuid4()), 2),)
    event, without = pushed(change(order(holds=held))), pushed(change(order()))
    seen = {}
    for name, identity in (("staff", STAFF), ("guest", CUSTOMER), ("key", EVENTS_KEY)):
        interest = interest_of(identity, order_id="", event_types=[])
        seen[name] = json.loads(FORM.event(event, interest).split(b"data: ")[1])["data"]
        assert json.loads(FORM.event(without, interest).split(b"data: ")[1])["data"]["holds"] == []
    assert len(seen["staff"]["holds"]) == 1
    assert seen["guest"] == seen["key"] == {**seen["staff"], "holds": []}


def test_unknown_fields_of_a_newer_service_are_pushed() -> None:
    made = change(order())
    state = {**msgspec.json.decode(made.data.after), "spiciness": 3}
    newer = structs.replace(made, data=ChangeData(after=Raw(encode(state))))
    assert payload(pushed(newer))["data"]["spiciness"] == 3


def test_the_data_of_an_event_is_one_line_whatever_white_space_the_change_has() -> None:
    made = change(order(notes="two\nlines\r\n\u2028"))
    state = json.dumps(json.loads(bytes(made.data.after)), indent=2).replace("\n", "\r\n").encode()
    spaced = structs.replace(made, data=ChangeData(after=Raw(state)))
    event = pushed(spaced)
    frame = FORM.event(event, Interest(RESTAURANT))
    assert frame.count(b"\n") == 4 and b"\r" not in frame
    assert frame.startswith(b"id: 7-0000000e-2\nevent: order_created\ndata: {") and frame.endswith(b"}\n\n")
    assert payload(event)["data"]["notes"] == "two\nlines\r\n\u2028"


def test_entities_other_than_orders_are_not_pushed() -> None:
    assert push_event(encode(change(menu_item())), AT) is None


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"restaurantid": OTHER_RESTAURANT}, "wrong_tenant"),
        ({"type": "ticketrail.order.created.v2"}, "unsupported_version"),
        ({"type": "ticketrail.order.eaten.v1"}, "unknown_type"),
        ({"subject": "order/00000000-0000-4000-8000-000000000000"}, "contract_broken"),
    ],
)
def test_a_change_that_breaks_the_contract_is_not_pushed(broken: dict[str, Any], reason: str) -> None:
    with pytest.raises(BrokenContract) as refused:
        push_event(encode(change(order(), **broken)), AT)
    assert refused.value.reason == reason


# -- interests -------------------------------------------------------------------------------------------------------

STAFF = Identity(user_id="u", role=Role.STAFF, restaurant_id=RESTAURANT)
CUSTOMER = Identity(user_id="c", role=Role.CUSTOMER, restaurant_id=RESTAURANT, session_id="table-7")
EVENTS_KEY = Identity(user_id="k", role=Role.STAFF, restaurant_id=RESTAURANT, scopes=frozenset({"events:read"}))


def test_an_interest_without_parameters_covers_the_whole_tenant() -> None:
    assert interest_of(STAFF, order_id="", event_types=[]) == Interest(RESTAURANT)
    assert interest_of(STAFF, order_id="", event_types="") == Interest(RESTAURANT)


def test_only_a_customer_is_limited_to_its_session() -> None:
    event = pushed(change(order(customer_session_id="table-7")))
    other = pushed(change(order(customer_session_id="table-8")))
    none = pushed(change(order()))
    customer = interest_of(CUSTOMER, order_id="", event_types=[])
    assert [customer.wants(one) for one in (event, other, none)] == [True, False, False]
    staff = interest_of(structs.replace(STAFF, session_id="table-7"), order_id="", event_types=[])
    assert all(staff.wants(one) for one in (event, other, none))


def test_an_order_id_is_compared_in_its_canonical_form() -> None:
    state = order()
    interest = interest_of(STAFF, order_id=state.id.upper(), event_types=[])
    assert interest.wants(pushed(change(state)))
    assert not interest.wants(pushed(change(order())))


@pytest.mark.parametrize("name", KINDS)
def test_each_event_type_can_be_requested_alone(name: str) -> None:
    assert interest_of(STAFF, order_id="", event_types=[name]).kinds == KINDS[name]


def test_all_event_types_together_are_every_kind() -> None:
    assert interest_of(STAFF, order_id="", event_types=[" , ".join(KINDS)]).kinds == EVERY_KIND
    assert interest_of(STAFF, order_id="", event_types=list(KINDS)).kinds == EVERY_KIND
    assert interest_of(STAFF, order_id="", event_types=["", ""]).kinds == EVERY_KIND


@pytest.mark.parametrize(
    ("order_id", "event_types", "field"),
    [("7", [], "orderID"), ("", ["dessert"], "eventTypes"), ("", ["order_created,"], "eventTypes")],
)
def test_an_invalid_filter_is_refused_with_the_name_of_its_field(
    order_id: str, event_types: list[str], field: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        interest_of(STAFF, order_id=order_id, event_types=event_types)
    assert refused.value.details["field"] == field


def test_an_identity_without_a_restaurant_gets_no_stream() -> None:
    with pytest.raises(Forbidden):
        interest_of(Identity(user_id="o", role=Role.OPERATOR), order_id="", event_types=[])
