"""The routes /api/ops/queues and /api/ops/ledger, for operators."""

from litestar.types import ASGIApp

from services.sync.ledger import queues
from services.sync.ledger.report import DEFAULT_SINCE, take_report
from services.sync.ledger.report_shapes import LedgerReport
from services.sync.ledger.requests import LedgerQuery
from services.sync.sync_context import sync_context
from shared.entities.contract import now
from shared.http.call import Call
from shared.http.endpoint import endpoint, read_query
from shared.http.replies import success


@endpoint(
    "GET",
    "/api/ops/queues",
    action="ops.read",
    tag="Operators",
    summary="Show depths, rates and ages of the queues",
    description="The figures come from the management API. While it is unavailable, they come from the broker, without"
    " rates.",
    answer=queues.QueuesReport,
)
async def get_queues(request: Call) -> ASGIApp:
    context = sync_context(request)
    return success(await queues.queues_report(context.settings, context.ops))


@endpoint(
    "GET",
    "/api/ops/ledger",
    action="ops.read",
    tag="Operators",
    summary="Show the place of every accepted change",
    description="accepted = synced + queued + retrying + journaled + dead + unexplained. An unexplained change is in no"
    " place where the ledger can find it. The report begins at a checkpoint of the ledger; nothing before it is open.",
    query=LedgerQuery,
    answer=LedgerReport,
)
async def get_ledger(request: Call) -> ASGIApp:
    query, context = read_query(request, LedgerQuery), sync_context(request)
    since = None if query.whole else query.since or now() - DEFAULT_SINCE
    async with context.reporting:
        return success(await take_report(context.settings, context.ops, context.mirror, since=since))


ROUTES = [get_queues, get_ledger]
