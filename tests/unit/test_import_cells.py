"""Cells of an import: only plain digits form a number, and times are in the zone of the restaurant."""

from datetime import UTC, datetime

import pytest

from services.sync.imports.cells import major_units, minor_units, moment, whole_number
from shared.iso_codes import CURRENCIES, minor_digits
from shared.restaurants import Restaurant

BERLIN = Restaurant(id="r", slug="r", name="R", time_zone="Europe/Berlin", cutoff_hour=4)

NOT_NUMBERS = [
    "1_250", "١٢٥٠", "1२", "１２", "²", "NaN", "nan", "Infinity", "-inf", "1e3", "0x10", "12.50", "12,50", "1 250",
    "1'250", "1\u00a0250", "", "+", "--1", "1-", "9" * 16, "€5", "True", "1\n",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_a_number_that_only_python_accepts_is_refused(text: str) -> None:
    for read in (whole_number, minor_units):
        with pytest.raises(ValueError, match="is not a whole number"):
            read(text)


@pytest.mark.parametrize("text", [*NOT_NUMBERS[:12], "1.250,00", "1,250.00", ",50", "12,", "12.", "5 €", "1e3,5"])
def test_an_amount_that_only_python_accepts_is_refused(text: str) -> None:
    for decimal in ("point", "comma"):
        if text not in ("12.50", "12,50"):
            with pytest.raises(ValueError, match="is not an amount such as"):
                major_units(text, decimal, "EUR")


def test_whole_numbers_are_read() -> None:
    assert [minor_units(text) for text in ("1250", "-1", "+7", "007", " 12 ", "0")] == [1250, -1, 7, 7, 12, 0]


def test_amounts_in_major_units_have_the_decimal_places_of_the_currency() -> None:
    read = [major_units(text, "comma", "EUR") for text in ("12,50", "12,5", "12", "-0,07", "12,5000", " 1,00 ")]
    assert read == [1250, 1250, 1200, -7, 1250, 100]
    assert major_units("12.50", "point", "EUR") == 1250
    assert (major_units("1250", "comma", "JPY"), major_units("1250,00", "comma", "JPY")) == (1250, 1250)
    assert major_units("1,25", "comma", "KWD") == 1250
    for text, decimal, currency in (("12,505", "comma", "EUR"), ("1,5", "comma", "JPY"), ("1.2505", "point", "KWD")):
        with pytest.raises(ValueError, match=f"more than the {minor_digits(currency)} decimal places of {currency}"):
            major_units(text, decimal, currency)  # type: ignore[arg-type]
    for text, decimal in (("12.50", "comma"), ("12,50", "point")):
        with pytest.raises(ValueError, match="is not an amount such as"):
            major_units(text, decimal, "EUR")  # type: ignore[arg-type]


def test_currencies_have_their_decimal_places() -> None:
    by_digits = {digits: [one for one in CURRENCIES.split() if minor_digits(one) == digits] for digits in (0, 2, 3)}
    assert len(by_digits[0]) == 16
    assert by_digits[3] == ["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"]
    assert {"EUR", "USD", "INR"} < set(by_digits[2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-01 12:30", "2026-03-01T11:30"),
        ("2026-07-01T12:30:15", "2026-07-01T10:30:15"),
        ("01.07.2026 12:30", "2026-07-01T10:30"),
        ("1.7.2026, 9:05:07", "2026-07-01T07:05:07"),
        ("2026-03-01 12:30+00", "2026-03-01T12:30"),
        ("2026-03-01T12:30:00.5Z", "2026-03-01T12:30:00.5"),
        # The clocks went back at 3:00 on 25 October: 2:30 came twice, and the text means the first one.
        ("2026-10-25 02:30", "2026-10-25T00:30"),
        ("2026-10-25 03:00", "2026-10-25T02:00"),
        # A date alone is the beginning of its business day; midnight would be the day before.
        ("2026-07-01", "2026-07-01T02:00"),
        ("01.07.2026", "2026-07-01T02:00"),
    ],
)
def test_a_time_without_a_zone_is_in_the_zone_of_the_restaurant(text: str, expected: str) -> None:
    assert moment(text, BERLIN) == datetime.fromisoformat(expected).replace(tzinfo=UTC)


def test_a_date_alone_is_in_its_business_day_even_if_the_clocks_skip_the_cutoff_hour() -> None:
    for hour in (0, 2, 4, 23):
        restaurant = Restaurant(id="r", slug="r", name="R", time_zone="Europe/Berlin", cutoff_hour=hour)
        for day in ("2026-03-29", "2026-10-25", "2026-07-01"):
            assert restaurant.business_day(moment(day, restaurant)).isoformat() == day


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2026-03-29 02:30", "does not exist in Europe/Berlin"),
        ("29.03.2026 02:00", "does not exist in Europe/Berlin"),
        ("03/01/2026 12:30", "may begin with the day or the month"),
        ("46082.52", "is not a time"),
        ("yesterday", "is not a time"),
        ("2026-02-30 12:00", "is not a time"),
        ("31.02.2026", "is not a time"),
        ("2026-03-01 25:00", "is not a time"),
        ("٢٠٢٦-03-01", "is not a time"),
        ("2026-W01-1", "is not a time"),
        ("0001-01-01 00:00", "between 1970 and 2200"),
    ],
)
def test_a_time_that_is_unclear_or_does_not_exist_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        moment(text, BERLIN)
