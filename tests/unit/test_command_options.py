"""Arguments of `ticketrail`: which values are accepted, and the sentence that refuses a value."""

from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pytest
from click.testing import CliRunner

from services.sync.cli.orders import orders_command
from services.sync.command_options import Number, Since, WholeNumber
from services.sync.command_session import run
from services.sync.conflicts.commands import conflicts_command
from services.sync.dead_letters.commands import dlq_command
from services.sync.id_argument import full_id
from services.sync.ledger.commands import ledger_command
from shared.entities.contract import now


def refusal(kind: click.ParamType[Any], value: str) -> str:
    with pytest.raises(click.BadParameter) as refused:
        kind.convert(value, None, None)
    return refused.value.message


def error_line(command: click.Command, *arguments: str) -> str:
    """Returns the last line that the command prints. It must refuse its arguments."""
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2, result.output
    return result.output.splitlines()[-1]


def test_a_moment_is_an_age_or_a_time_in_utc() -> None:
    assert abs(Since().convert("2h", None, None) - (now() - timedelta(hours=2))) < timedelta(minutes=1)
    expected = datetime(2026, 3, 14, 12, tzinfo=UTC)
    assert Since().convert("2026-03-14T12:00", None, None) == expected
    assert Since().convert("2026-03-14T14:00+02:00", None, None) == expected


@pytest.mark.parametrize(
    "text", ["999999d", "99999d", "0001-01-01T00:00+14:00", "9999-12-31T23:59-14:00", "1969-12-31"]
)
def test_a_moment_outside_the_calendar_is_refused_in_one_sentence(text: str) -> None:
    assert refusal(Since(), text) == f"{text!r} is not a moment between the years 1970 and 9999"


@pytest.mark.parametrize("text", ["x", "", "2w", "24", "1234567d"])
def test_a_text_that_is_not_a_moment_is_refused_in_one_sentence(text: str) -> None:
    assert "is neither an age such as 90s, 15m, 2h or 7d nor a time in ISO 8601" in refusal(Since(), text)


def test_a_refused_number_names_the_numbers_that_are_allowed() -> None:
    assert refusal(WholeNumber(1, 10_000), "x") == "'x' is not a whole number from 1 to 10000"
    assert refusal(WholeNumber(0, 10**12), "-1") == "'-1' is not a whole number from 0 to 1000000000000"
    assert refusal(WholeNumber(1), "1.5") == "'1.5' is not a whole number from 1 on"
    assert refusal(Number(0.2, 60), "61") == "'61' is not a number from 0.2 to 60"
    assert refusal(Number(0), "x") == "'x' is not a number from 0 on"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_a_number_must_be_finite(text: str) -> None:
    assert refusal(Number(0), text) == f"{text!r} is not a number from 0 on"


def test_an_allowed_number_is_returned() -> None:
    assert WholeNumber(1, 10_000).convert("10000", None, None) == 10_000
    assert Number(0.2, 60).convert("0.2", None, None) == 0.2


@pytest.mark.parametrize("command", [dlq_command, ledger_command])
def test_every_since_takes_the_same_moments(command: click.Command) -> None:
    arguments = ["list"] if command is dlq_command else []
    assert "'24' is neither an age such as" in error_line(command, *arguments, "--since", "24")


def test_no_option_shows_the_name_of_a_type_in_an_error() -> None:
    for line in (
        error_line(orders_command, "--limit", "x"),
        error_line(dlq_command, "list", "--limit", "x"),
        error_line(conflicts_command, "list", "--limit", "x"),
    ):
        assert line == "Error: Invalid value for '--limit': 'x' is not a whole number from 1 to 10000"


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_order_is_refused(text: str) -> None:
    assert error_line(orders_command, text).endswith(
        "it is empty; give the number of an order, its id, or the beginning of its id"
    )


def test_an_empty_restaurant_is_refused() -> None:
    assert error_line(orders_command, "--restaurant", "").endswith(
        "Invalid value for '--restaurant': it is empty; give an id, the beginning of an id, or a slug"
    )


def test_an_id_that_the_command_converts_itself_is_named_in_the_error() -> None:
    async def find(*_: object) -> list[tuple[str, str]]:
        return []

    with pytest.raises(click.BadParameter) as refused:
        full_id("zz", "dish", find, argument="DISH")
    assert refused.value.format_message().startswith("Invalid value for 'DISH': 'zz' is neither an id nor")


def test_a_timeout_is_reported_without_an_empty_text() -> None:
    async def wait() -> None:
        raise TimeoutError

    with pytest.raises(click.ClickException) as reported:
        run(wait())
    assert reported.value.message.startswith("a backend does not answer: TimeoutError; the command uses ")
