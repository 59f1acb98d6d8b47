"""GET /api/sync/status: the sync status of a restaurant."""

from litestar.types import ASGIApp

from services.sync.mirror.sync_status import SyncStatus, sync_status
from services.sync.sync_context import sync_context
from shared.http.call import Call
from shared.http.endpoint import endpoint
from shared.http.replies import success


@endpoint(
    "GET",
    "/api/sync/status",
    action="sync.read",
    tag="Sync",
    summary="Count the pending, synced, failed and conflicting entities of a restaurant",
    answer=SyncStatus,
)
async def status(request: Call) -> ASGIApp:
    context = sync_context(request)
    return success(await sync_status(context.settings, context.api, context.mirror, request.identity.tenant))


ROUTES = [status]
