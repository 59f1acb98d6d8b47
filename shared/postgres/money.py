"""Reading what was paid, and what days came to."""

from datetime import date, datetime
from typing import Any

from msgspec import Struct

from shared.postgres.pool import Connection

_PAYMENTS = """
select id::text, order_id::text, amount, method, created_at, reference
from payments t
where t.restaurant_id = $1
    and ($2::timestamptz is null or t.created_at >= $2)
    and ($3::timestamptz is null or t.created_at <= $3)
    and ($4::text is null or t.method = $4)
    and ($5::uuid is null or t.order_id = $5)
    and ($6::timestamptz is null or (t.created_at, t.id) < ($6, $7::uuid))
order by t.created_at desc, t.id desc
limit $8
"""
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


class PaymentsWanted(Struct, frozen=True, kw_only=True):
    start: datetime | None = None
    end: datetime | None = None
    method: str | None = None
    order_id: str | None = None
    before: tuple[datetime, str] | None = None
    """The place of the last one of the page before."""
    limit: int = 50

    def match(self, payment: Any) -> bool:
        return (
            (self.start is None or payment.created_at >= self.start)
            and (self.end is None or payment.created_at <= self.end)
            and self.method in (None, payment.method)
            and self.order_id in (None, payment.order_id)
            and (self.before is None or (payment.created_at, payment.id) < self.before)
        )


async def payments(connection: Connection, restaurant: str, wanted: PaymentsWanted) -> list[dict[str, Any]]:
    """One more than the limit, the newest first."""
    at, id_ = wanted.before or (None, None)
    rows = await connection.fetch(
        _PAYMENTS, restaurant, wanted.start, wanted.end, wanted.method, wanted.order_id, at, id_, wanted.limit + 1
    )
    return [dict(row) for row in rows]


async def days(connection: Connection, restaurant: str, start: date, end: date) -> list[dict[str, Any]]:
    """A row for each business day that has orders."""
    return [dict(row) for row in await connection.fetch(_DAYS, restaurant, start, end)]
