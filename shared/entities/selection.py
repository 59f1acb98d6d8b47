"""The selection of entities for a list. It is a pure rule, so that the mirror and PostgreSQL give the same answer."""

from datetime import datetime
from typing import Any

from msgspec import Struct, field


class Selection(Struct, frozen=True, kw_only=True):
    """The filters of a list, and the page of the list to return. Entities are sorted by
    (created_at, id), newest first."""

    equal: dict[str, Any] = field(default_factory=dict)
    """Maps a column to the value that it must have. The column is also a field of the state."""
    among: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Maps a column to the values that it may have."""
    created_from: datetime | None = None
    created_to: datetime | None = None
    before: tuple[datetime, str] | None = None
    """(created_at, id) of the last entity of the previous page."""
    limit: int = 50
    include_deleted: bool = False

    def match(self, state: Any) -> bool:
        """Returns whether a state in the mirror belongs to the list. PostgreSQL applies the same rule in SQL
        (shared/postgres/states.py)."""
        return (
            (self.include_deleted or state.deleted_at is None)
            and all(getattr(state, name) == value for name, value in self.equal.items())
            and all(getattr(state, name) in values for name, values in self.among.items())
            and (self.created_from is None or state.created_at >= self.created_from)
            and (self.created_to is None or state.created_at <= self.created_to)
            and (self.before is None or (state.created_at, state.id) < self.before)
        )
