"""A change by hand: what it is built on, and what is said when its note fails."""

from typing import Any

import asyncpg
import pytest

from services.sync import head as head_module
from services.sync.head import current_head, record_first
from shared.entities import order as orders
from shared.entities.contract import Head
from shared.errors import OutcomeUnknown, Unavailable

OLD, NEW = (Head(1, "a"), "old"), (Head(2, "b"), "new")
HeadAndState = tuple[Head, Any] | None


@pytest.mark.parametrize(
    ("mirror", "postgres", "expected"),
    [(NEW, OLD, NEW), (NEW, None, NEW), (None, OLD, OLD), (None, None, None), (OLD, OLD, OLD)],
    ids=["newer in the mirror", "not written yet", "out of the window", "nowhere", "the same"],
)
async def test_a_change_is_built_on_what_the_mirror_has_and_else_on_what_postgres_has(
    monkeypatch: pytest.MonkeyPatch, mirror: HeadAndState, postgres: HeadAndState, expected: HeadAndState
) -> None:
    stores(monkeypatch, mirror, postgres)
    assert await found() == expected


async def test_while_the_mirror_is_behind_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    stores(monkeypatch, OLD, NEW)
    with pytest.raises(Unavailable, match="caught up"):
        await found()


def stores(monkeypatch: pytest.MonkeyPatch, mirror: HeadAndState, postgres: HeadAndState) -> None:
    async def mirrored(*_: Any) -> HeadAndState:
        return mirror

    async def stored(*_: Any) -> HeadAndState:
        return postgres

    monkeypatch.setattr(head_module, "head_in_mirror", mirrored)
    monkeypatch.setattr(head_module, "head_in_postgres", stored)


async def found() -> HeadAndState:
    nothing: Any = None
    return await current_head(nothing, nothing, orders.ENTITY, "restaurant", "order")


@pytest.mark.parametrize("failure", [ConnectionResetError("gone"), asyncpg.DeadlockDetectedError("again")])
def test_a_change_that_is_recorded_is_never_answered_as_if_it_were_not(failure: Exception) -> None:
    with pytest.raises(OutcomeUnknown) as told, record_first("the letter") as recorded:
        recorded.change_id = "c-1"
        raise failure
    assert told.value.details == {"change_id": "c-1"}
    expected = Unavailable if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected), record_first("the letter"):
        raise failure
