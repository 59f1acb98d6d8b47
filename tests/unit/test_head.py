"""A change by an operator: its base, and the error when it is recorded but its row in the audit fails."""

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
    ids=["newer in the mirror", "not written yet", "out of the window", "in neither store", "the same"],
)
async def test_a_change_is_built_on_the_head_in_the_mirror_or_else_in_postgres(
    monkeypatch: pytest.MonkeyPatch, mirror: HeadAndState, postgres: HeadAndState, expected: HeadAndState
) -> None:
    stores(monkeypatch, mirror, postgres)
    assert await found() == expected


async def test_a_change_is_refused_while_the_mirror_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    stores(monkeypatch, OLD, NEW)
    with pytest.raises(Unavailable, match="behind PostgreSQL"):
        await found()


def stores(monkeypatch: pytest.MonkeyPatch, mirror: HeadAndState, postgres: HeadAndState) -> None:
    async def head_in_mirror(*_: Any) -> HeadAndState:
        return mirror

    async def head_in_postgres(*_: Any) -> HeadAndState:
        return postgres

    monkeypatch.setattr(head_module, "head_in_mirror", head_in_mirror)
    monkeypatch.setattr(head_module, "head_in_postgres", head_in_postgres)


async def found() -> HeadAndState:
    nothing: Any = None
    return await current_head(nothing, nothing, orders.ENTITY, "restaurant", "order")


@pytest.mark.parametrize("failure", [ConnectionResetError("gone"), asyncpg.DeadlockDetectedError("again")])
def test_a_failure_after_the_change_is_recorded_is_answered_as_outcome_unknown(failure: Exception) -> None:
    with pytest.raises(OutcomeUnknown) as refused, record_first("the dead letter") as recorded:
        recorded.change_id = "c-1"
        raise failure
    assert refused.value.details == {"change_id": "c-1"}
    expected = Unavailable if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected), record_first("the dead letter"):
        raise failure
