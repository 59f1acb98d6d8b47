"""/api/ops/dead-letters and /api/ops/jobs: dead letters and their replays, for operators. Admins see the dead letters
of their own restaurant.

A handler parses, calls and replies. Repairs are in repairs.py, and replay jobs in replay_jobs.py. The sync worker runs
replay jobs.
"""

from litestar.types import ASGIApp
from msgspec import Struct

from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.repairs import DeadLetterRepairs
from services.sync.dead_letters.replay_jobs import ReplayItem, ReplayJob, ReplayPlan
from services.sync.dead_letters.requests import (
    DeadLetterGroupsQuery,
    DeadLettersQuery,
    DiscardDeadLetter,
    DiscardRequest,
    EditDeadLetter,
    ReplayItemsQuery,
    ReplayJobsQuery,
    ReplayRequest,
    RestoreDeadLetter,
    UndoJob,
)
from services.sync.dead_letters.store import DeadLetter, DeadLetterGroup, DeadLetterQuery
from services.sync.dead_letters.view import DeadLetterView, dead_letter_view
from services.sync.sync_context import sync_context
from shared.errors import InvalidInput, NotFound
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.cursors import page_of, read_cursor
from shared.http.endpoint import endpoint, path_id, read_query
from shared.http.replies import Reply, success
from shared.security.tokens import Role

_TAG = "Dead letters"


class Planned(Struct, frozen=True):
    plan: ReplayPlan
    job: ReplayJob


# -- reading -----------------------------------------------------------------------------------------------------


@endpoint(
    "GET",
    "/api/ops/dead-letters",
    action="dead_letters.read",
    tag=_TAG,
    summary="List dead letters, newest failure first",
    description="A dead letter is a change that could not be written. `status` may be repeated. An admin sees those"
    " of its own restaurant.",
    query=DeadLettersQuery,
    answer=DeadLetter,
    many=True,
)
async def list_dead_letters(request: Call) -> ASGIApp:
    query = read_query(request, DeadLettersQuery)
    before = read_cursor(query.cursor) if query.cursor else None
    async with sync_context(request).connection_for(request.identity) as connection:
        found = await dead_letter_store.page(connection, query.query(), before=before, limit=query.limit + 1)
    page, pagination = page_of(found, query.limit, lambda dead_letter: (dead_letter.last_failed_at, dead_letter.id))
    return success(page, pagination=pagination)


@endpoint(
    "GET",
    "/api/ops/dead-letters/groups",
    action="dead_letters.read",
    tag=_TAG,
    summary="Group dead letters by cause, largest group first",
    description="`trend`: the number of dead letters that failed last in each of the past 24 hours, oldest hour first.",
    query=DeadLetterGroupsQuery,
    answer=list[DeadLetterGroup],
)
async def list_groups(request: Call) -> ASGIApp:
    query = read_query(request, DeadLetterGroupsQuery)
    async with sync_context(request).connection_for(request.identity) as connection:
        return success(await dead_letter_store.groups(connection, query.query()))


@endpoint(
    "GET",
    "/api/ops/dead-letters/{dead_letter_id:str}",
    action="dead_letters.read",
    tag=_TAG,
    summary="Show everything that is known about a dead letter",
    description="Shows the reason, the attempts, the headers, the event and the history of repairs.",
    answer=DeadLetterView,
    errors=(404,),
)
async def get_dead_letter(request: Call, dead_letter_id: str) -> ASGIApp:
    id_, identity = path_id(dead_letter_id, "dead_letter_id"), request.identity
    async with sync_context(request).connection_for(identity) as connection:
        return success(await dead_letter_view(connection, id_, operator=identity.role is Role.OPERATOR))


@endpoint(
    "GET",
    "/api/ops/dead-letters/{dead_letter_id:str}/body",
    action="dead_letters.read",
    tag=_TAG,
    summary="Return the exact body of a dead letter",
    description="Returns the bytes as the broker had them, even if they are not JSON.",
    media_type="application/octet-stream",
    errors=(404,),
)
async def get_body(request: Call, dead_letter_id: str) -> ASGIApp:
    id_ = path_id(dead_letter_id, "dead_letter_id")
    async with sync_context(request).connection_for(request.identity) as connection:
        dead_letter = await dead_letter_store.one(connection, id_)
    if dead_letter is None:
        raise NotFound("no such dead letter")
    return Reply(dead_letter.body, content_type=b"application/octet-stream")


# -- replaying ---------------------------------------------------------------------------------------------------


@endpoint(
    "POST",
    "/api/ops/dead-letters/replay",
    action="dead_letters.repair",
    tag=_TAG,
    summary="Replay dead letters, selected by ids, by fingerprint or by another filter",
    description="Returns the plan and the job that executes it. A dry run writes each dead letter in a transaction that"
    " is rolled back; the items of the job show what would happen. The field `absent` of the plan lists the `ids` that"
    " are not open. If none of the `ids` is open, the answer is 404 or 409 and there is no job.",
    body=ReplayRequest,
    answer=Planned,
    status=202,
    errors=(404, 409),
    example={"fingerprint": "3f2a9c01d4be", "dry_run": True},
)
async def replay(request: Call) -> ASGIApp:
    body = read_body(await request.whole_body(), ReplayRequest)
    return await _planned(request, body, "dry_run" if body.dry_run else "replay", canary=body.canary)


@endpoint(
    "POST",
    "/api/ops/dead-letters/discard",
    action="dead_letters.repair",
    tag=_TAG,
    summary="Discard dead letters, selected by ids, by fingerprint or by another filter",
    description="Returns the plan and the job that executes it. The job discards the dead letters one after the other,"
    " as the route of one dead letter does. `POST /api/ops/jobs/{id}/undo` opens them again.",
    body=DiscardRequest,
    answer=Planned,
    status=202,
    errors=(404, 409),
    example={"fingerprint": "3f2a9c01d4be", "why": "a terminal sent test data"},
)
async def discard_many(request: Call) -> ASGIApp:
    return await _planned(request, read_body(await request.whole_body(), DiscardRequest), "discard", canary=False)


async def _planned(request: Call, body: ReplayRequest | DiscardRequest, kind: str, *, canary: bool) -> ASGIApp:
    chosen, identity = body.query(tuple(str(id_) for id_ in body.ids)), request.identity
    if chosen == DeadLetterQuery():
        raise InvalidInput("select dead letters by ids or by a filter, such as a fingerprint or a status", field="ids")
    async with (
        sync_context(request).connection_for(identity) as connection,
        connection.transaction(isolation="repeatable_read"),  # plan and job see the same dead letters
    ):
        plan = await replay_jobs.plan(connection, chosen)
        job = await replay_jobs.make(
            connection,
            chosen,
            kind=kind,
            actor=identity.actor,
            role=identity.role,
            why=body.why,
            per_second=body.per_second,
            canary=canary,
        )
    return success(Planned(plan, job), status=202)


@endpoint(
    "GET",
    "/api/ops/jobs",
    action="dead_letters.repair",
    tag=_TAG,
    summary="List replays, dry runs, discards and restores, newest first",
    description="A job is one action on many dead letters.",
    query=ReplayJobsQuery,
    answer=ReplayJob,
    many=True,
)
async def list_jobs(request: Call) -> ASGIApp:
    query = read_query(request, ReplayJobsQuery)
    before = read_cursor(query.cursor) if query.cursor else None
    async with sync_context(request).connection_for(request.identity) as connection:
        found = await replay_jobs.recent(connection, limit=query.limit + 1, before=before)
    page, pagination = page_of(found, query.limit, lambda job: (job.created_at, job.id))
    return success(page, pagination=pagination)


@endpoint(
    "GET",
    "/api/ops/jobs/{replay_id:str}",
    action="dead_letters.repair",
    tag=_TAG,
    summary="Show the progress of a job",
    description="Counts the dead letters of the job by outcome.",
    answer=ReplayJob,
    errors=(404,),
)
async def get_job(request: Call, replay_id: str) -> ASGIApp:
    id_ = path_id(replay_id, "replay_id")
    async with sync_context(request).connection_for(request.identity) as connection:
        job = await replay_jobs.one(connection, id_)
    if job is None:
        raise NotFound("no such job")
    return success(job)


@endpoint(
    "GET",
    "/api/ops/jobs/{replay_id:str}/items",
    action="dead_letters.repair",
    tag=_TAG,
    summary="List the outcome of each dead letter of a job",
    description="`after` is the position of the last item of the previous page.",
    query=ReplayItemsQuery,
    answer=list[ReplayItem],
    errors=(404,),
)
async def get_job_items(request: Call, replay_id: str) -> ASGIApp:
    id_, query = path_id(replay_id, "replay_id"), read_query(request, ReplayItemsQuery)
    async with sync_context(request).connection_for(request.identity) as connection:
        if await replay_jobs.one(connection, id_) is None:
            raise NotFound("no such job")
        outcomes = (query.outcome,) if query.outcome else ()
        found = await replay_jobs.items(connection, id_, outcomes=outcomes, after=query.after, limit=query.limit)
    return success(found)


@endpoint(
    "POST",
    "/api/ops/jobs/{replay_id:str}/cancel",
    action="dead_letters.repair",
    tag=_TAG,
    summary="Cancel a job; dead letters that are already sent continue",
    description="Answers with the job. A job that has ended stays as it is.",
    answer=ReplayJob,
    errors=(404, 409),
)
async def cancel_job(request: Call, replay_id: str) -> ASGIApp:
    id_, identity = path_id(replay_id, "replay_id"), request.identity
    async with sync_context(request).connection_for(identity) as connection:
        return success(await replay_jobs.cancel(connection, id_, actor=identity.actor, role=identity.role))


@endpoint(
    "POST",
    "/api/ops/jobs/{replay_id:str}/undo",
    action="dead_letters.repair",
    tag=_TAG,
    summary="Undo a discard: open its dead letters again",
    description="Returns the job that restores the dead letters that are still discarded. Changes that reverted what"
    " readers saw stay.",
    body=UndoJob,
    answer=ReplayJob,
    status=202,
    errors=(404, 409),
    example={"why": "it was the wrong fingerprint"},
)
async def undo_job(request: Call, replay_id: str) -> ASGIApp:
    id_, identity = path_id(replay_id, "replay_id"), request.identity
    body = read_body(await request.whole_body(), UndoJob)
    async with sync_context(request).connection_for(identity) as connection:
        job = await replay_jobs.undo(connection, id_, actor=identity.actor, role=identity.role, why=body.why)
    return success(job, status=202)


# -- repairing ---------------------------------------------------------------------------------------------------


@endpoint(
    "POST",
    "/api/ops/dead-letters/{dead_letter_id:str}/edit",
    action="dead_letters.repair",
    tag=_TAG,
    summary="Repair a dead letter: commit an edited event at head version + 1",
    description="The event is checked against the contract. Restaurant and subject must stay. The dead letter keeps the"
    " event as it was received. The edit is stored beside it, with the fields in which the two differ.",
    body=EditDeadLetter,
    answer=DeadLetter,
    errors=(404, 409, 504),
    example={
        "revision": 1,
        "why": "the terminal sent a negative tip",
        "event": {
            "restaurantid": "11111111-1111-4111-8111-111111111111",
            "subject": "table/2a6d1f0e-4c11-5c0a-9b1d-7f0c3b526f1e",
            "type": "ticketrail.table.updated.v1",
            "data": {"after": {"id": "2a6d1f0e-4c11-5c0a-9b1d-7f0c3b526f1e", "label": "Window", "seats": 4}},
        },
    },
)
async def edit_dead_letter(request: Call, dead_letter_id: str) -> ASGIApp:
    id_, identity = path_id(dead_letter_id, "dead_letter_id"), request.identity
    body = read_body(await request.whole_body(), EditDeadLetter)
    return success(
        await _repairs(request).edit(
            id_, body.event, revision=body.revision, why=body.why, actor=identity.actor, role=identity.role
        )
    )


@endpoint(
    "POST",
    "/api/ops/dead-letters/{dead_letter_id:str}/discard",
    action="dead_letters.repair",
    tag=_TAG,
    summary="Discard a dead letter, with the reason",
    description="If readers have seen the change of the dead letter, a new change reverts it. A discarded dead letter"
    " can be restored within the retention.",
    body=DiscardDeadLetter,
    answer=DeadLetter,
    errors=(404, 409, 504),
    example={"revision": 1, "why": "a test of the terminal"},
)
async def discard_dead_letter(request: Call, dead_letter_id: str) -> ASGIApp:
    id_, identity = path_id(dead_letter_id, "dead_letter_id"), request.identity
    body = read_body(await request.whole_body(), DiscardDeadLetter)
    return success(
        await _repairs(request).discard(
            id_, revision=body.revision, why=body.why, actor=identity.actor, role=identity.role
        )
    )


@endpoint(
    "POST",
    "/api/ops/dead-letters/{dead_letter_id:str}/restore",
    action="dead_letters.repair",
    tag=_TAG,
    summary="Open a discarded dead letter again",
    description="Answers 409 if it is not discarded, or if somebody has changed it since `revision`.",
    body=RestoreDeadLetter,
    answer=DeadLetter,
    errors=(404, 409),
    example={"revision": 2},
)
async def restore_dead_letter(request: Call, dead_letter_id: str) -> ASGIApp:
    id_, identity = path_id(dead_letter_id, "dead_letter_id"), request.identity
    body = read_body(await request.whole_body(), RestoreDeadLetter)
    return success(
        await _repairs(request).restore(
            id_, revision=body.revision, why=body.why, actor=identity.actor, role=identity.role
        )
    )


def _repairs(request: Call) -> DeadLetterRepairs:
    context = sync_context(request)
    return DeadLetterRepairs(context.ops, context.mirror, context.rail)


ROUTES = [
    list_dead_letters,
    list_groups,
    get_dead_letter,
    get_body,
    replay,
    discard_many,
    list_jobs,
    get_job,
    get_job_items,
    cancel_job,
    undo_job,
    edit_dead_letter,
    discard_dead_letter,
    restore_dead_letter,
]
