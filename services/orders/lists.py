"""Reads the query parameters of lists and builds their replies. A cursor is an opaque text that names the last entity
of a page."""

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from services.orders.entity_reads import Page
from services.orders.views import hidden_from, state_view, sync_of
from shared.entities.entity import Entity
from shared.entities.internal_fields import INTERNAL_FIELDS
from shared.entities.selection import Selection
from shared.errors import Forbidden, InvalidInput
from shared.http.cursors import cursor_after, read_cursor
from shared.http.endpoint import ListQuery
from shared.http.replies import Reply, success
from shared.security.permissions import allowed
from shared.security.tokens import Identity

_ADDED_FIELDS = ("version", "sync")
_COMMON_PARAMETERS = frozenset(ListQuery.__struct_fields__)


def selection(query: ListQuery, identity: Identity, **equal: Any) -> Selection:
    """Returns the selection of a query. A parameter that ListQuery does not have is a filter: the column of that name
    must have the parameter's value, or one of its values. `equal`: further filters. Raises Forbidden, InvalidInput."""
    if query.include_deleted and not allowed("deleted.read", identity.role):
        raise Forbidden("only admins may list deleted entities", field="include_deleted")
    among: dict[str, tuple[str, ...]] = {}
    for name in query.__struct_fields__:
        if name in _COMMON_PARAMETERS or (value := getattr(query, name)) is None:
            continue
        if isinstance(value, list) and len(value) != 1:
            among[name] = tuple(dict.fromkeys(value))
        else:
            one = value[0] if isinstance(value, list) else value
            equal[name] = str(one) if isinstance(one, UUID) else one
    return Selection(
        equal=equal,
        among=among,
        created_from=query.created_from,
        created_to=query.created_to,
        before=read_cursor(query.cursor) if query.cursor is not None else None,
        limit=query.limit,
        include_deleted=query.include_deleted,
    )


def list_reply(
    entity: Entity,
    page: Page,
    query: ListQuery,
    identity: Identity,
    derived: list[dict[str, Any]] | None = None,
    *,
    names: Iterable[str] = (),
) -> Reply:
    """Returns the reply of a list. `derived` has further fields of each entity in the order of the page, and `names`
    has the names of these fields. `identity`: the caller, from whom fields may be hidden."""
    hidden = hidden_from(identity)
    shown = _shown_fields(entity, query.fields, names, hidden)
    rows = [
        state_view(
            one.state,
            one.head,
            sync_of(one, identity),
            shown=shown,
            hidden=hidden,
            **(derived[index] if derived else {}),
        )
        for index, one in enumerate(page.found)
    ]
    return success(
        rows,
        headers={"X-Served-By": page.served_by},
        pagination={"limit": query.limit, "next_cursor": _after(page.found[-1].decoded()) if page.more else None},
        complete=page.complete,
    )


def _after(last: Any) -> str:
    return cursor_after(last.created_at, last.id)


def _shown_fields(
    entity: Entity, fields: str | None, derived: Iterable[str], hidden: frozenset[str]
) -> frozenset[str] | None:
    if fields is None:
        return None
    known = {*entity.state.__struct_fields__, *_ADDED_FIELDS, *derived} - INTERNAL_FIELDS - hidden
    requested = {name.strip() for name in fields.split(",") if name.strip()}
    for name in sorted(requested - known):
        raise InvalidInput(f"unknown field {name!r}; known fields: {', '.join(sorted(known))}", field="fields")
    return frozenset({"id", *requested})
