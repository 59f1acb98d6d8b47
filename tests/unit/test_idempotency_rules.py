"""The ids of repeated requests, and the hash that tells whether a request is a repeat."""

from uuid import UUID

import pytest

from shared.errors import Conflict, InvalidInput
from shared.rail.idempotency import FactId, entity_id, request_hash

CALLER, ROUTE = "restaurant|user|", "POST /api/orders"
GIVEN = UUID("0B9DF4A0-93B2-4C55-9A5E-5F1A6C1D9A11")


def test_id_of_an_entity_is_the_same_for_the_same_caller_route_and_key_alone() -> None:
    first = entity_id(CALLER, ROUTE, "1")
    assert entity_id(CALLER, ROUTE, "1") == first
    others = [entity_id("other", ROUTE, "1"), entity_id(CALLER, "other", "1"), entity_id(CALLER, ROUTE, "2")]
    assert len({first, *others, entity_id(CALLER, ROUTE, None), entity_id(CALLER, ROUTE, None)}) == 6


def test_id_of_a_fact_is_the_one_in_the_body_or_else_derived_from_its_entity_too() -> None:
    given = FactId.of(GIVEN, "order", CALLER, ROUTE, "1")
    assert (given.id, given.repeatable) == (str(GIVEN), True)
    derived = FactId.of(None, "order", CALLER, ROUTE, "1")
    assert derived == FactId.of(None, "order", CALLER, ROUTE, "1")
    others = [FactId.of(None, "other", CALLER, ROUTE, "1"), FactId.of(None, "order", "other", ROUTE, "1")]
    assert derived.repeatable and derived.id not in [one.id for one in others]
    fresh = FactId.of(None, "order", CALLER, ROUTE, None)
    assert not fresh.repeatable and fresh.id != FactId.of(None, "order", CALLER, ROUTE, None).id


def test_other_content_is_the_fault_of_the_id_or_of_the_key() -> None:
    with pytest.raises(Conflict) as refused:
        raise FactId.of(GIVEN, "order", CALLER, ROUTE, "1").reused("payment")
    assert (refused.value.error_code, refused.value.details) == ("payment_id_reused", {"field": "id"})
    with pytest.raises(InvalidInput) as reused:
        raise FactId.of(None, "order", CALLER, ROUTE, "1").reused("payment")
    assert reused.value.error_code == "idempotency_key_reused"


def test_hash_covers_what_was_sent_in_any_order_of_its_fields() -> None:
    sent = request_hash(b'{"items": [{"id": 1, "quantity": 2}], "notes": "caf\\u00e9"}')
    assert request_hash('{"notes":"café","items":[{"quantity":2,"id":1}]}'.encode()) == sent
    for other in (b'{"notes":"caf","items":[{"quantity":2,"id":1}]}', b'{"items":[{"quantity":2,"id":1}]}'):
        assert request_hash(other) != sent
    # The order of a list means something.
    assert request_hash(b'{"items":[1,2]}') != request_hash(b'{"items":[2,1]}')
