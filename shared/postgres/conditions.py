"""The conditions of a query that lists rows of one restaurant, with their values.

A page should be read from an index, in the order of the index, up to its limit. The planner reads in this way only if
it expects more rows than the limit. After five runs of a statement PostgreSQL may use a generic plan, which does not
know the values. Therefore a query contains only the conditions that the caller asked for and never `$2 is null or …`,
and `between` compares times as rows.
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
        """Adds a condition in which each `{}` stands for the next of the values."""
        places = [f"${len(self.values) + place}" for place in range(1, len(values) + 1)]
        self._conditions.append(condition.format(*places))
        self.values += values

    def between(
        self, columns: str, start: datetime | None, end: datetime | None, before: tuple[datetime, str] | None
    ) -> None:
        """Limits `columns`, a pair (time, id), to the times from `start` to `end` (both included) and to positions
        before `before`.

        For `time >= $1 and time <= $2` a generic plan expects one row in two hundred, so PostgreSQL would read and sort
        the whole range. For a comparison of rows the plan expects a third of all rows, so PostgreSQL reads in index
        order.
        """
        if start is not None:
            self.add(f"({columns}) >= ({{}}, {{}}::uuid)", start, _FIRST)
        if before is not None and (end is None or before[0] <= end):
            self.add(f"({columns}) < ({{}}, {{}}::uuid)", *before)
        elif end is not None:
            self.add(f"({columns}) <= ({{}}, {{}}::uuid)", end, _LAST)
