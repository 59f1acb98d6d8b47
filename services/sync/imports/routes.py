"""POST /api/sync/order: imports one order of another system."""

from litestar.types import ASGIApp
from msgspec import Struct

from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.external_orders import ExternalOrder
from shared.errors import Forbidden
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.endpoint import endpoint
from shared.http.replies import success


class ImportContext(Struct, frozen=True):
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
    action="sync.import",
    tag="Sync",
    summary="Import an order of another system",
    description="Needs an API key of the restaurant with the scope `sync:write`, in the header `x-sync-token` or as"
    " `Authorization: Bearer`. `external_id` (or `convex_id`) identifies the"
    " order, so that it exists once, however often it is sent. Of two updates, the one with the later `updated_at`"
    " wins. An update without `updated_at` never moves the status back. New"
    " payments, identified by their ids, are added.",
    body=ExternalOrder,
    answer=ImportedOrder,
    errors=(404, 409, 504),
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
    external_order = read_body(await request.whole_body(), ExternalOrder)
    identity = request.identity
    if str(external_order.restaurant_id) != identity.tenant:
        raise Forbidden("the API key belongs to another restaurant", code="wrong_restaurant", field="restaurant_id")
    done = await context.upserts.upsert(external_order, actor=identity.actor)
    return success(ImportedOrder(done.outcome, done.order.id, done.order.order_number, done.head.version))


ROUTES = [sync_order]
