"""Comparing the mirror with PostgreSQL, and making it equal where it is behind.

PostgreSQL is compared with what the mirror holds of the live window. What is pending is ahead of PostgreSQL and right;
all else must be the same change. What is behind or lacking is written under the guard; what differs at the same change
is taken out and written anew, unless it changes meanwhile. A change that was accepted a moment ago may be in PostgreSQL
before it is revealed: what it makes different is looked at once more, later.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

from msgspec import Struct, field

from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.mirror.mirror import Apply, Document, Mirror
from shared.postgres import states
from shared.postgres.pool import Postgres
from shared.postgres.states import StoredState
from shared.restaurants import every_restaurant
from shared.settings import Settings

_BLOCK = 200
# Longer than a change takes from its acceptance until it is revealed.
_UNDER_WAY = timedelta(seconds=3)


class Difference(Struct, frozen=True):
    entity: str
    id: str
    restaurant_id: str
    what: str
    """missing, behind, differs (the same change with another state), or unknown (PostgreSQL has none such)"""


class Compared(Struct):
    compared: int = 0
    pending: int = 0
    """Ahead of PostgreSQL: on their way."""
    differences: Counter[str] = field(default_factory=Counter)
    mended: int = 0


class FullSync:
    def __init__(self, settings: Settings, postgres: Postgres, mirror: Mirror) -> None:
        """`postgres` as the writer role."""
        self._window = timedelta(days=settings.mirror_window_days)
        self._postgres = postgres
        self._mirror = mirror

    async def run(self, *, mend: bool, tell: Callable[[Difference], None]) -> Compared:
        """Raises MirrorUnavailable, MirrorInDoubt, or one of AWAY; may be repeated."""
        found = Compared()
        async with self._postgres.connection() as connection:
            restaurants = await every_restaurant(connection)
        if mend:
            for restaurant in restaurants:
                await self._mirror.keep_restaurant(restaurant.id, encode(restaurant))
        for entity in registry.ENTITIES.values():
            known = await self._stored(entity, found, mend=mend, tell=tell)
            for restaurant in restaurants:
                await self._unknown(entity, restaurant.id, known, found, mend=mend, tell=tell)
        if mend:
            async with self._postgres.connection() as connection:
                async for rows in states.holds(connection):
                    await self._mirror.hold(rows)
        return found

    async def _stored(
        self, entity: Entity, found: Compared, *, mend: bool, tell: Callable[[Difference], None]
    ) -> set[str]:
        known: set[str] = set()
        young: dict[str, list[str]] = {}
        async with self._postgres.connection() as connection:
            async for block in states.live_window(connection, entity, now() - self._window):
                by_restaurant: dict[str, list[tuple[str, StoredState]]] = {}
                for stored in block:
                    state = entity.decode_state(stored.state)
                    known.add(state.id)
                    by_restaurant.setdefault(state.restaurant_id, []).append((state.id, stored))
                for restaurant, rows in by_restaurant.items():
                    _, documents = await self._mirror.read(restaurant, entity.name, [id_ for id_, _ in rows])
                    for (id_, stored), document in zip(rows, documents, strict=True):
                        what = self._difference(entity, stored, document)
                        if what and stored.accepted_at > now() - _UNDER_WAY:
                            young.setdefault(restaurant, []).append(id_)
                            continue
                        found.compared += 1
                        found.pending += what is None
                        if what:
                            await self._differs(entity, restaurant, id_, what, stored, found, mend=mend, tell=tell)
        if young:
            await asyncio.sleep(_UNDER_WAY.total_seconds())
        for restaurant, ids in young.items():
            for id_ in ids:
                await self._look_again(entity, restaurant, id_, found, mend=mend, tell=tell)
        return known

    def _difference(self, entity: Entity, stored: StoredState, document: Document | None) -> str | None:
        """Empty: none; None: the mirror is ahead."""
        if document is None:
            state = entity.decode_state(stored.state)
            if entity.live(state):
                return "missing"
            # A dish that was deleted the mirror need not know; an order may have left the window meanwhile.
            needed = entity.window_sql and state.updated_at >= now() - self._window
            return "missing" if needed else ""
        if document.head > stored.head:
            return None
        if document.head < stored.head:
            return "behind"
        return "" if entity.decode_state(document.state) == entity.decode_state(stored.state) else "differs"

    async def _look_again(
        self,
        entity: Entity,
        restaurant: str,
        id_: str,
        found: Compared,
        *,
        mend: bool,
        tell: Callable[[Difference], None],
    ) -> None:
        found.compared += 1
        async with self._postgres.connection() as connection:
            stored = await states.one(connection, entity, restaurant, id_)
        _, (document,) = await self._mirror.read(restaurant, entity.name, [id_])
        if stored is None:
            return
        what = self._difference(entity, stored, document)
        found.pending += what is None
        if what:
            await self._differs(entity, restaurant, id_, what, stored, found, mend=mend, tell=tell)

    async def _differs(
        self,
        entity: Entity,
        restaurant: str,
        id_: str,
        what: str,
        stored: StoredState,
        found: Compared,
        *,
        mend: bool,
        tell: Callable[[Difference], None],
    ) -> None:
        found.differences[what] += 1
        tell(Difference(entity.name, id_, restaurant, what))
        if not mend:
            return
        if what == "differs":
            # PostgreSQL has this very change: it is not pending, and only what is not pending is taken out.
            await self._mirror.note_sync_states(restaurant, entity.name, [(id_, stored.head)])
            await self._mirror.trim(restaurant, entity.name, {id_: stored.head.change_id})
        state = entity.decode_state(stored.state)
        await self._mirror.apply([Apply(entity, state, stored.head, stored.state, stored.accepted_at, "stored")])
        found.mended += 1

    async def _unknown(
        self,
        entity: Entity,
        restaurant: str,
        known: set[str],
        found: Compared,
        *,
        mend: bool,
        tell: Callable[[Difference], None],
    ) -> None:
        """What the mirror alone has, and does not call pending: no store knows where it came from."""
        ids = [id_ for id_ in await self._mirror.live_ids(restaurant, entity.name) if id_ not in known]
        for start in range(0, len(ids), _BLOCK):
            piece = ids[start : start + _BLOCK]
            _, documents = await self._mirror.read(restaurant, entity.name, piece)
            async with self._postgres.connection() as connection:
                head = await states.heads(connection, entity, restaurant, piece)
            for id_, document in zip(piece, documents, strict=True):
                if document is None or id_ in head:
                    continue
                if document.pending:
                    found.pending += 1
                    continue
                found.differences["unknown"] += 1
                tell(Difference(entity.name, id_, restaurant, "unknown"))
                if mend:
                    found.mended += await self._mirror.trim(restaurant, entity.name, {id_: document.head.change_id})
