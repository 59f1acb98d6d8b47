"""Reads the amounts, numbers and times of cells. Pure.

An amount is a whole number of minor units. With `--decimal` it is a number of major units, such as 12,50, and the
currency of the restaurant says how many decimal places are allowed. Only the digits 0 to 9 are allowed, without
thousands separators. Python itself would also accept `1_250`, digits of other scripts and NaN.
"""

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from typing import Literal
from zoneinfo import ZoneInfo

from shared.iso_codes import minor_digits
from shared.restaurants import Restaurant

Decimal = Literal["point", "comma"]
SIGNS: dict[Decimal, str] = {"point": ".", "comma": ","}

_MAX_DIGITS = 15
_WHOLE = re.compile(rf"[+-]?[0-9]{{1,{_MAX_DIGITS}}}")
_MAJOR = {
    decimal: re.compile(rf"([+-]?)([0-9]{{1,{_MAX_DIGITS}}})(?:{re.escape(sign)}([0-9]{{1,{_MAX_DIGITS}}}))?")
    for decimal, sign in SIGNS.items()
}
_ISO = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?P<time>[T ][0-9].*)?")
_DOTTED = re.compile(r"([0-9]{1,2})\.([0-9]{1,2})\.([0-9]{4})(?:,? +([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?)?")
_MAX_SHOWN = 40
EXAMPLE = "write it like 2026-03-01 18:30, or 2026-03-01T18:30:00+01:00"


def whole_number(text: str) -> int:
    """Reads a whole number. Raises ValueError."""
    if not _WHOLE.fullmatch(text.strip(" ")):
        raise ValueError(f"{shown(text)} is not a whole number")
    return int(text)


def minor_units(text: str) -> int:
    """Reads an amount in minor units. Raises ValueError."""
    if not _WHOLE.fullmatch(text.strip(" ")):
        raise ValueError(f"{shown(text)} is not a whole number of minor units; --decimal reads amounts such as 12.50")
    return int(text)


def major_units(text: str, decimal: Decimal, currency: str) -> int:
    """Returns the minor units of an amount in major units. Raises ValueError, also if it has more decimal places than
    the currency."""
    digits = minor_digits(currency)
    found = _MAJOR[decimal].fullmatch(text.strip(" "))
    if found is None:
        example = "1250" if digits == 0 else f"12{SIGNS[decimal]}{'50'.ljust(digits, '0')}"
        raise ValueError(f"{shown(text)} is not an amount such as {example}; thousands have no separator")
    sign, major, minor = found[1], found[2], found[3] or ""
    if len(minor.rstrip("0")) > digits:
        raise ValueError(f"{shown(text)} has more than the {digits} decimal places of {currency}")
    return int(f"{sign}{major}{minor[:digits].ljust(digits, '0')}")


def moment(text: str, restaurant: Restaurant | None) -> datetime:
    """Reads a time. A time without a zone is in the zone of the restaurant. A time that the clocks skip is refused; a
    time that they show twice means the first one. A date alone means the beginning of that business day. Raises
    ValueError."""
    text = text.strip(" ")
    if (found := _DOTTED.fullmatch(text)) is not None:
        day, month, year, hour, minute, second = (int(part or 0) for part in found.groups())
        at, has_time = _valid(text, lambda: datetime(year, month, day, hour, minute, second)), found[4] is not None
    elif (found := _ISO.fullmatch(text)) is not None:
        at, has_time = _valid(text, lambda: datetime.fromisoformat(text)), found["time"] is not None
    elif "/" in text:
        raise ValueError(f"{shown(text)} may begin with the day or the month; {EXAMPLE}")
    else:
        raise ValueError(f"{shown(text)} is not a time; {EXAMPLE}")
    if at.tzinfo is not None:
        return at
    if restaurant is None:
        raise ValueError(f"{shown(text)} has no time zone, and the row names no restaurant; {EXAMPLE}")
    try:
        return local(at, ZoneInfo(restaurant.time_zone)) if has_time else business_day_begin(at.date(), restaurant)
    except OverflowError:
        raise ValueError(f"{shown(text)} must be a time between 1970 and 2200") from None


def local(at: datetime, zone: ZoneInfo) -> datetime:
    """Returns the time that clocks in the zone showed as `at`. Raises ValueError if they skipped it."""
    found = at.replace(tzinfo=zone)
    if found.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != at:
        raise ValueError(f"{at} does not exist in {zone.key}, because the clocks skipped it")
    return found.astimezone(UTC)


def business_day_begin(day: date, restaurant: Restaurant) -> datetime:
    """Returns the first time of a business day."""
    at = datetime.combine(day, time(restaurant.cutoff_hour), ZoneInfo(restaurant.time_zone))
    return at.astimezone(UTC)


def _valid(text: str, make: Callable[[], datetime]) -> datetime:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{shown(text)} is not a time: {error}; {EXAMPLE}") from None


def shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…")
