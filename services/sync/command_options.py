"""Types of arguments that several commands of `ticketrail` take."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from shared.entities.contract import now

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class Since(click.ParamType[datetime]):
    """A moment, given as an age (90s, 15m, 2h, 7d) or as a time in ISO 8601. A time without a zone is in UTC."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        if found := re.fullmatch(r"(\d{1,6})([smhd])", str(value)):
            return now() - timedelta(seconds=int(found[1]) * _UNIT_SECONDS[found[2]])
        try:
            at = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither an age such as 90s, 15m, 2h or 7d nor a time in ISO 8601", param, ctx)
        return at if at.tzinfo else at.replace(tzinfo=UTC)
