"""/api/ops/conflicts: conflicts for operators. Admins see the conflicts of their own restaurant."""

from litestar.types import ASGIApp

from services.sync.conflicts import store as conflict_store
from services.sync.conflicts.decisions import ConflictDecisions, ShownFork, show
from services.sync.conflicts.requests import ConflictsQuery, ResolveConflict
from services.sync.conflicts.store import Fork
from services.sync.sync_context import sync_context
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.cursors import page_of, read_cursor
from shared.http.endpoint import endpoint, path_id, read_query
from shared.http.replies import success

_TAG = "Conflicts"


@endpoint(
    "GET",
    "/api/ops/conflicts",
    action="conflicts.read",
    tag=_TAG,
    summary="List conflicts, newest first",
    description="A conflict is a fork of an entity that could not be merged. `open` chooses between open and"
    " decided ones.",
    query=ConflictsQuery,
    answer=Fork,
    many=True,
)
async def list_conflicts(request: Call) -> ASGIApp:
    query = read_query(request, ConflictsQuery)
    async with sync_context(request).connection_for(request.identity) as connection:
        found = await conflict_store.page(
            connection,
            restaurant_id=str(query.restaurant_id) if query.restaurant_id else None,
            entity=query.entity,
            entity_id=str(query.entity_id) if query.entity_id else None,
            is_open=query.open,
            before=read_cursor(query.cursor) if query.cursor else None,
            limit=query.limit + 1,
        )
    page, pagination = page_of(found, query.limit, lambda conflict: (conflict.opened_at, conflict.id))
    return success(page, pagination=pagination)


@endpoint(
    "GET",
    "/api/ops/conflicts/{conflict_id:str}",
    action="conflicts.read",
    tag=_TAG,
    summary="Show both sides of a conflict and how they differ",
    description="Shows the two changes with the same base, and the fields in which they differ.",
    answer=ShownFork,
    errors=(404,),
)
async def get_conflict(request: Call, conflict_id: str) -> ASGIApp:
    id_ = path_id(conflict_id, "conflict_id")
    async with sync_context(request).connection_for(request.identity) as connection:
        return success(await show(connection, id_))


@endpoint(
    "POST",
    "/api/ops/conflicts/{conflict_id:str}/resolve",
    action="conflicts.resolve",
    tag=_TAG,
    summary="Decide a conflict: keep one of the two changes",
    description="If the entity has the value of the other change in a field in which the two differ, a new change"
    " restores the value of the kept change. If you keep the loser and such a field has a third value by now, the"
    " answer is 409 `changed_since`: change the entity by hand, then keep the winner."
    " Payments of both sides always count.",
    body=ResolveConflict,
    answer=Fork,
    errors=(404, 409, 504),
    example={"keep": "949d5329-9382-53f5-88ee-eb64c2466f58", "why": "the guest wants bread"},
)
async def resolve_conflict(request: Call, conflict_id: str) -> ASGIApp:
    id_, identity, context = path_id(conflict_id, "conflict_id"), request.identity, sync_context(request)
    body = read_body(await request.whole_body(), ResolveConflict)
    decisions = ConflictDecisions(context.ops, context.mirror, context.rail)
    return success(
        await decisions.resolve(id_, keep=str(body.keep), why=body.why, actor=identity.actor, role=identity.role)
    )


ROUTES = [list_conflicts, get_conflict, resolve_conflict]
