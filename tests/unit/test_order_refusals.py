"""Refusals of commands on orders as HTTP errors: each kind has one status, and code, field and details are kept."""

import pytest

from services.orders.refusals import as_error, refusals
from shared.entities.order.refusals import Kind, Refused, absent, conflict, forbidden, invalid
from shared.errors import TicketrailError

ANSWERS = [
    (invalid("too_many", "at most 3", field="quantity", most=3), 422, {"field": "quantity", "most": 3}),
    (forbidden("manager_needed", "a manager must do this"), 403, {}),
    (absent("unknown_line", "no such line"), 404, {}),
    (conflict("order_closed", "the order is completed", status="completed"), 409, {"status": "completed"}),
    (conflict("overpaid", "200 is left", field="amount", balance=200), 409, {"field": "amount", "balance": 200}),
]


@pytest.mark.parametrize(("refused", "status", "details"), ANSWERS)
def test_refusal_keeps_its_code_and_details(refused: Refused, status: int, details: dict[str, object]) -> None:
    error = as_error(refused)
    assert (error.status, error.error_code, error.message) == (status, refused.code, str(refused))
    assert error.details == details


def test_every_kind_has_a_status_of_its_own() -> None:
    assert {refused.kind for refused, _, _ in ANSWERS} == set(Kind)
    assert len({as_error(Refused(kind, "code", "text", field="x")).status for kind in Kind}) == len(Kind)


def test_refused_command_raises_the_error_of_the_caller() -> None:
    refused = absent("unknown_line", "no such line")
    with pytest.raises(TicketrailError, match="no such line") as raised, refusals():
        raise refused
    assert raised.value.__cause__ is refused


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), refusals():
        raise ZeroDivisionError
