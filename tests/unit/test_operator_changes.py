"""A change by an operator: the error when it is recorded but its row in the audit fails."""

import asyncpg
import pytest

from services.sync.operator_changes import record_first
from shared.errors import OutcomeUnknown, Unavailable


@pytest.mark.parametrize("failure", [ConnectionResetError("gone"), asyncpg.DeadlockDetectedError("again")])
def test_a_failure_after_the_change_is_recorded_is_answered_as_outcome_unknown(failure: Exception) -> None:
    with pytest.raises(OutcomeUnknown) as refused, record_first("the dead letter") as recorded:
        recorded.change_id = "c-1"
        raise failure
    assert refused.value.details == {"change_id": "c-1"}
    expected = Unavailable if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected), record_first("the dead letter"):
        raise failure
