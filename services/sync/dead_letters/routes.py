"""/api/ops/dead-letters and /api/ops/jobs: dead letters and their replays, for operators. Admins see the dead letters
of their own restaurant.

A handler parses, calls and replies. Repairs are in repairs.py, replay jobs in replay_jobs.py; the worker runs them.
"""

from litestar.types import ASGIApp
from msgspec import Struct

from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.repairs import DeadLetterRepairs
from services.sync.dead_letters.replay_jobs import ReplayItem, ReplayJob, ReplayPlan
from services.sync.dead_letters.requests import (
    DeadLetterFilter,
    DeadLettersQuery,
    DiscardDeadLetter,
    EditDeadLetter,
    ReplayItemsQuery,
    ReplayJobsQuery,
    ReplayRequest,
    RestoreDeadLetter,
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


# -- looking -----------------------------------------------------------------------------------------------------


@endpoint(
    "GET",
    "/api/ops/dead-letters",
    action="dead_letters.read",
    tag=_TAG,
    summary="List dead letters, the newest failure first",
    query=DeadLettersQuery,
    answer=DeadLetter,
    many=True,
)
async def list_letters(request: Call) -> ASGIApp:
    query = read_query(request, DeadLettersQuery)
    before = read_cursor(query.cursor) if query.cursor else None
    async with sync_context(request).connection_for(request.identity) as connection:
        found = await dead_letter_store.page(connection, query.query(), before=before, limit=query.limit + 1)
    page, pagination = page_of(found, query.limit, lambda one: (one.last_failed_at, one.id))
    return success(page, pagination=pagination)


@endpoint(
    "GET",
    "/api/ops/dead-letters/groups",
    action="dead_letters.read",
    tag=_TAG,
    summary="Dead letters by what they died of, the most first",
    description="`trend`: how many died last in each of the past 24 hours, the oldest hour first.",
    query=DeadLetterFilter,
    answer=list[DeadLetterGroup],
)
async def list_groups(request: Call) -> ASGIApp:
    query = read_query(request, DeadLetterFilter)
    async with sync_context(request).connection_for(request.identity) as connection:
        return success(await dead_letter_store.groups(connection, query.query()))


@endpoint(
    "GET",
    "/api/ops/dead-letters/{letter_id:str}",
    action="dead_letters.read",
    tag=_TAG,
    summary="Show a dead letter with all that is known of it",
    answer=DeadLetterView,
    errors=(404,),
)
async def get_letter(request: Call, letter_id: str) -> ASGIApp:
    id_, identity = path_id(letter_id, "letter_id"), request.identity
    async with sync_context(request).connection_for(identity) as connection:
        return success(await dead_letter_view(connection, id_, operator=identity.role is Role.OPERATOR))


@endpoint(
    "GET",
    "/api/ops/dead-letters/{letter_id:str}/body",
    action="dead_letters.read",
    tag=_TAG,
    summary="The body of a dead letter, to the letter",
    media_type="application/octet-stream",
    errors=(404,),
)
async def get_body(request: Call, letter_id: str) -> ASGIApp:
    id_ = path_id(letter_id, "letter_id")
    async with sync_context(request).connection_for(request.identity) as connection:
        letter = await dead_letter_store.one(connection, id_)
    if letter is None:
        raise NotFound("no such dead letter")
    return Reply(letter.body, content_type=b"application/octet-stream")


# -- replaying ---------------------------------------------------------------------------------------------------


@endpoint(
    "POST",
    "/api/ops/dead-letters/replay",
    action="dead_letters.mend",
    tag=_TAG,
    summary="Replay dead letters: one, many, a group or what a filter finds",
    description="Answers with the plan and the job that does it. A dry run executes each in a transaction that is"
    " rolled back, and says in the job's letters what would happen. Of letters that are named those that are not open"
    " are in the plan's `absent`; where none is, there is no job.",
    body=ReplayRequest,
    answer=Planned,
    status=202,
    errors=(404, 409),
    example={"fingerprint": "3f2a9c01d4be", "dry_run": True},
)
async def replay(request: Call) -> ASGIApp:
    replay_request, identity = read_body(await request.whole_body(), ReplayRequest), request.identity
    chosen = replay_request.query(tuple(str(id_) for id_ in replay_request.ids))
    if chosen == DeadLetterQuery():
        raise InvalidInput("name letters by ids or by a filter, such as a fingerprint or a status", field="ids")
    async with (
        sync_context(request).connection_for(identity) as connection,
        connection.transaction(isolation="repeatable_read"),  # the plan tells what the job is about
    ):
        plan = await replay_jobs.plan(connection, chosen)
        job = await replay_jobs.make(
            connection,
            chosen,
            kind="dry_run" if replay_request.dry_run else "replay",
            actor=identity.actor,
            role=identity.role,
            why=replay_request.why,
            per_second=replay_request.per_second,
            canary=replay_request.canary,
        )
    return success(Planned(plan, job), status=202)


@endpoint(
    "GET",
    "/api/ops/jobs",
    action="dead_letters.mend",
    tag=_TAG,
    summary="List replays and dry runs, the newest first",
    query=ReplayJobsQuery,
    answer=ReplayJob,
    many=True,
)
async def list_jobs(request: Call) -> ASGIApp:
    query = read_query(request, ReplayJobsQuery)
    before = read_cursor(query.cursor) if query.cursor else None
    async with sync_context(request).connection_for(request.identity) as connection:
        found = await replay_jobs.recent(connection, limit=query.limit + 1, before=before)
    page, pagination = page_of(found, query.limit, lambda one: (one.created_at, one.id))
    return success(page, pagination=pagination)


@endpoint(
    "GET",
    "/api/ops/jobs/{replay_id:str}",
    action="dead_letters.mend",
    tag=_TAG,
    summary="How far a replay has come",
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
    "/api/ops/jobs/{replay_id:str}/letters",
    action="dead_letters.mend",
    tag=_TAG,
    summary="What became of each letter of a job",
    query=ReplayItemsQuery,
    answer=list[ReplayItem],
    errors=(404,),
)
async def get_job_letters(request: Call, replay_id: str) -> ASGIApp:
    id_, query = path_id(replay_id, "replay_id"), read_query(request, ReplayItemsQuery)
    async with sync_context(request).connection_for(request.identity) as connection:
        if await replay_jobs.one(connection, id_) is None:
            raise NotFound("no such job")
        outcomes = (query.outcome,) if query.outcome else ()
        found = await replay_jobs.letters(connection, id_, outcomes=outcomes, after=query.after, limit=query.limit)
    return success(found)


@endpoint(
    "POST",
    "/api/ops/jobs/{replay_id:str}/cancel",
    action="dead_letters.mend",
    tag=_TAG,
    summary="Cancel a replay: nothing more of it is sent",
    answer=ReplayJob,
    errors=(404, 409),
)
async def cancel_job(request: Call, replay_id: str) -> ASGIApp:
    id_, identity = path_id(replay_id, "replay_id"), request.identity
    async with sync_context(request).connection_for(identity) as connection:
        return success(await replay_jobs.cancel(connection, id_, actor=identity.actor, role=identity.role))


# -- mending -----------------------------------------------------------------------------------------------------


@endpoint(
    "POST",
    "/api/ops/dead-letters/{letter_id:str}/edit",
    action="dead_letters.mend",
    tag=_TAG,
    summary="Mend a dead letter by hand: a new change at head + 1",
    description="Checked against the contract. What says whose it is stays. The letter is kept, with what differs.",
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
async def edit_letter(request: Call, letter_id: str) -> ASGIApp:
    id_, identity = path_id(letter_id, "letter_id"), request.identity
    body = read_body(await request.whole_body(), EditDeadLetter)
    return success(
        await _repairs(request).edit(
            id_, body.event, revision=body.revision, why=body.why, actor=identity.actor, role=identity.role
        )
    )


@endpoint(
    "POST",
    "/api/ops/dead-letters/{letter_id:str}/discard",
    action="dead_letters.mend",
    tag=_TAG,
    summary="Discard a dead letter, with the reason",
    description="What readers saw of it is taken back by a new change. It can be restored within the retention.",
    body=DiscardDeadLetter,
    answer=DeadLetter,
    errors=(404, 409, 504),
    example={"revision": 1, "why": "a test of the terminal"},
)
async def discard_letter(request: Call, letter_id: str) -> ASGIApp:
    id_, identity = path_id(letter_id, "letter_id"), request.identity
    body = read_body(await request.whole_body(), DiscardDeadLetter)
    return success(
        await _repairs(request).discard(
            id_, revision=body.revision, why=body.why, actor=identity.actor, role=identity.role
        )
    )


@endpoint(
    "POST",
    "/api/ops/dead-letters/{letter_id:str}/restore",
    action="dead_letters.mend",
    tag=_TAG,
    summary="Restore a dead letter that was discarded",
    body=RestoreDeadLetter,
    answer=DeadLetter,
    errors=(404, 409),
    example={"revision": 2},
)
async def restore_letter(request: Call, letter_id: str) -> ASGIApp:
    id_, identity = path_id(letter_id, "letter_id"), request.identity
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
    list_letters,
    list_groups,
    get_letter,
    get_body,
    replay,
    list_jobs,
    get_job,
    get_job_letters,
    cancel_job,
    edit_letter,
    discard_letter,
    restore_letter,
]
