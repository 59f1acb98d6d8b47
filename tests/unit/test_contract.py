"""Changes that the contract accepts or refuses, and the reasons by which dead letters are grouped."""

import contextlib
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from msgspec import Raw, structs

from shared.entities import registry
from shared.entities.change_id import change_id
from shared.entities.contract import (
    MAX_EVENT_BYTES,
    BrokenContract,
    Change,
    ChangeData,
    changed_fields,
    decode_change,
    encode,
    encode_batch,
    split_batch,
)
from shared.entities.entity import event_of
from shared.entities.order import OrderStatus
from tests.rigs import builders


def edited_event(**attributes: Any) -> bytes:
    """An order's creation with other attributes on the wire; None removes an attribute."""
    event = json.loads(encode(builders.change(builders.order(items=1))))
    return json.dumps({name: value for name, value in {**event, **attributes}.items() if value is not None}).encode()


def with_state(**fields: Any) -> bytes:
    """An order's creation whose state has other fields on the wire."""
    event = json.loads(encode(builders.change(builders.order(items=1))))
    event["data"]["after"].update(fields)
    return json.dumps(event).encode()


def reason(event: bytes) -> str:
    with pytest.raises(BrokenContract) as broken:
        registry.read(decode_change(event))
    return broken.value.reason


def test_a_change_too_large_for_the_broker_is_refused() -> None:
    assert reason(edited_event(data={"after": {}, "before": {"x": "y" * MAX_EVENT_BYTES}})) == "too_large"


def test_a_change_is_read_back_as_it_was_written() -> None:
    order = builders.order(payments=(builders.payment(),), notes="no onions ø 🍽")
    change = builders.change(order)
    again = decode_change(encode(change))
    assert encode(again) == encode(change)
    assert registry.read(again) == (registry.ENTITIES["order"], order)


def test_unknown_attributes_and_fields_of_a_newer_producer_are_ignored() -> None:
    assert registry.read(decode_change(edited_event(newattribute="x")))
    assert registry.read(decode_change(with_state(new_field={"deep": [1]})))


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (b"", "undecodable"),
        (b"{", "undecodable"),
        (b'"text"', "contract_broken"),
        (b'{"id": "\xff"}', "undecodable"),
        (edited_event(type="ticketrail.order.created.v2"), "unsupported_version"),
        (edited_event(type="ticketrail.order.exploded.v1"), "unknown_type"),
        (
            edited_event(type="ticketrail.spaceship.created.v1", subject=f"spaceship/{builders.new_id()}"),
            "unknown_type",
        ),
        (edited_event(type="ticketrail.table.created.v1"), "unknown_type"),
        (edited_event(type="other.order.created.v1"), "unknown_type"),
        (edited_event(type="order"), "unknown_type"),
        (edited_event(restaurantid=builders.OTHER_RESTAURANT), "wrong_tenant"),
        (edited_event(subject=f"order/{builders.new_id()}"), "contract_broken"),
        (edited_event(id="A" * 8 + "-0000-4000-8000-000000000000"), "contract_broken"),
        (edited_event(id="not an id"), "contract_broken"),
        (edited_event(restaurantid=builders.RESTAURANT.replace("1", "A")), "contract_broken"),
        (edited_event(restaurantid=None), "missing_tenant"),
        (edited_event(specversion="0.3"), "unsupported_specversion"),
        (edited_event(basechangeid="none"), "contract_broken"),
        (edited_event(time="2026-03-14T12:00:00"), "contract_broken"),
        (edited_event(time="yesterday"), "contract_broken"),
        (edited_event(time="9999-12-31T23:59:59Z"), "contract_broken"),
        (edited_event(entityversion=0), "contract_broken"),
        (edited_event(entityversion=2**31), "contract_broken"),
        (edited_event(entityversion="1"), "contract_broken"),
        (edited_event(entityversion=None), "contract_broken"),
        (edited_event(priority=0), "contract_broken"),
        (edited_event(priority=11), "contract_broken"),
        (edited_event(data=None), "contract_broken"),
        (edited_event(data={"before": {}}), "contract_broken"),
        (with_state(id=builders.new_id().upper()), "contract_broken"),
        (with_state(notes="nul\0"), "contract_broken"),
        (with_state(order_number="4\0"), "contract_broken"),
        (with_state(status="eaten"), "contract_broken"),
        (with_state(total=1.5), "contract_broken"),
        (with_state(total=-1), "negative_amount"),
        (with_state(total=10**13), "contract_broken"),
        (with_state(created_at="2026-03-14T12:00:00"), "contract_broken"),
        (with_state(created_at="0001-01-01T00:00:00+14:00"), "contract_broken"),
        (with_state(currency="eur"), "contract_broken"),
        (with_state(items=[{}]), "contract_broken"),
    ],
)
def test_an_event_that_breaks_the_contract_is_refused_with_its_reason(event: bytes, expected: str) -> None:
    assert reason(event) == expected


def test_a_nul_in_an_unknown_field_is_refused() -> None:
    assert reason(with_state(new_field="\0")) == "contract_broken"
    # An escaped backslash before the letters is text, not a NUL.
    assert registry.read(decode_change(with_state(notes="C:\\u0000")))


def test_half_a_surrogate_pair_is_refused() -> None:
    event = encode(builders.change(builders.order(items=1, notes="HERE"))).replace(b"HERE", rb"\ud800")
    assert reason(event) in ("undecodable", "contract_broken")


@pytest.mark.parametrize("body", [b"", b"{}", b"[", b"[1, ", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_not_a_batch_is_undecodable(body: bytes) -> None:
    with pytest.raises(BrokenContract) as broken:
        split_batch(body)
    assert broken.value.reason == "undecodable"


def test_a_poison_event_does_not_affect_other_events_of_its_batch() -> None:
    good = [encode(builders.change(builders.order(items=0))) for _ in range(3)]
    events = split_batch(encode_batch([good[0], b'{"id": 7}', good[1], b"null", good[2]]))
    assert [events[0], events[2], events[4]] == good
    assert reason(events[1]) == reason(events[3]) == "contract_broken"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_broken_contract(body: bytes) -> None:
    for read in (decode_change, split_batch, lambda event: registry.read(decode_change(event))):
        with contextlib.suppress(BrokenContract):
            read(body)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)))
def test_a_state_of_arbitrary_shape_raises_only_broken_contract(shape: Any) -> None:
    change = builders.change(builders.order(items=0))
    strange = structs.replace(change, data=ChangeData(after=Raw(encode(shape))))
    with pytest.raises(BrokenContract):
        registry.read(decode_change(encode(strange)))


def test_a_repeated_change_has_the_same_id_and_any_difference_gives_another_id() -> None:
    entity = builders.new_id()
    assert change_id(entity, 1, b"content") == change_id(entity, 1, b"content")
    others = {
        change_id(entity, 2, b"content"),
        change_id(entity, 1, b"other"),
        change_id(builders.new_id(), 1, b"content"),
    }
    assert len(others | {change_id(entity, 1, b"content")}) == 4


def test_before_holds_only_the_old_values_of_changed_fields() -> None:
    before = builders.order(items=1)
    after = builders.with_status(before, OrderStatus.RECEIVED, notes="hurry")
    assert changed_fields(before, after) == {"status": "pending", "notes": None}
    assert changed_fields(None, after) == {}


@pytest.mark.parametrize("type_", ["", "ticketrail", "ticketrail.order.created", "ticketrail.order.created.v1.x"])
def test_a_type_of_another_form_is_unknown(type_: str) -> None:
    with pytest.raises(BrokenContract) as broken:
        event_of(type_)
    assert broken.value.reason == "unknown_type"


def test_an_unknown_event_of_an_entity_is_refused() -> None:
    with pytest.raises(ValueError, match="no event"):
        registry.ENTITIES["order"].type("exploded")


def test_the_head_of_a_change_is_its_version_and_change_id() -> None:
    change: Change = builders.change(builders.order(items=0), entityversion=7)
    assert (change.head.version, change.head.change_id) == (7, change.id)
    assert change.subject == f"order/{change.entity_id}"
