"""What the routes work with: everything that a request may need, in one place."""

from typing import Any

from msgspec import Struct

from services.orders.accounts import Accounts
from services.orders.changes import Changes, Receipt
from services.orders.commands import Commands
from services.orders.derived_figures import DerivedFigures
from services.orders.menu import Menus
from services.orders.reads import FoundState, Reads
from services.orders.sign_in import SignIn
from services.orders.views import PENDING, state_view, sync_of
from shared.entities.contract import encode
from shared.http.call import Call
from shared.http.replies import Reply, success
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres


class RouteContext(Struct, frozen=True):
    postgres: Postgres
    mirror: Mirror
    menus: Menus
    reads: Reads
    changes: Changes
    commands: Commands
    insight: DerivedFigures
    accounts: Accounts
    sign_in: SignIn


def context_of(request: Call) -> RouteContext:
    """From the application's state: Litestar's dependency injection opens a task group for every request."""
    context: RouteContext = request.app.state["context"]
    return context


def done_reply(done: Receipt, *, status: int = 200, **more: Any) -> Reply:
    headers = {"ETag": f'"{done.head.version}"'}
    sync = more.pop("sync", PENDING)
    more["visible"] = done.visible
    if done.replayed:
        headers["Idempotency-Replayed"] = "true"
    if done.durability is not None:
        more["durability"] = done.durability
    view = state_view(encode(done.state), done.head, sync, **more)
    return success(view, status=status, headers=headers)


def found_reply(found: FoundState, known: str | None, **more: Any) -> Reply:
    """`known`: the If-None-Match of the request."""
    headers = {"ETag": f'"{found.head.version}"', "X-Served-By": found.served_by}
    if known == headers["ETag"]:
        return Reply(b"", status=304, headers=headers)
    return success(state_view(found.state, found.head, sync_of(found), **more), headers=headers)
