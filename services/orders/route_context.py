"""Holds the objects that the routes need, and builds the replies that several routes share."""

from typing import Any

from msgspec import Struct

from services.orders.accounts import Accounts
from services.orders.api_keys import ApiKeyStore
from services.orders.derived_figures import DerivedFigures
from services.orders.entity_changes import EntityChanges, Receipt
from services.orders.entity_reads import EntityReads, FoundState
from services.orders.menu import Menus
from services.orders.order_commands import OrderCommands
from services.orders.sign_in import SignIn
from services.orders.views import PENDING, hidden_from, state_view, sync_of
from shared.http.call import Call
from shared.http.etags import etag_of
from shared.http.limits import TokenBucket
from shared.http.replies import Reply, success
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.security.tokens import Identity


class RouteContext(Struct, frozen=True):
    postgres: Postgres
    mirror: Mirror
    menus: Menus
    reads: EntityReads
    changes: EntityChanges
    order_commands: OrderCommands
    figures: DerivedFigures
    accounts: Accounts
    sign_in: SignIn
    api_keys: ApiKeyStore
    guest_orders: TokenBucket
    """The orders that each guest session may still place."""


def context_of(request: Call) -> RouteContext:
    """Returns the context from the application's state. Litestar's dependency injection would open a task group for
    every request."""
    context: RouteContext = request.app.state["context"]
    return context


def receipt_reply(receipt: Receipt, identity: Identity, *, status: int = 200, **more: Any) -> Reply:
    """Returns the reply to a write, with version, visibility and durability. `more` has derived fields, and `sync` if
    it is known. `identity`: the caller, from whom fields may be hidden."""
    headers = {"ETag": etag_of(receipt.head.version)}
    sync = more.pop("sync", PENDING)
    more["visible"] = receipt.visible
    if receipt.replayed:
        headers["Idempotency-Replayed"] = "true"
    if receipt.durability is not None:
        more["durability"] = receipt.durability
    view = state_view(receipt.raw, receipt.head, sync, hidden=hidden_from(identity), **more)
    return success(view, status=status, headers=headers)


def found_reply(found: FoundState, identity: Identity, *, known: bool = False, **more: Any) -> Reply:
    """Returns the reply to a read: 304 if the client has the current version (`known`). `more` has derived fields.
    `identity`: the caller, from whom fields may be hidden."""
    headers = {"ETag": etag_of(found.head.version), "X-Served-By": found.served_by}
    if known:
        return Reply(b"", status=304, headers=headers)
    view = state_view(found.state, found.head, sync_of(found, identity), hidden=hidden_from(identity), **more)
    return success(view, headers=headers)
