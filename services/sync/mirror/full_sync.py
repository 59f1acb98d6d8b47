"""The full sync compares the mirror with PostgreSQL, and repairs the mirror.

It compares the live window in PostgreSQL with the documents of the mirror. A document that is ahead of PostgreSQL is
pending, not different. Every other document must come from the same change as the row. If a document is behind or
missing, it is written under the guard. If a document comes from the same change but has another state, it is removed
and written again, unless it changes meanwhile. A new change may be in PostgreSQL before it is revealed, so recent
differences are compared once more after three seconds.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta

import msgspec
from msgspec import Struct, field

from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.mirror.mirror import Apply, Document, Mirror
from shared.mirror.stored_heads import StoredHead
from shared.postgres import states
from shared.postgres.pool import Postgres
from shared.postgres.states import StoredState
from shared.restaurants import list_restaurants
from shared.settings import Settings

_DOCUMENTS_PER_READ = 200
# A change takes less time than this from accept to reveal.
_IN_FLIGHT = timedelta(seconds=3)


class Difference(Struct, frozen=True):
    entity: str
    id: str
    restaurant_id: str
    what: str
    """missing, behind, differs (the same change with another state) or unknown (not in PostgreSQL)"""


class Compared(Struct):
    """The result of a full sync."""

    compared: int = 0
    pending: int = 0
    """The number of documents that are ahead of PostgreSQL."""
    differences: Counter[str] = field(default_factory=Counter)
    repaired: int = 0


def difference(entity: Entity, stored: StoredState, document: Document | None, *, window: timedelta) -> str | None:
    """Returns the name of the difference, an empty text if there is none, or None if the mirror is ahead. `window`:
    the live window."""
    if document is None:
        state = entity.decode_state(stored.state)
        if entity.live(state):
            return "missing"
        # The mirror may lack a deleted dish, and an order that has left the live window meanwhile.
        in_window = entity.window_sql and state.updated_at >= now() - window
        return "missing" if in_window else ""
    if document.head > stored.head:
        return None
    if document.head < stored.head:
        return "behind"
    # Encoded, because a decoded state lacks the fields of a newer release.
    same = document.state == stored.state or msgspec.json.decode(document.state) == msgspec.json.decode(stored.state)
    return "" if same else "differs"


class FullSync:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        mirror: Mirror,
        *,
        in_flight: timedelta = _IN_FLIGHT,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`postgres`: a pool of the writer role. `in_flight`: a difference is compared again if its change was accepted
        less than this time ago. `sleep`: waits for a number of seconds before that."""
        self._in_flight = in_flight
        self._sleep = sleep
        self._window = timedelta(days=settings.mirror_window_days)
        self._postgres = postgres
        self._mirror = mirror

    async def run(self, *, repair: bool, report: Callable[[Difference], None]) -> Compared:
        """Calls `report` for every difference, and repairs it if `repair` is set. Idempotent. Raises MirrorUnavailable,
        MirrorInDoubt or one of UNAVAILABLE."""
        found = Compared()
        async with self._postgres.connection() as connection:
            restaurants = await list_restaurants(connection)
        if repair:
            for restaurant in restaurants:
                await self._mirror.keep_restaurant(restaurant.id, encode(restaurant))
        for entity in registry.ENTITIES.values():
            known = await self._compare_stored(entity, found, repair=repair, report=report)
            for restaurant in restaurants:
                await self._report_unknown(entity, restaurant.id, known, found, repair=repair, report=report)
        if repair:
            async with self._postgres.connection() as connection:
                async for rows in states.holds(connection):
                    await self._mirror.hold(rows)
        return found

    async def _compare_stored(
        self, entity: Entity, found: Compared, *, repair: bool, report: Callable[[Difference], None]
    ) -> set[str]:
        """Compares the live window in PostgreSQL with the mirror. Returns the ids in this window."""
        known: set[str] = set()
        recent: dict[str, list[str]] = {}
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
                        what = difference(entity, stored, document, window=self._window)
                        if what and stored.accepted_at > now() - self._in_flight:
                            recent.setdefault(restaurant, []).append(id_)
                            continue
                        found.compared += 1
                        found.pending += what is None
                        if what:
                            await self._report_and_repair(
                                entity, restaurant, id_, what, stored, found, repair=repair, report=report
                            )
        if recent:
            await self._sleep(self._in_flight.total_seconds())
        for restaurant, ids in recent.items():
            for id_ in ids:
                await self._compare_again(entity, restaurant, id_, found, repair=repair, report=report)
        return known

    async def _compare_again(
        self,
        entity: Entity,
        restaurant: str,
        id_: str,
        found: Compared,
        *,
        repair: bool,
        report: Callable[[Difference], None],
    ) -> None:
        found.compared += 1
        async with self._postgres.connection() as connection:
            stored = await states.find_state(connection, entity, restaurant, id_)
        _, (document,) = await self._mirror.read(restaurant, entity.name, [id_])
        if stored is None:
            return
        what = difference(entity, stored, document, window=self._window)
        found.pending += what is None
        if what:
            await self._report_and_repair(entity, restaurant, id_, what, stored, found, repair=repair, report=report)

    async def _report_and_repair(
        self,
        entity: Entity,
        restaurant: str,
        id_: str,
        what: str,
        stored: StoredState,
        found: Compared,
        *,
        repair: bool,
        report: Callable[[Difference], None],
    ) -> None:
        found.differences[what] += 1
        report(Difference(entity.name, id_, restaurant, what))
        if not repair:
            return
        if what == "differs":
            # Mark the document as synced, because `trim` does not remove pending documents.
            await self._mirror.settle([StoredHead(restaurant, entity.name, id_, stored.head)])
            await self._mirror.trim(restaurant, entity.name, {id_: stored.head.change_id})
        state = entity.decode_state(stored.state)
        await self._mirror.apply([Apply(entity, state, stored.head, stored.state, stored.accepted_at, "stored")])
        found.repaired += 1

    async def _report_unknown(
        self,
        entity: Entity,
        restaurant: str,
        known: set[str],
        found: Compared,
        *,
        repair: bool,
        report: Callable[[Difference], None],
    ) -> None:
        """Reports documents that PostgreSQL lacks although they are not pending, so that their origin is unknown."""
        ids = [id_ for id_ in await self._mirror.live_ids(restaurant, entity.name) if id_ not in known]
        for start in range(0, len(ids), _DOCUMENTS_PER_READ):
            chunk = ids[start : start + _DOCUMENTS_PER_READ]
            _, documents = await self._mirror.read(restaurant, entity.name, chunk)
            async with self._postgres.connection() as connection:
                head = await states.heads(connection, entity, restaurant, chunk)
            for id_, document in zip(chunk, documents, strict=True):
                if document is None or id_ in head:
                    continue
                if document.pending:
                    found.pending += 1
                    continue
                found.differences["unknown"] += 1
                report(Difference(entity.name, id_, restaurant, "unknown"))
                if repair:
                    found.repaired += await self._mirror.trim(restaurant, entity.name, {id_: document.head.change_id})
