"""A new state over the encoded state that it was made from: fields that the Struct does not know are kept."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given
from msgspec import Meta, Struct, structs

from shared.entities.contract import Head, changed_fields, encode
from shared.entities.order import Customization, Order, OrderStatus, StockHold, lines, registers
from shared.entities.order import state as law
from shared.entities.overlay import field_of, old_values, overlay, with_field
from shared.entities.registry import ENTITIES
from shared.rail.draft import Draft, change_of
from shared.rail.head import Standing
from tests.contract.freeze import CREATED, ORDER
from tests.rigs import builders, order_law


def newer(state: Struct) -> bytes:
    """The state as a newer release encodes it: each object at every depth has a field more, which names the object."""

    def extended(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            inner = {name: extended(one, f"{path}.{name}") for name, one in value.items()}
            return {**inner, "newer": f"of {path}"}
        return [extended(one, f"{path}[{n}]") for n, one in enumerate(value)] if isinstance(value, list) else value

    return encode(extended(msgspec.json.decode(encode(state)), "$"))


def kept(encoded: bytes) -> list[str]:
    """The names of the objects that still have the field of the newer release."""

    def found(value: Any) -> Iterator[str]:
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from found(one)
        if isinstance(value, dict) and "newer" in value:
            yield value["newer"].removeprefix("of ")

    return sorted(found(msgspec.json.decode(encoded)))


def decoded(encoded: bytes) -> Order:
    return msgspec.json.decode(encoded, type=Order)


@pytest.mark.parametrize("name", sorted(CREATED))
def test_a_state_without_a_change_stays_as_it_is_in_every_entity(name: str) -> None:
    base = newer(CREATED[name])
    assert msgspec.json.decode(overlay(base, CREATED[name])) == msgspec.json.decode(base)


@pytest.mark.parametrize("name", sorted(ENTITIES))
def test_every_entity_can_keep_its_unknown_fields(name: str) -> None:
    """An entity with a field that the overlay cannot merge, such as a dict, raises TypeError here."""
    assert overlay(encode(CREATED[name]), CREATED[name]) == encode(CREATED[name])


def test_an_unknown_field_is_kept_when_another_field_changes() -> None:
    base = newer(ORDER)
    after = builders.with_status(ORDER, OrderStatus.RECEIVED, notes="no onions")
    merged = overlay(base, after)
    assert decoded(merged) == decoded(encode(after))
    assert kept(merged) == kept(base)


def test_a_known_field_is_cleared() -> None:
    before = builders.order(notes="no onions", table_id=builders.new_id())
    merged = overlay(newer(before), structs.replace(before, notes=None, table_id=None))
    assert (decoded(merged).notes, decoded(merged).table_id) == (None, None)


def test_a_field_that_the_encoding_omits_by_default_is_cleared() -> None:
    hold = StockHold(builders.new_id(), 4, builders.CREATED_AT)
    before = builders.order(items=1, holds=(hold,))
    after = structs.replace(before, holds=(structs.replace(hold, held_at=None),))
    merged = overlay(newer(before), after)
    assert decoded(merged).holds == after.holds
    assert "$.holds[0]" in kept(merged)


def test_a_changed_element_keeps_its_unknown_fields_and_a_removed_one_goes_with_them() -> None:
    first, second, third = (builders.item(customizations=(Customization("spice", "mild"),)) for _ in range(3))
    before = builders.order(items=(first, second, third))
    changed = structs.replace(third, quantity=7, customizations=(Customization("spice", "hot"),))
    merged = overlay(newer(before), structs.replace(before, items=(changed, first)))
    assert kept(merged) == [
        "$",
        "$.items[0]",
        "$.items[0].customizations[0]",
        "$.items[2]",
        "$.items[2].customizations[0]",
    ]
    assert [item.quantity for item in decoded(merged).items] == [7, 1]


def test_of_two_elements_with_one_key_the_unchanged_one_keeps_its_own_fields() -> None:
    dish = builders.new_id()
    first, second = (builders.item(menu_item_id=dish, quantity=n) for n in (1, 2))
    before = builders.order(items=(first, second))
    merged = overlay(newer(before), structs.replace(before, items=(structs.replace(first, quantity=3), second)))
    items = msgspec.json.decode(merged)["items"]
    assert [(item["quantity"], item["newer"]) for item in items] == [(3, "of $.items[0]"), (2, "of $.items[1]")]


def test_a_new_element_gets_no_field_of_another_one() -> None:
    before = builders.order(items=1, payments=(builders.payment(),))
    merged = overlay(newer(before), structs.replace(before, payments=(builders.payment(),)))
    assert kept(merged) == ["$", "$.items[0]"]


def test_a_list_that_was_null_or_missing_is_written() -> None:
    base = encode({**msgspec.json.decode(encode(ORDER)), "payments": None, "newer": 1})
    assert decoded(overlay(base, ORDER)) == decoded(encode(ORDER))
    assert decoded(overlay(b"{}", ORDER)) == decoded(encode(ORDER))


_items = st.lists(
    st.builds(
        builders.item,
        menu_item_id=st.sampled_from([builders.new_id() for _ in range(3)]),
        quantity=st.integers(1, 3),
        customizations=st.lists(st.builds(Customization, st.sampled_from("ab"), st.sampled_from("xy"))).map(tuple),
    ),
    max_size=5,
).map(tuple)
_payments = st.lists(
    st.builds(builders.payment, id=st.sampled_from([builders.new_id() for _ in range(3)]), amount=st.integers(1, 2)),
    max_size=4,
    unique_by=lambda payment: payment.id,
).map(tuple)
_orders = st.builds(
    lambda items, payments, notes: structs.replace(ORDER, items=items, payments=payments, notes=notes),
    _items,
    _payments,
    st.none() | st.just("quick"),
)


@given(_orders, _orders)
def test_the_result_is_exactly_the_new_state_and_repeating_it_changes_nothing(before: Order, after: Order) -> None:
    base = newer(before)
    merged = overlay(base, after)
    assert decoded(merged) == decoded(encode(after))
    assert overlay(merged, after) == merged
    assert overlay(encode(before), after) == encode(after)  # without unknown fields it is the encoding of the state
    paid = {payment.id for payment in before.payments} & {payment.id for payment in after.payments}
    assert len([path for path in kept(merged) if path.startswith("$.payments")]) == len(paid)


def test_old_values_are_those_of_the_base_with_their_unknown_fields() -> None:
    before = builders.order(items=1, notes="quick")
    after = structs.replace(before, notes=None, items=())
    base = newer(before)
    changed = changed_fields(before, after)
    assert msgspec.json.decode(old_values(base, changed, after, overlay(base, after))) == {
        "notes": "quick",
        "items": msgspec.json.decode(base)["items"],
    }
    # A state that was not made from the base lacks its unknown field, so `before` has it.
    assert msgspec.json.decode(old_values(base, {}, before, encode(before))) == {"newer": "of $"}


def test_of_1000_lines_the_old_value_holds_the_one_that_changed() -> None:
    entity = replace(ENTITIES["order"], state=law.Order, partly_before=frozenset({"items"}))
    new = [order_law.line(f"dish {n}", 1_000) for n in range(1_000)]
    placed = order_law.placed(*new[:999])
    base = newer(placed)
    voids, adds, notes = (
        lines.void(placed, order_law.act(2), lines.NewVoid(id=order_law.named("void"), line=new[7].id)),
        lines.add_lines(placed, order_law.act(2), new[999:]),
        registers.edit_order(placed, order_law.act(2), notes="quick"),
    )

    def old(after: law.Order) -> dict[str, Any]:
        on = Standing(Head(1, order_law.named("change")), placed, base)
        made = change_of(
            Draft(entity=entity, event="updated", state=after, base=on, at=after.updated_at, source="orders")
        )
        return msgspec.json.decode(made.data.before)

    (line,) = old(voids)["items"]
    assert line == msgspec.json.decode(base)["items"][7]
    assert old(voids)["subtotal"] == 999_000
    assert old(adds)["items"] == []
    assert "items" not in old(notes)


def test_one_field_is_replaced_and_all_others_stay_as_they_are() -> None:
    base = newer(ORDER)
    replaced = with_field(base, "order_number", b'"A0043"')
    assert field_of(replaced, "order_number") == b'"A0043"'
    assert replaced == base.replace(b'"order_number":"0042"', b'"order_number":"A0043"')
    assert field_of(with_field(base, "newer", None), "notes") == b'"birthday"'
    assert with_field(base, "newer", None) != base


class _WithPlainDict(Struct, omit_defaults=True):
    id: str
    revs: dict[str, int] = {}
    rates: dict[str, dict[str, Annotated[int, Meta(ge=0)]]] = {}


def test_a_dict_of_plain_values_is_as_the_new_state_says() -> None:
    base = b'{"id":"1","revs":{"a":1,"b":2},"rates":{"x":{"y":1}},"newer":3}'
    state = _WithPlainDict("1", {"a": 3}, {"x": {"z": 2}})
    assert overlay(base, state) == b'{"id":"1","revs":{"a":3},"rates":{"x":{"z":2}},"newer":3}'
    assert overlay(base, _WithPlainDict("1")) == b'{"id":"1","newer":3}'


class _WithDict(Struct):
    id: str
    extra: dict[str, Any]


class _WithDictOfStructs(Struct):
    id: str
    inner: dict[str, _WithPlainDict]


class _Tagged(Struct, tag=True):
    id: str


class _WithEither(Struct):
    id: str
    either: int | _Tagged | None = None


@pytest.mark.parametrize("state", [_WithDict("1", {}), _WithDictOfStructs("1", {}), _Tagged("1"), _WithEither("1")])
def test_a_struct_whose_unknown_fields_would_vanish_is_refused(state: Struct) -> None:
    with pytest.raises(TypeError, match="cannot keep"):
        overlay(b"{}", state)
