"""Types of arguments that several commands of `ticketrail` take."""

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from shared.entities.contract import now

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)  # RabbitMQ and the system's clock have no earlier time


class Since(click.ParamType[datetime]):
    """A moment from 1970 on, given as an age (90s, 15m, 2h, 7d) or as a time in ISO 8601. A time without a zone is in
    UTC."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            at = _moment(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither an age such as 90s, 15m, 2h or 7d nor a time in ISO 8601", param, ctx)
        except OverflowError:
            at = None
        if at is None or at < _EARLIEST:
            self.fail(f"{value!r} is not a moment between the years 1970 and 9999", param, ctx)
        return at


def _moment(text: str) -> datetime:
    """Raises ValueError if the text is not a moment, and OverflowError if its year is not from 1 to 9999."""
    if found := re.fullmatch(r"(\d{1,6})([smhd])", text):
        return now() - timedelta(seconds=int(found[1]) * _UNIT_SECONDS[found[2]])
    at = datetime.fromisoformat(text)
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)


class WholeNumber(click.IntRange):
    """A whole number between two bounds, or from one bound on. An error says in one sentence which numbers are
    allowed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is not a whole number {_range(self.min, self.max)}", param, ctx)


class Number(click.FloatRange):
    """A finite number between two bounds, or from one bound on. An error says in one sentence which numbers are
    allowed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            found = super().convert(value, param, ctx)
        except click.BadParameter:
            found = math.nan
        if not math.isfinite(found):  # every comparison with NaN is false, so a range does not refuse it
            self.fail(f"{value!r} is not a number {_range(self.min, self.max)}", param, ctx)
        return found


def _range(least: float | None, most: float | None) -> str:
    return f"from {least:.15g} on" if most is None else f"from {least:.15g} to {most:.15g}"


class OrderName(click.ParamType[str]):
    """The number of an order, its id, or the beginning of its id."""

    name = "order"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip()
        if not text:
            self.fail("it is empty; give the number of an order, its id, or the beginning of its id", param, ctx)
        return text
