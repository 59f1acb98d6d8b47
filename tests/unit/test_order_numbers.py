"""The order number that a claim gives is written into the change, and the rest of the change stays the same."""

import msgspec
import pytest
from msgspec import Raw, structs

from shared.entities.contract import Change, ChangeData, encode
from shared.entities.registry import ENTITIES
from shared.rail.order_numbers import with_number, with_number_in_event
from tests.rigs import builders

ORDER = ENTITIES["order"]


def made() -> Change:
    return builders.change(builders.order(items=2, order_number="", notes='"order_number":""'))


def newer(change: Change) -> bytes:
    """Returns the event as a newer release encodes it, with additional fields at every depth."""
    after = encode({"order_number_of_till": "", **msgspec.json.decode(change.data.after), "fiscal_id": "DE-4711"})
    change = structs.replace(change, data=ChangeData(after=Raw(after), before=change.data.before))
    event = msgspec.json.decode(encode(change))
    return encode({**event, "data": {**event["data"], "reason": "late"}, "tracestate": "x=1"})


def test_the_number_is_the_only_difference_also_in_a_change_of_a_newer_release() -> None:
    event = newer(made())
    numbered = with_number_in_event(ORDER, event, "A0043")
    assert numbered == event.replace(b'"order_number":"",', b'"order_number":"A0043",')
    assert with_number_in_event(ORDER, event, "") == event


def test_the_owner_of_a_claim_and_the_claim_finisher_record_the_same_bytes() -> None:
    change = made()
    state = ORDER.decode(change)
    numbered, state = with_number(ORDER, change, state, "0043")
    assert encode(numbered) == with_number_in_event(ORDER, encode(change), "0043")
    assert ORDER.decode(numbered) == state and state.order_number == "0043"
    assert numbered.id == change.id


@pytest.mark.parametrize("number", ["", "0043"])
def test_an_entity_without_numbers_stays_unchanged(number: str) -> None:
    change = builders.change(builders.menu_item())
    assert with_number_in_event(ENTITIES["menu_item"], encode(change), number) == encode(change)
