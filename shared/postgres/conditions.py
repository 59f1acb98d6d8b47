"""The conditions of a list of a restaurant's rows, with their values.

A page is read from an index in its own order and ends at its limit. For that the planner must expect more rows than
the limit, and a plan that is made for all values (PostgreSQL makes one after a statement's fifth run) knows none. So a
condition stands there only when it is wanted, never as `$2 is null or …`, and times are compared as rows: `between`.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

_FIRST, _LAST = str(UUID(int=0)), str(UUID(int=2**128 - 1))


class Conditions:
    def __init__(self, restaurant: str) -> None:
        self._conditions = ["t.restaurant_id = $1"]
        self.values: list[Any] = [restaurant]

    def __str__(self) -> str:
        return " and ".join(self._conditions)

    def add(self, condition: str, *values: Any) -> None:
        """`{}` in it stands for each of the values in turn."""
        places = [f"${len(self.values) + place}" for place in range(1, len(values) + 1)]
        self._conditions.append(condition.format(*places))
        self.values += values

    def between(
        self, columns: str, start: datetime | None, end: datetime | None, before: tuple[datetime, str] | None
    ) -> None:
        """`columns`: (time, id). From `start` to `end`, both included, and below the place `before`.

        Of `time >= $1 and time <= $2` a plan for all values expects one row in two hundred: it would read and sort all
        that is in between. Of rows that are compared it expects a third."""
        if start is not None:
            self.add(f"({columns}) >= ({{}}, {{}}::uuid)", start, _FIRST)
        if before is not None and (end is None or before[0] <= end):
            self.add(f"({columns}) < ({{}}, {{}}::uuid)", *before)
        elif end is not None:
            self.add(f"({columns}) <= ({{}}, {{}}::uuid)", end, _LAST)
