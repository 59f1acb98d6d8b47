"""/api/audit: who changed what and when, read from the recorded changes."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar.types import ASGIApp
from msgspec import Meta, Struct

from services.orders import audit_reads
from services.orders.requests import Request
from services.orders.route_context import context_of
from shared.entities import registry
from shared.entities.contract import SENTENCE, Time
from shared.entities.internal_fields import INTERNAL_FIELDS
from shared.errors import Unavailable
from shared.http.call import Call
from shared.http.cursors import page_of, read_cursor
from shared.http.endpoint import endpoint, read_query
from shared.http.replies import success
from shared.http.texts import END, Label
from shared.postgres.pool import UNAVAILABLE

_ENTITIES = (*registry.ENTITIES, *audit_reads.IDENTITIES)
_Entity = Annotated[
    str,
    Meta(
        pattern=rf"^(?:{'|'.join(_ENTITIES)}){END}",
        extra={SENTENCE: f"must be one of {', '.join(_ENTITIES)}"},
    ),
]


class AuditQuery(Request, rename={"from_": "from"}):
    from_: Time | None = None
    to: Time | None = None
    entity: _Entity | None = None
    entity_id: UUID | None = None
    actor: Label | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | None = None


class AuditedChange(Struct, frozen=True):
    change_id: str
    entity: str
    entity_id: str
    version: int | None
    """None for users and API keys, which have no versions."""
    type: str
    source: str
    accepted_at: datetime
    actor: str | None
    changed: dict[str, Any]
    """Name of each changed field -> {"before", "after"}. Empty for a creation."""
    address: str | None = None
    """The address from which a user signed in or out, failed to, or changed a password."""


@endpoint(
    "GET",
    "/api/audit",
    action="audit.read",
    tag="Audit",
    summary="List who changed what, newest first",
    description="Each entry is one recorded change with the old and the new values of the fields that it changed."
    " The list comes from PostgreSQL and is late by the sync lag. With `entity=user` or `entity=api_key` it shows"
    " sign-ins, failed ones too, sign-outs, and what was made, changed or revoked; without `entity`, these are left"
    " out. `address` is that of the client who signed in or out, failed to, or set a password.",
    query=AuditQuery,
    answer=AuditedChange,
    many=True,
)
async def list_audit(request: Call) -> ASGIApp:
    query = read_query(request, AuditQuery)
    tenant = request.identity.tenant
    at, id_ = read_cursor(query.cursor) if query.cursor else (None, None)
    try:
        async with context_of(request).postgres.tenant(tenant) as connection:
            read: Any = audit_reads.identity_events if query.entity in audit_reads.IDENTITIES else audit_reads.changes
            rows, more = await read(
                connection,
                tenant,
                start=query.from_,
                end=query.to,
                entity=query.entity,
                entity_id=str(query.entity_id) if query.entity_id else None,
                actor=query.actor,
                before=(at, id_) if at is not None and id_ is not None else None,
                limit=query.limit + 1,
            )
    except UNAVAILABLE as error:
        raise Unavailable("the audit needs the database, which is unavailable", retry_after=2.0) from error
    found = [_audited(row) for row in rows]
    page, pagination = page_of(found, query.limit, lambda one: (one.accepted_at, one.change_id), more=more)
    return success(page, pagination=pagination)


def _audited(row: dict[str, Any]) -> AuditedChange:
    if "changed" in row:
        return AuditedChange(**{**row, "changed": msgspec.json.decode(row["changed"])})
    data = msgspec.json.decode(row.pop("data"))
    before, after = data["before"], data["after"]
    changed = {
        name: {"before": old, "after": after.get(name)}
        for name, old in before.items()
        if name != "updated_at" and name not in INTERNAL_FIELDS
    }
    return AuditedChange(**row, changed=changed)


ROUTES = [list_audit]
