"""Restores payments that a fork left out: the losing state of an order can hold payments that the winner lacks.

A new change adds the missing payments to the order and to its payment status, in every store. Each round checks only
orders whose conflict was opened since the previous round, because only a fork can leave a payment out. The conflict
stays open for its other differences. Rounds may be repeated and may run in two instances, because a payment is
identified by its id.
"""

import itertools
from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec
import structlog
from msgspec import Raw, Struct

from shared.entities import order as orders
from shared.entities.contract import encode, now
from shared.entities.order import payment_status
from shared.entities.overlay import field_of, with_field
from shared.errors import InvalidInput, Unavailable
from shared.mirror.mirror import Mirror
from shared.postgres import money
from shared.postgres.pool import Postgres
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Heads
from shared.rail.outcomes import ClaimLost

log = structlog.get_logger(__name__)

_ENTITY = orders.ENTITY
# The first round checks conflicts up to this age, because the previous process may not have handled them.
_LOOK_BACK = timedelta(days=7)
# `opened_at` is the time at which the transaction began, but the conflict is visible only after the commit.
_OVERLAP = timedelta(minutes=5)


class _Identified(Struct):
    id: str


class ForkedPayments:
    def __init__(self, postgres: Postgres, mirror: Mirror, rail: Rail) -> None:
        """`postgres`: a pool of the writer role."""
        self._postgres = postgres
        self._heads = Heads(mirror, lambda _: postgres.connection())
        self._rail = rail
        self._since = now() - _LOOK_BACK

    async def restore(self) -> int:
        """Runs one round. Returns the number of orders whose payments were restored. Raises the errors of the stores,
        and those of `Rail.commit` except ClaimLost, Unavailable and InvalidInput."""
        async with self._postgres.connection() as connection:
            looked_at: datetime = await connection.fetchval("select now()")
            found = await money.left_out(connection, self._since)
        restored = 0
        complete = len(found) < money.MAX_LEFT_OUT_ROWS
        for (restaurant, order), rows in itertools.groupby(found, lambda row: (row["restaurant_id"], row["order_id"])):
            payments = [row["id"] for row in rows]
            try:
                restored += await self._add(restaurant, order, payments)
            except (ClaimLost, Unavailable):
                complete = False  # another change came first, or the mirror is behind; the next round tries again
            except InvalidInput as error:
                log.error("forked_payments_not_restored", id=order, restaurant_id=restaurant, error=str(error))
        if complete:
            self._since = looked_at - _OVERLAP
        return restored

    async def _add(self, restaurant: str, id_: str, payments: Sequence[str]) -> bool:
        """Adds the payments with these ids to an order. Returns False if the order does not exist, or if its head
        already has them."""
        found = await self._heads.head(_ENTITY, restaurant, id_)
        if found is None:
            return False
        async with self._postgres.connection() as connection:
            sides = await money.states_with_payments(connection, restaurant, id_, payments)
        # The table lacks the fields that this release does not know, so the payments come from the forked states.
        carried = {id_: raw for side in sides for id_, raw in _payments(side).items()}
        before = _payments(found.raw)
        added = [carried[one] for one in payments if one in carried and one not in before]
        if not added:
            return False
        made_from = with_field(_ENTITY.upcast(found.raw), "payments", encode([*before.values(), *added]))
        order = _ENTITY.decode_state(made_from)
        at = max(now(), order.updated_at)
        status = payment_status(order.payments, order.total)
        await self._rail.commit(
            Draft(
                entity=_ENTITY,
                event="payment_recorded",
                state=msgspec.structs.replace(order, payment_status=status, updated_at=at),
                base=found,
                made_from=made_from,
                at=at,
                source="sync",
                actor="reconciler",
            )
        )
        log.warning("forked_payments_restored", id=id_, restaurant_id=restaurant, payments=len(order.payments))
        return True


def _payments(order: bytes) -> dict[str, Raw]:
    """Returns id -> encoded payment of the payments of an encoded order."""
    found = msgspec.json.decode(field_of(_ENTITY.upcast(order), "payments"), type=list[Raw])
    return {msgspec.json.decode(raw, type=_Identified).id: raw for raw in found}
