"""Bringing orders of other systems in: once however often each is sent, by the way of every change."""

import asyncio
import random
from typing import Literal

from msgspec import Struct

from services.sync.external import ExternalOrder, lane_of, merged, new_order
from shared.entities import order as orders
from shared.entities.contract import Lane, Standing, now
from shared.entities.order import Order
from shared.errors import Conflict, NotFound, Unavailable
from shared.mirror.connection import MirrorAway, MirrorInDoubt
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import AWAY, Postgres
from shared.rail.commit import Draft, Lost, Rail
from shared.restaurants import Restaurant, find_restaurant

_ENTITY = orders.ENTITY
_TRIES = 5


class Upserted(Struct, frozen=True):
    outcome: Literal["created", "updated", "unchanged"]
    order: Order
    standing: Standing


class Upserts:
    def __init__(self, postgres: Postgres, mirror: Mirror, rail: Rail, *, source: str) -> None:
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail
        self._source = source
        self._restaurants: dict[str, Restaurant] = {}

    async def upsert(self, wanted: ExternalOrder, *, lane: Lane | None = None) -> Upserted:
        """`lane`: by default the one that the order deserves. Raises InvalidInput, NotFound (no such restaurant),
        Conflict, Unavailable, OutcomeUnknown."""
        restaurant = await self._restaurant(str(wanted.restaurant_id))
        for tried in range(_TRIES):
            at = now()
            state = new_order(wanted, restaurant, at)
            found = await self._standing(restaurant.id, state.id)
            before, base = (None, None) if found is None else (found[1], found[0])
            event = "created"
            if before is not None and base is not None:
                after = merged(before, state, dated=wanted.updated_at is not None)
                if after is None:
                    return Upserted("unchanged", before, base)
                event = "status_changed" if after.status is not before.status else "updated"
                state = after
            draft = Draft(
                entity=_ENTITY,
                event=event,
                state=state,
                base=base,
                before=before,
                at=at,
                source=self._source,
                lane=lane or lane_of(state, at),
                existing=lambda id_=state.id: self._standing(restaurant.id, id_),  # type: ignore[misc]
            )
            try:
                done = await self._rail.commit(draft)
            except Lost:
                await asyncio.sleep(0.02 * (tried + 1) * random.uniform(0.5, 1.5))  # noqa: S311  (jitter)
                continue
            return Upserted("created" if before is None else "updated", done.state, done.standing)
        raise Conflict("others change this order again and again", code="version_conflict")

    async def _restaurant(self, id_: str) -> Restaurant:
        known = self._restaurants.get(id_)
        if known is None:
            try:
                async with self._postgres.connection() as connection:
                    known = await find_restaurant(connection, id_)
            except AWAY as error:
                raise Unavailable("the restaurant cannot be looked up now", retry_after=2.0) from error
            if known is None:
                raise NotFound("no such restaurant", field="restaurant_id")
            self._restaurants[id_] = known
        return known

    async def _standing(self, restaurant: str, id_: str) -> tuple[Standing, Order] | None:
        """From a warm mirror, or from PostgreSQL where the mirror has not got it. Raises Unavailable."""
        try:
            warm, (document,) = await self._mirror.read(restaurant, _ENTITY.name, [id_])
        except (MirrorAway, MirrorInDoubt):
            warm, document = False, None
        if document is not None and warm:
            return document.standing, _ENTITY.decode_state(document.state)
        try:
            async with self._postgres.tenant(restaurant) as connection:
                stored = await states.one(connection, _ENTITY, restaurant, id_)
        except AWAY as error:
            raise Unavailable("the order cannot be looked up now", retry_after=2.0) from error
        return None if stored is None else (stored.standing, _ENTITY.decode_state(stored.state))
