"""Bodies and queries of the routes in routes.py. Unknown fields are refused."""

from typing import Annotated
from uuid import UUID

from msgspec import Meta, Struct

from services.sync.request_fields import Name, Why


class ConflictsQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    restaurant_id: UUID | None = None
    entity: Name | None = None
    entity_id: UUID | None = None
    open: Annotated[bool, Meta(description="true lists open conflicts, false lists decided ones")] = True
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200, description="next_cursor of the previous page")] | None = None


class ResolveConflict(Struct, forbid_unknown_fields=True, kw_only=True):
    keep: Annotated[UUID, Meta(description="the change to keep: the id of one of the two")]
    why: Why
