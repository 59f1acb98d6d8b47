"""Commits orders of other systems: an external order becomes one order, however often it is sent."""

import asyncio
import random
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import msgspec
from msgspec import Struct

from services.sync.imports.external_orders import (
    ExternalOrder,
    event_of,
    lane_of_external,
    new_order,
    order_id,
    updated,
)
from shared.entities import order as orders
from shared.entities.contract import Head, Lane, now
from shared.entities.order import Order
from shared.errors import Conflict, NotFound, Unavailable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Heads, Standing
from shared.rail.idempotency import Creations
from shared.rail.outcomes import ClaimLost, Committed
from shared.restaurants import Restaurant, find_restaurant

_ENTITY = orders.ENTITY
# The wait is longer than the age at which a claim is stale, so that the claim finisher can finish an abandoned claim.
_WAIT_SECONDS = 4.0
_RESTAURANT_CACHE_SECONDS = 60.0


class UpsertedOrder(Struct, frozen=True):
    outcome: Literal["created", "updated", "unchanged"]
    order: Order
    head: Head


class ExternalOrderUpserts:
    def __init__(self, postgres: Postgres, mirror: Mirror, rail: Rail, *, source: str, window_days: int) -> None:
        """`source`: the source of the changes, such as "import". `window_days`: the live window of the mirror."""
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail
        self._source = source
        self._heads = Heads(mirror, postgres.tenant, window=timedelta(days=window_days))
        self._creations = Creations(rail, self._heads)
        self._restaurants: dict[str, tuple[float, Restaurant]] = {}

    async def unknown(self, external_orders: Sequence[ExternalOrder]) -> set[str]:
        """Returns our ids of the orders that neither the mirror nor PostgreSQL has, for the argument `new` of `upsert`.
        Needs a pool of the writer role. Raises one of UNAVAILABLE."""
        by_restaurant: dict[str, list[str]] = {}
        for order in external_orders:
            restaurant = str(order.restaurant_id)
            by_restaurant.setdefault(restaurant, []).append(order_id(restaurant, order.name))
        try:
            seen = await asyncio.gather(
                *(self._mirror.read(restaurant, _ENTITY.name, ids) for restaurant, ids in by_restaurant.items())
            )
        except (MirrorUnavailable, MirrorInDoubt):
            return set()
        found: set[str] = set()
        async with self._postgres.connection() as connection:
            for (restaurant, ids), (warm, documents) in zip(by_restaurant.items(), seen, strict=True):
                missing = [id_ for id_, document in zip(ids, documents, strict=True) if warm and document is None]
                stored = await states.heads(connection, _ENTITY, restaurant, missing) if missing else {}
                found.update(id_ for id_ in missing if id_ not in stored)
        return found

    async def upsert(
        self, external: ExternalOrder, *, lane: Lane | None = None, new: bool = False, actor: str | None = None
    ) -> UpsertedOrder:
        """Creates or updates the order. `actor`: the API key that sent it. `lane`: None chooses the lane by the age of
        the order. `new`: neither store had the order a moment ago, so `upsert` does not read it first; if the order
        exists by now, the claim fails and `upsert` reads it. Raises InvalidInput, NotFound (no such restaurant),
        Conflict, Unavailable, OutcomeUnknown."""
        restaurant = await self.restaurant(str(external.restaurant_id))
        deadline, tried = time.monotonic() + _WAIT_SECONDS, 0
        found: Standing | None = None
        while True:
            at = now()
            state = new_order(external, restaurant, at)
            known = found if found or (new and tried == 0) else await self._known(restaurant.id, state.id, external)
            base, before = (None, None) if known is None else (known.head, known.state)
            if before is not None and base is not None:
                after = updated(before, state, external, restaurant, at)
                if after is None:
                    return UpsertedOrder("unchanged", before, base)
                state = after
            draft = Draft(
                entity=_ENTITY,
                event=event_of(before, state),
                state=state,
                base=known,
                at=at,
                source=self._source,
                lane=lane or lane_of_external(external, before, state, at),
                keyed=True,
                actor=actor,
            )
            lost: ClaimLost | None = None
            found = None
            try:
                done = await (self._creations.create(draft) if base is None else self._rail.commit(draft))
                if isinstance(done, Committed):
                    return UpsertedOrder("created" if before is None else "updated", done.state, done.head)
                found = done
            except ClaimLost as error:
                lost = error
            if time.monotonic() > deadline:
                raise Conflict("too many concurrent updates of this order; retry", code="version_conflict") from lost
            tried += 1
            await asyncio.sleep(0.01 * min(tried, 10) * random.uniform(0.5, 1.5))  # noqa: S311  (jitter)

    async def state(self, external: ExternalOrder) -> Order | None:
        """Returns the current state of the order, or None if it does not exist. Raises Unavailable."""
        restaurant = str(external.restaurant_id)
        known = await self._known(restaurant, order_id(restaurant, external.name), external)
        return None if known is None else known.state

    async def restaurant(self, id_: str) -> Restaurant:
        """Returns a restaurant, at most a minute old while PostgreSQL is available. Raises NotFound, Unavailable."""
        expires_at, known = self._restaurants.get(id_, (0.0, None))
        if known is not None and time.monotonic() < expires_at:
            return known
        try:
            async with self._postgres.connection() as connection:
                found = await find_restaurant(connection, id_)
        except UNAVAILABLE as error:
            found = known or await self._restaurant_in_mirror(id_)
            if found is None:
                raise Unavailable("the restaurant cannot be read; retry", retry_after=2.0) from error
        if found is None:
            raise NotFound("no such restaurant", field="restaurant_id")
        self._restaurants[id_] = time.monotonic() + _RESTAURANT_CACHE_SECONDS, found
        return found

    async def _restaurant_in_mirror(self, id_: str) -> Restaurant | None:
        try:
            encoded = await self._mirror.restaurant(id_)
        except (MirrorUnavailable, MirrorInDoubt):
            return None
        return None if encoded is None else msgspec.json.decode(encoded, type=Restaurant)

    async def _known(self, restaurant: str, id_: str, external: ExternalOrder) -> Standing | None:
        """Returns the standing of an order, or None if it does not exist. Without a warm mirror an order can only be
        created, so this raises Unavailable if the order exists, and if no store can answer."""
        try:
            return await self._heads.head(_ENTITY, restaurant, id_, external.created_at)
        except Unavailable:
            if await self._heads.earlier(_ENTITY, restaurant, id_) is not None:
                raise
            return None
