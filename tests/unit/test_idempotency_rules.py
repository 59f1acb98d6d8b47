"""The ids of repeated requests, and the hash that tells whether a request is a repeat."""

from datetime import UTC, datetime
from uuid import UUID

import pytest

from shared.entities.order import Payment
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


def fact(id_: FactId) -> Payment:
    return Payment(id=id_.id, amount=1, method="card", created_at=datetime.now(UTC), request_key=id_.request_key)


BOTH = FactId.of(GIVEN, "order", CALLER, ROUTE, "1")
KEY_ALONE = FactId.of(None, "order", CALLER, ROUTE, "1")
ID_ALONE = FactId.of(GIVEN, "order", CALLER, ROUTE, None)
OTHER_ID = FactId.of(UUID(int=7), "order", CALLER, ROUTE, "1")
OTHER_KEY = FactId.of(GIVEN, "order", CALLER, ROUTE, "2")


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (BOTH, BOTH, "repeat"),
        (BOTH, OTHER_ID, "key"),
        (BOTH, KEY_ALONE, "key"),
        (BOTH, ID_ALONE, "repeat"),
        (BOTH, OTHER_KEY, "repeat"),
        (KEY_ALONE, KEY_ALONE, "repeat"),
        (KEY_ALONE, BOTH, "key"),
        (ID_ALONE, ID_ALONE, "repeat"),
        (ID_ALONE, BOTH, "repeat"),
        (ID_ALONE, OTHER_ID, "new"),
    ],
)
def test_key_decides_before_the_id(first: FactId, second: FactId, outcome: str) -> None:
    earlier = second.earlier([fact(FactId.of(None, "order", CALLER, ROUTE, None)), fact(first)])
    assert (earlier is None) == (outcome == "new")
    if earlier is not None and outcome == "key":
        with pytest.raises(InvalidInput):
            second.check_repeat(earlier, "payment", same=True)
    elif earlier is not None:
        second.check_repeat(earlier, "payment", same=True)


def test_other_content_is_reported_for_the_key_or_without_a_key_for_the_id() -> None:
    for id_ in (BOTH, KEY_ALONE):
        with pytest.raises(InvalidInput) as reused:
            id_.check_repeat(fact(id_), "payment", same=False)
        assert reused.value.error_code == "idempotency_key_reused"
    with pytest.raises(Conflict) as refused:
        ID_ALONE.check_repeat(fact(ID_ALONE), "payment", same=False)
    assert (refused.value.error_code, refused.value.details) == ("payment_id_reused", {"field": "id"})


@pytest.mark.parametrize("two", ["2.0", "2e0", "0.2E1", "200e-2"])
def test_hash_of_a_whole_number_is_the_same_in_every_spelling(two: str) -> None:
    def hashed(number: str) -> str:
        return request_hash(f'{{"items":[{{"quantity":{number},"note":"2.0"}}]}}'.encode())

    assert hashed(two) == hashed("2")
    assert hashed(two) not in [hashed(other) for other in ("2.5", '"2"', '"2.0"', "2e1", "2e999")]


def test_hash_covers_the_sent_fields_in_any_order() -> None:
    sent = request_hash(b'{"items": [{"id": 1, "quantity": 2}], "notes": "caf\\u00e9"}')
    assert request_hash('{"notes":"café","items":[{"quantity":2,"id":1}]}'.encode()) == sent
    for other in (b'{"notes":"caf","items":[{"quantity":2,"id":1}]}', b'{"items":[{"quantity":2,"id":1}]}'):
        assert request_hash(other) != sent
    # The order of a list means something.
    assert request_hash(b'{"items":[1,2]}') != request_hash(b'{"items":[2,1]}')
