"""Which entities a list contains, as a pure rule, so that both stores give the same answer."""

from datetime import datetime
from typing import Any

from msgspec import Struct, field


class Selection(Struct, frozen=True, kw_only=True):
    """Newest first, by (created_at, id)."""

    equal: dict[str, Any] = field(default_factory=dict)
    """Column, which is also a field of the state -> value."""
    among: dict[str, tuple[str, ...]] = field(default_factory=dict)
    created_from: datetime | None = None
    created_to: datetime | None = None
    before: tuple[datetime, str] | None = None
    """(created_at, id) of the last entity of the previous page."""
    limit: int = 50
    include_deleted: bool = False

    def match(self, state: Any) -> bool:
        return (
            (self.include_deleted or state.deleted_at is None)
            and all(getattr(state, name) == value for name, value in self.equal.items())
            and all(getattr(state, name) in values for name, values in self.among.items())
            and (self.created_from is None or state.created_at >= self.created_from)
            and (self.created_to is None or state.created_at <= self.created_to)
            and (self.before is None or (state.created_at, state.id) < self.before)
        )
