"""The full sync names the difference between a state in PostgreSQL and a document of the mirror."""

from datetime import timedelta
from uuid import UUID

import pytest
from msgspec import structs

from services.sync.mirror.full_sync import difference
from shared.entities.contract import Head, encode, now
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import OrderStatus
from shared.mirror.mirror import Document
from shared.postgres.states import StoredState
from tests.rigs import builders

WINDOW = timedelta(days=3)
CHANGE_IDS = [str(UUID(int=n)) for n in range(3)]


@pytest.mark.parametrize(
    ("age", "status", "named"),
    [
        (WINDOW + timedelta(seconds=1), OrderStatus.COMPLETED, ""),
        (WINDOW - timedelta(minutes=1), OrderStatus.COMPLETED, "missing"),
        (WINDOW + timedelta(days=9), OrderStatus.READY, "missing"),
    ],
    ids=["closed outside the window", "closed inside the window", "open outside the window"],
)
def test_only_an_order_that_the_window_needs_is_missing(age: timedelta, status: OrderStatus, named: str) -> None:
    """The reconciler may trim an order during the comparison."""
    at = now() - age
    stored = StoredState(Head(1, CHANGE_IDS[1]), encode(builders.order(updated_at=at, status=status)), at)
    assert difference(ORDER, stored, None, window=WINDOW) == named


@pytest.mark.parametrize(
    ("head", "notes", "named"),
    [
        (Head(2, CHANGE_IDS[1]), "a", ""),
        (Head(2, CHANGE_IDS[1]), "b", "differs"),
        (Head(1, CHANGE_IDS[2]), "b", "behind"),
        (Head(2, CHANGE_IDS[0]), "b", "behind"),
        (Head(2, CHANGE_IDS[2]), "b", None),
        (Head(3, CHANGE_IDS[0]), "b", None),
    ],
    ids=["same", "same change", "older version", "smaller change id", "larger change id", "newer version"],
)
def test_a_document_is_behind_ahead_or_of_the_same_change(head: Head, notes: str, named: str | None) -> None:
    state = builders.order(notes="a")
    stored = StoredState(Head(2, CHANGE_IDS[1]), encode(state), state.updated_at)
    document = Document(head, encode(structs.replace(state, notes=notes)))
    assert difference(ORDER, stored, document, window=WINDOW) == named
