"""/api/ops: dead letters, queues and the ledger, for operators. Admins see the letters of their own restaurant.

A handler parses, calls and replies; what is done to a letter is in mending.py and shared/postgres, its replays run in
the worker.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from litestar.types import ASGIApp
from msgspec import Struct

from services.sync.conflicts.decisions import ConflictDecisions
from services.sync.dead_letters import actions, replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.actions import OperatorAction
from services.sync.dead_letters.repairs import DeadLetterRepairs, shown_body
from services.sync.dead_letters.replay_jobs import ReplayItem, ReplayJob, ReplayPlan
from services.sync.dead_letters.requests import (
    DeadLetterFilter,
    DeadLettersQuery,
    DiscardDeadLetter,
    EditDeadLetter,
    LedgerQuery,
    ReplayItemsQuery,
    ReplayJobsQuery,
    ReplayRequest,
    RestoreDeadLetter,
)
from services.sync.dead_letters.store import Attempt, DeadLetter, DeadLetterEdit, DeadLetterGroup, DeadLetterQuery
from services.sync.ledger import queues
from services.sync.ledger.balance import Balance
from services.sync.ledger.ledger import take_balance
from shared.entities.contract import now
from shared.errors import InvalidInput, NotFound, Unavailable
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.cursors import page_of, read_cursor
from shared.http.endpoint import endpoint, path_id, read_query
from shared.http.replies import Reply, success
from shared.mirror.mirror import Mirror
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.rail.commit import Rail
from shared.security.tokens import Identity, Role
from shared.settings import Settings

_TAG = "Dead letters"


class OperatorContext(Struct, frozen=True):
    """What these routes work with."""

    settings: Settings
    ops: Postgres
    api: Postgres
    mirror: Mirror
    mending: DeadLetterRepairs
    deciding: ConflictDecisions

    @classmethod
    def of(cls, settings: Settings, api: Postgres, mirror: Mirror, rail: Rail) -> "OperatorContext":
        ops = Postgres(settings.database_ops_url, settings, size=4)
        return cls(
            settings, ops, api, mirror, DeadLetterRepairs(ops, mirror, rail), ConflictDecisions(ops, mirror, rail)
        )

    @asynccontextmanager
    async def seen_by(self, who: Identity) -> AsyncIterator[Connection]:
        """A connection that sees what the caller may see. Raises Unavailable."""
        try:
            if who.role is Role.OPERATOR:
                async with self.ops.connection() as connection:
                    yield connection
            else:
                async with self.api.tenant(who.tenant) as connection:
                    yield connection
        except UNAVAILABLE as error:
            raise Unavailable("this waits for the database", retry_after=2.0) from error


def operator_context(request: Call) -> OperatorContext:
    found: OperatorContext = request.app.state["operators"]
    return found


class ReplayOf(Struct, frozen=True):
    """A job that this letter was part of."""

    job: ReplayJob
    letter: ReplayItem


class DeadLetterView(Struct, frozen=True, kw_only=True):
    letter: DeadLetter
    attempts: tuple[Attempt, ...]
    headers: dict[str, Any]
    event: Any
    """The event, where the body is one."""
    body: str | None
    """As text where it is none, or too long; the whole of it, to the letter, at …/body."""
    body_cut: bool
    edits: list[DeadLetterEdit]
    replays: list[ReplayOf]
    acts: list[OperatorAction]


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
    async with operator_context(request).seen_by(request.identity) as connection:
        found = await dead_letter_store.page(connection, query.wanted(), before=before, limit=query.limit + 1)
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
    async with operator_context(request).seen_by(request.identity) as connection:
        return success(await dead_letter_store.groups(connection, query.wanted()))


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
    id_, who = path_id(letter_id, "letter_id"), request.identity
    async with operator_context(request).seen_by(who) as connection:
        return success(await dead_letter_view(connection, id_, operator=who.role is Role.OPERATOR))


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
    async with operator_context(request).seen_by(request.identity) as connection:
        letter = await dead_letter_store.one(connection, id_)
    if letter is None:
        raise NotFound("no such dead letter")
    return Reply(letter.body, content_type=b"application/octet-stream")


async def dead_letter_view(connection: Connection, id_: str, *, operator: bool) -> DeadLetterView:
    """What admins may not see (edits, replays and acts name other people's work) is left out. Raises NotFound."""
    letter = await dead_letter_store.one(connection, id_)
    if letter is None:
        raise NotFound("no such dead letter")
    event, body, cut = shown_body(letter.body)
    return DeadLetterView(
        letter=DeadLetter(**{name: getattr(letter, name) for name in DeadLetter.__struct_fields__}),
        attempts=letter.attempts,
        headers=letter.headers,
        event=event,
        body=body,
        body_cut=cut,
        edits=await dead_letter_store.edits(connection, id_) if operator else [],
        replays=[ReplayOf(*pair) for pair in await replay_jobs.of_letter(connection, id_)] if operator else [],
        acts=await actions.acts(connection, f"dead_letter/{id_}") if operator else [],
    )


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
    wanted, who = read_body(await request.whole_body(), ReplayRequest), request.identity
    chosen = wanted.wanted(tuple(str(id_) for id_ in wanted.ids))
    if chosen == DeadLetterQuery():
        raise InvalidInput("name letters by ids or by a filter, such as a fingerprint or a status", field="ids")
    async with (
        operator_context(request).seen_by(who) as connection,
        connection.transaction(isolation="repeatable_read"),  # the plan tells what the job is about
    ):
        plan = await replay_jobs.plan(connection, chosen)
        job = await replay_jobs.make(
            connection,
            chosen,
            kind="dry_run" if wanted.dry_run else "replay",
            actor=who.email or who.user_id,
            role=who.role,
            why=wanted.why,
            per_second=wanted.per_second,
            canary=wanted.canary,
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
    async with operator_context(request).seen_by(request.identity) as connection:
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
    async with operator_context(request).seen_by(request.identity) as connection:
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
    async with operator_context(request).seen_by(request.identity) as connection:
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
    id_, who = path_id(replay_id, "replay_id"), request.identity
    async with operator_context(request).seen_by(who) as connection:
        return success(await replay_jobs.cancel(connection, id_, actor=who.email or who.user_id, role=who.role))


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
    id_, who = path_id(letter_id, "letter_id"), request.identity
    wanted = read_body(await request.whole_body(), EditDeadLetter)
    actor = who.email or who.user_id
    return success(
        await operator_context(request).mending.edit(
            id_, wanted.event, revision=wanted.revision, why=wanted.why, actor=actor, role=who.role
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
    id_, who = path_id(letter_id, "letter_id"), request.identity
    wanted = read_body(await request.whole_body(), DiscardDeadLetter)
    actor = who.email or who.user_id
    return success(
        await operator_context(request).mending.discard(
            id_, revision=wanted.revision, why=wanted.why, actor=actor, role=who.role
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
    id_, who = path_id(letter_id, "letter_id"), request.identity
    wanted = read_body(await request.whole_body(), RestoreDeadLetter)
    actor = who.email or who.user_id
    return success(
        await operator_context(request).mending.restore(
            id_, revision=wanted.revision, why=wanted.why, actor=actor, role=who.role
        )
    )


@endpoint(
    "GET",
    "/api/ops/queues",
    action="ops.read",
    tag="Operators",
    summary="How full the queues are",
    description="From the management API; where that is away from the broker, without rates.",
    answer=queues.QueuesReport,
)
async def get_queues(request: Call) -> ASGIApp:
    parts = operator_context(request)
    return success(await queues.look(parts.settings, parts.ops))


@endpoint(
    "GET",
    "/api/ops/ledger",
    action="ops.read",
    tag="Operators",
    summary="Where every accepted change is, and which are nowhere",
    description="accepted = synced + queued + retrying + journaled + dead + unexplained, between two heartbeats.",
    query=LedgerQuery,
    answer=Balance,
)
async def get_ledger(request: Call) -> ASGIApp:
    query, parts = read_query(request, LedgerQuery), operator_context(request)
    since = query.since or now() - timedelta(hours=1)
    return success(await take_balance(parts.settings, parts.ops, parts.mirror, since=since))


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
    get_queues,
    get_ledger,
]
