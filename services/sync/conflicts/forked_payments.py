"""Payments that a fork left out: of two states of an order that both claim a version one stands, and what was paid in
the other is not in it. It is recorded anew, so that the order, its payment status and every store say what was paid.

Only for orders with a conflict that was opened since the last look: nothing else loses a payment. The conflict stays
open, for whatever else differs. Harmless when done twice or by two instances at once: a payment is known by its id.
"""

import itertools
from datetime import datetime, timedelta
from typing import Any

import msgspec
import structlog

from services.sync.head import current_head
from shared.entities import order as orders
from shared.entities.contract import now
from shared.entities.order import Payment, payment_status
from shared.errors import InvalidInput, Unavailable
from shared.mirror.mirror import Mirror
from shared.postgres import money
from shared.postgres.pool import Postgres
from shared.rail.commit import ClaimLost, Rail
from shared.rail.draft import Draft

log = structlog.get_logger(__name__)

_ENTITY = orders.ENTITY
# Conflicts are opened by this very process: what it has not seen to before it ended is younger than that.
_LOOK_BACK = timedelta(days=7)
# A conflict is dated when its transaction begins, and seen when that ends.
_OVERLAP = timedelta(minutes=5)


class ForkedPayments:
    def __init__(self, postgres: Postgres, mirror: Mirror, rail: Rail) -> None:
        """`postgres` as the writer role."""
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail
        self._since = now() - _LOOK_BACK

    async def bring_back(self) -> int:
        """Returns how many orders got payments back. Raises what the stores and the rail raise."""
        async with self._postgres.connection() as connection:
            looked_at: datetime = await connection.fetchval("select now()")
            found = await money.left_out(connection, self._since)
        brought = 0
        every = len(found) < money.MOST_LEFT_OUT
        for (restaurant, order), rows in itertools.groupby(found, lambda row: (row["restaurant_id"], row["order_id"])):
            payments = tuple(_payment(row) for row in rows)
            try:
                brought += await self._add(restaurant, order, payments)
            except (ClaimLost, Unavailable):
                every = False  # somebody changes the order at this moment, or the mirror is behind: next time
            except InvalidInput as error:
                log.error("forked_payments_not_brought_back", id=order, restaurant_id=restaurant, error=str(error))
        if every:
            self._since = looked_at - _OVERLAP
        return brought

    async def _add(self, restaurant: str, id_: str, payments: tuple[Payment, ...]) -> bool:
        """False: they are there already, and on their way to PostgreSQL."""
        async with self._postgres.connection() as connection:
            found = await current_head(connection, self._mirror, _ENTITY, restaurant, id_)
        if found is None:
            return False
        base, order = found
        known = {one.id for one in order.payments}
        payments = (*order.payments, *(one for one in payments if one.id not in known))
        if len(payments) == len(order.payments):
            return False
        at = max(now(), order.updated_at)
        after = msgspec.structs.replace(
            order, payments=payments, payment_status=payment_status(payments, order.total), updated_at=at
        )
        await self._rail.commit(
            Draft(
                entity=_ENTITY,
                event="payment_recorded",
                state=after,
                base=base,
                before=order,
                at=at,
                source="sync",
                actor="reconciler",
            )
        )
        log.warning("forked_payments_restored", id=id_, restaurant_id=restaurant, payments=len(payments))
        return True


def _payment(row: dict[str, Any]) -> Payment:
    return Payment(**{name: row[name] for name in ("id", "amount", "method", "created_at", "reference")})
