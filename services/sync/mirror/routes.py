"""GET /api/sync/status and /api/ops/sync: the sync status of a restaurant, and for operators of all restaurants."""

from functools import partial
from typing import Annotated
from uuid import UUID

import msgspec
from litestar.types import ASGIApp
from msgspec import Meta, Struct

from services.sync.mirror.sync_status import SyncStatus, TerminalStatus, sync_status, terminal_status
from services.sync.sync_context import sync_context
from shared.errors import Forbidden
from shared.http.call import Call
from shared.http.endpoint import endpoint, read_query
from shared.http.replies import Reply, success
from shared.security.tokens import Role


class SyncStatusQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    restaurant_id: (
        Annotated[UUID, Meta(description="only for operators; without it they get the sums of all restaurants")] | None
    ) = None


class TerminalStatusQuery(SyncStatusQuery, kw_only=True, rename={"terminal_id": "terminalId"}):
    terminal_id: Annotated[str, Meta(min_length=1, max_length=200, description="the reply repeats it")] | None = None


@endpoint(
    "GET",
    "/api/sync/status",
    action="sync.read",
    tag="Sync",
    summary="Count the pending, failed, synced and conflicting entities, as terminals expect it",
    description="The reply has the exact fields of the terminals' contract, without an envelope. The tables have its"
    " names, such as SaleOrder and Product. Payments are parts of their SaleOrder. A number is null while the store"
    " that has it is unavailable. `/api/ops/sync` has thresholds and warnings too.",
    query=TerminalStatusQuery,
    answer=TerminalStatus,
    bare=True,
)
async def terminal_sync_status(request: Call) -> ASGIApp:
    query = read_query(request, TerminalStatusQuery)
    found = terminal_status(await _status(request, query), query.terminal_id)
    return Reply(msgspec.json.encode(found))


@endpoint(
    "GET",
    "/api/ops/sync",
    action="sync.read",
    tag="Sync",
    summary="Count the pending, synced, failed and conflicting entities, with warnings",
    description="Pending entities are accepted and not yet in PostgreSQL. Failed ones are pending, and their last"
    " attempt failed.",
    query=SyncStatusQuery,
    answer=SyncStatus,
)
async def ops_sync_status(request: Call) -> ASGIApp:
    return success(await _status(request, read_query(request, SyncStatusQuery)))


async def _status(request: Call, query: SyncStatusQuery) -> SyncStatus:
    """Raises Forbidden if the caller names another restaurant than its own."""
    context, identity = sync_context(request), request.identity
    named = str(query.restaurant_id) if query.restaurant_id else None
    if identity.role is Role.OPERATOR:
        return await sync_status(context.settings, context.ops.connection, context.mirror, named)
    if named not in (None, identity.tenant):
        raise Forbidden("your token belongs to another restaurant", field="restaurant_id")
    restaurant = identity.tenant
    return await sync_status(context.settings, partial(context.api.tenant, restaurant), context.mirror, restaurant)


ROUTES = [terminal_sync_status, ops_sync_status]
