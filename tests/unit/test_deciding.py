"""What stands after the other side of a conflict was chosen."""

from typing import Any

import msgspec
import pytest
from msgspec import structs

from services.sync.conflicts import with_the_other
from shared.entities import order as orders
from shared.entities.contract import encode
from shared.entities.order import Order, PaymentStatus
from shared.errors import Conflict
from tests.builders import order, payment

BASE = order(notes="as it was", customer_name="Ada")


def plain(state: Order) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(encode(state))
    return found


def chosen(now_stands: Order, stood: Order, other: Order) -> Order:
    found: Order = with_the_other(orders.ENTITY, now_stands, plain(stood), plain(other))
    return found


def test_what_differs_comes_from_the_other_side_and_the_rest_stays() -> None:
    stood, other = structs.replace(BASE, notes="one"), structs.replace(BASE, notes="two", special_instructions="hot")
    after = chosen(structs.replace(stood, customer_name="Grace"), stood, other)
    assert (after.notes, after.special_instructions, after.customer_name) == ("two", "hot", "Grace")


def test_a_field_that_the_other_side_lacks_is_gone() -> None:
    stood = structs.replace(BASE, notes="one")
    assert chosen(stood, stood, structs.replace(BASE, notes=None)).notes is None


def test_payments_stay_and_what_they_make_of_a_total_is_reckoned_anew() -> None:
    stood = structs.replace(BASE, total=1_000, payments=(payment(amount=1_000),), payment_status=PaymentStatus.PAID)
    other = structs.replace(BASE, total=1_500, payments=(payment(amount=300),))
    standing = structs.replace(stood, payments=(*stood.payments, *other.payments))
    after = chosen(standing, stood, other)
    assert (after.total, after.payments) == (1_500, standing.payments)
    assert after.payment_status is PaymentStatus.PARTIALLY_PAID


def test_a_third_value_is_named_and_one_that_the_other_has_already_is_none() -> None:
    stood, other = structs.replace(BASE, notes="one", total=1), structs.replace(BASE, notes="two", total=2)
    with pytest.raises(Conflict) as refused:
        chosen(structs.replace(stood, notes="three", total=2), stood, other)
    assert (refused.value.error_code, refused.value.details["fields"]) == ("changed_since", ["notes"])
    settled = structs.replace(stood, notes="two", total=2)
    assert chosen(settled, stood, other) == settled


def test_when_each_side_was_written_does_not_matter() -> None:
    stood, other = BASE, structs.replace(BASE, updated_at=BASE.updated_at.replace(year=2025))
    assert chosen(BASE, stood, other) == BASE
