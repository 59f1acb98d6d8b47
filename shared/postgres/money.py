"""Reads payments and the totals of business days."""

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

from msgspec import Struct

from shared.postgres.conditions import Conditions
from shared.postgres.pool import Connection

_DAYS = """
select business_day,
    count(*)::int8 as orders,
    count(*) filter (where status = 'cancelled')::int8 as cancelled,
    coalesce(sum(subtotal) filter (where status <> 'cancelled'), 0)::int8 as subtotal,
    coalesce(sum(tax_amount) filter (where status <> 'cancelled'), 0)::int8 as tax_amount,
    coalesce(sum(tip_amount) filter (where status <> 'cancelled'), 0)::int8 as tip_amount,
    coalesce(sum(discount_amount) filter (where status <> 'cancelled'), 0)::int8 as discount_amount,
    coalesce(sum(total) filter (where status <> 'cancelled'), 0)::int8 as total,
    count(*) filter (where payment_status = 'paid')::int8 as paid_orders
from orders
where restaurant_id = $1 and business_day between $2 and $3 and deleted_at is null
group by business_day
order by business_day
"""


# Finds the payments that the current state of their order lacks, for orders that were forked since $1.
_LEFT_OUT = """
select p.restaurant_id::text, p.order_id::text, p.id::text
from (select distinct restaurant_id, entity_id from conflicts where entity = 'order' and opened_at >= $1) forked
join payments p on p.restaurant_id = forked.restaurant_id and p.order_id = forked.entity_id
where not exists (
    select from orders o join changes c on c.restaurant_id = o.restaurant_id and c.change_id = o.change_id,
        json_array_elements(c.data->'after'->'payments') carried
    where o.restaurant_id = p.restaurant_id and o.id = p.order_id and carried->>'id' = p.id::text
)
order by 1, 2, p.created_at, p.id
limit $2
"""
_STATES_WITH_PAYMENTS = """
select (c.data->'after')::text as state from changes c
where c.restaurant_id = $1 and c.entity = 'order' and c.entity_id = $2 and exists (
    select from json_array_elements(c.data->'after'->'payments') carried where carried->>'id' = any($3::text[])
)
order by c.version, c.change_id
"""
MAX_LEFT_OUT_ROWS = 1_000


class PaymentFilter(Struct, frozen=True, kw_only=True):
    start: datetime | None = None
    end: datetime | None = None
    method: str | None = None
    order_id: str | None = None
    before: tuple[datetime, str] | None = None
    """(created_at, id) of the last payment on the previous page."""
    limit: int = 50

    def match(self, payment: Any) -> bool:
        """Returns whether a payment in the mirror belongs to the list."""
        return (
            (self.start is None or payment.created_at >= self.start)
            and (self.end is None or payment.created_at <= self.end)
            and self.method in (None, payment.method)
            and self.order_id in (None, payment.order_id)
            and (self.before is None or (payment.created_at, payment.id) < self.before)
        )


async def payments(connection: Connection, restaurant: str, requested: PaymentFilter) -> list[dict[str, Any]]:
    """Returns up to limit + 1 payments, newest first. The additional one shows that there is another page."""
    where = Conditions(restaurant)
    if requested.method is not None:
        where.add("t.method = {}", requested.method)
    if requested.order_id is not None:
        where.add("t.order_id = {}", requested.order_id)
    where.between("t.created_at, t.id", requested.start, requested.end, requested.before)
    rows = await connection.fetch(
        "select t.id::text, t.order_id::text, t.amount, t.method, t.created_at, t.reference"  # noqa: S608
        f" from payments t where {where} order by t.created_at desc, t.id desc limit {int(requested.limit) + 1}",
        *where.values,
    )
    return [dict(row) for row in rows]


async def left_out(connection: Connection, since: datetime) -> list[dict[str, Any]]:
    """Returns `restaurant_id`, `order_id` and `id` of up to MAX_LEFT_OUT_ROWS payments that the current state of their
    order lacks, over all tenants. Looks only at orders that were forked since `since`."""
    return [dict(row) for row in await connection.fetch(_LEFT_OUT, since, MAX_LEFT_OUT_ROWS)]


async def states_with_payments(
    connection: Connection, restaurant: str, order: str, payments: Sequence[str]
) -> list[bytes]:
    """Returns the recorded states of an order that have one of these payments, encoded, by version."""
    rows = await connection.fetch(_STATES_WITH_PAYMENTS, restaurant, order, list(payments))
    return [row["state"].encode() for row in rows]


async def days(connection: Connection, restaurant: str, start: date, end: date) -> list[dict[str, Any]]:
    """Returns one row for each business day that has orders, from `start` to `end`, both included."""
    return [dict(row) for row in await connection.fetch(_DAYS, restaurant, start, end)]
