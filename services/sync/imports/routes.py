"""POST /api/sync/order: imports one order of another system."""

import hashlib
import hmac

from litestar.types import ASGIApp
from msgspec import Struct

from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.external_orders import ExternalOrder
from shared.errors import Unauthenticated
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.endpoint import endpoint
from shared.http.replies import success
from shared.security.permissions import PUBLIC


class ImportContext(Struct, frozen=True):
    sync_token: str
    upserts: ExternalOrderUpserts


class ImportedOrder(Struct, frozen=True):
    outcome: str
    """`created`, `updated` or `unchanged`."""
    id: str
    order_number: str
    version: int


@endpoint(
    "POST",
    "/api/sync/order",
    action=PUBLIC,
    tag="Sync",
    summary="Import an order of another system",
    description="The header `x-sync-token` authenticates the request. `external_id` (or `convex_id`) identifies the"
    " order, so that it exists once, however often it is sent. Of two updates, the one with the later `updated_at`"
    " wins. An update without `updated_at` never moves the status back. New"
    " payments, identified by their ids, are added.",
    body=ExternalOrder,
    answer=ImportedOrder,
    errors=(401, 404, 409, 504),
    headers=("x-sync-token",),
    example={
        "restaurant_id": "11111111-1111-4111-8111-111111111111",
        "external_id": "pos-4711",
        "status": "completed",
        "items": [{"name": "Margherita", "quantity": 2, "unit_price": 980}],
        "payments": [{"id": "card-1", "amount": 2097, "method": "card"}],
    },
)
async def sync_order(request: Call) -> ASGIApp:
    context: ImportContext = request.app.state["imports"]
    check_token(request.header(b"x-sync-token"), context.sync_token)
    external_order = read_body(await request.whole_body(), ExternalOrder)
    done = await context.upserts.upsert(external_order)
    return success(ImportedOrder(done.outcome, done.order.id, done.order.order_number, done.head.version))


def check_token(given: str | None, expected: str) -> None:
    """Checks the token of a request. Raises Unauthenticated if it is wrong, and always if `expected` is empty."""
    # Hashes have equal length, so the duration of the comparison does not reveal how much of the token is right.
    given_hash = hashlib.sha256((given or "").encode("latin-1")).digest()
    expected_hash = hashlib.sha256(expected.encode()).digest()
    if not given or not hmac.compare_digest(given_hash, expected_hash):
        raise Unauthenticated("x-sync-token is missing or wrong", field="x-sync-token")


ROUTES = [sync_order]
