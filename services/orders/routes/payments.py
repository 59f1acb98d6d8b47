"""/api/orders/{id}/payments, /api/payments and /api/orders/summary: payments, and totals by business day."""

from datetime import date, datetime, timedelta

from litestar.types import ASGIApp
from msgspec import Struct

from services.orders.idempotency import RequestKey
from services.orders.order_example import PAID, PAYMENT
from services.orders.requests import DaysQuery, PaymentsQuery, RecordPayment
from services.orders.route_context import RouteContext, context_of, receipt_reply
from shared.entities import order as orders
from shared.entities.contract import now
from shared.entities.order import Payment
from shared.errors import InvalidInput, Unavailable
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.cursors import page_of, read_cursor
from shared.http.endpoint import View, endpoint, path_id, read_query
from shared.http.replies import success
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.postgres import money
from shared.postgres.pool import UNAVAILABLE

_MAX_DAYS = 400
_BLOCK_ORDERS = 200


class ListedPayment(Struct, frozen=True):
    id: str
    order_id: str
    amount: int
    method: str
    created_at: datetime
    reference: str | None = None


class Day(Struct, frozen=True):
    """The totals of a business day, in minor units. Deleted orders do not count. Cancelled orders count, but their
    amounts do not."""

    business_day: date
    orders: int
    cancelled: int
    subtotal: int
    tax_amount: int
    tip_amount: int
    discount_amount: int
    total: int
    paid_orders: int


class Summary(Struct, frozen=True):
    days: list[Day]
    orders: int
    total: int
    currency: str


@endpoint(
    "POST",
    "/api/orders/{order_id:str}/payments",
    action="payments.record",
    tag="Payments",
    summary="Record a payment or a refund (a negative amount)",
    description="A payment with the same `id` or the same `Idempotency-Key` is recorded once, however often it is sent."
    " A refund cannot exceed what was paid.",
    body=RecordPayment,
    answer=View(orders.ENTITY, {"payment": Payment}),
    status=201,
    errors=(404,),
    headers=("Idempotency-Key",),
    example={name: PAYMENT[name] for name in ("id", "amount", "method", "reference")},
    reply_example=PAID,
)
async def record_payment(request: Call, order_id: str) -> ASGIApp:
    key = RequestKey.of(request, "POST /api/orders/{order_id}/payments")
    requested, id_ = read_body(await request.whole_body(), RecordPayment), path_id(order_id, "order_id")
    receipt, payment = await context_of(request).order_commands.pay(
        request.identity, id_, requested, key.fact_id(requested.id, id_)
    )
    return receipt_reply(receipt, request.identity, status=201, payment=payment)


@endpoint(
    "GET",
    "/api/payments",
    action="payments.read",
    tag="Payments",
    summary="List payments, newest first",
    description="Refunds have negative amounts. While PostgreSQL is unavailable, the list has only payments of"
    " recent orders. While the mirror is not warm, it may lack those that PostgreSQL does not have yet. `complete` is"
    " then false.",
    query=PaymentsQuery,
    answer=ListedPayment,
    many=True,
)
async def list_payments(request: Call) -> ASGIApp:
    query = read_query(request, PaymentsQuery)
    context, tenant = context_of(request), request.identity.tenant
    requested = money.PaymentFilter(
        start=query.from_,
        end=query.to,
        method=query.method,
        order_id=str(query.order_id) if query.order_id else None,
        before=read_cursor(query.cursor) if query.cursor else None,
        limit=query.limit,
    )
    # Pending orders are read first, as in every list, so that a change that is committed in between is found at least
    # once.
    try:
        pending = await context.mirror.pending_ids(tenant, orders.ENTITY.name)
        complete, seen = await _payments_in_mirror(context, tenant, pending)
    except (MirrorUnavailable, MirrorInDoubt):
        complete, seen = False, []
    try:
        async with context.postgres.tenant(tenant) as connection:
            seen += [ListedPayment(**row) for row in await money.payments(connection, tenant, requested)]
    except UNAVAILABLE as error:
        try:
            recent = await context.mirror.live_ids(tenant, orders.ENTITY.name)
            _, seen = await _payments_in_mirror(context, tenant, recent)
        except (MirrorUnavailable, MirrorInDoubt):
            raise Unavailable("payments cannot be listed now", retry_after=2.0) from error
        complete = False
    found = {(one.order_id, one.id): one for one in seen if requested.match(one)}
    newest = sorted(found.values(), key=lambda one: (one.created_at, one.id), reverse=True)
    page, pagination = page_of(newest, query.limit, lambda one: (one.created_at, one.id))
    return success(page, pagination=pagination, complete=complete)


async def _payments_in_mirror(context: RouteContext, tenant: str, ids: list[str]) -> tuple[bool, list[ListedPayment]]:
    """Returns (whether the mirror is warm, the payments of these orders in it). Raises MirrorUnavailable,
    MirrorInDoubt."""
    all_warm, found = True, []
    for start in range(0, max(len(ids), 1), _BLOCK_ORDERS):
        warm, documents = await context.mirror.read(tenant, orders.ENTITY.name, ids[start : start + _BLOCK_ORDERS])
        all_warm = all_warm and warm
        for document in documents:
            if document is not None:
                order = orders.ENTITY.decode_state(document.state)
                found += [
                    ListedPayment(one.id, order.id, one.amount, one.method, one.created_at, one.reference)
                    for one in order.payments
                ]
    return all_warm, found


@endpoint(
    "GET",
    "/api/orders/summary",
    action="orders.summary",
    tag="Orders",
    summary="Show totals by business day",
    description="The totals come from PostgreSQL and are late by the sync lag. The default is the last thirty days.",
    query=DaysQuery,
    answer=Summary,
)
async def summary(request: Call) -> ASGIApp:
    query = read_query(request, DaysQuery)
    context, tenant = context_of(request), request.identity.tenant
    restaurant = (await context.menus.book(tenant)).restaurant
    today = restaurant.business_day(now())
    for field, day in (("from", query.from_), ("to", query.to)):
        if day is not None and not 1970 <= day.year < 2200:
            raise InvalidInput("must be a day between 1970 and 2200", field=field)
    end = query.to or today
    start = query.from_ or end - timedelta(days=29)
    if not 0 <= (end - start).days < _MAX_DAYS:
        raise InvalidInput(f"must be at most {_MAX_DAYS - 1} days before `to`, and not after it", field="from")
    try:
        async with context.postgres.tenant(tenant) as connection:
            days = [Day(**row) for row in await money.days(connection, tenant, start, end)]
    except UNAVAILABLE as error:
        raise Unavailable("totals need the database, which is unavailable", retry_after=2.0) from error
    return success(Summary(days, sum(day.orders for day in days), sum(day.total for day in days), restaurant.currency))


ROUTES = [summary, record_payment, list_payments]
