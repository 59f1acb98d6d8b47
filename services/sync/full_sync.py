"""Comparing the mirror with PostgreSQL, and making it equal where it is behind.

PostgreSQL is compared with what the mirror holds of the live window. What is pending is ahead of PostgreSQL and right;
all else must be the same change. What is behind or lacking is written under the guard; what differs at the same change
is taken out and written anew, unless it changes meanwhile.
"""

from collections import Counter
from collections.abc import Callable
from datetime import timedelta

from msgspec import Struct, field

from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.mirror.mirror import Apply, Document, Mirror, hold_text
from shared.postgres import states
from shared.postgres.pool import Postgres
from shared.postgres.states import Stored
from shared.restaurants import every_restaurant
from shared.settings import Settings

_BLOCK = 200


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
        self._since = now() - timedelta(days=settings.mirror_window_days)
        self._postgres = postgres
        self._mirror = mirror

    async def run(self, *, mend: bool, tell: Callable[[Difference], None]) -> Compared:
        """Raises MirrorAway, MirrorInDoubt, or one of AWAY; may be repeated."""
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
                    await self._mirror.hold(
                        [(shop, order, hold_text(at, [(item, held)])) for shop, order, at, item, held in rows]
                    )
        return found

    async def _stored(
        self, entity: Entity, found: Compared, *, mend: bool, tell: Callable[[Difference], None]
    ) -> set[str]:
        known: set[str] = set()
        async with self._postgres.connection() as connection:
            async for block in states.live_window(connection, entity, self._since):
                by_restaurant: dict[str, list[tuple[str, Stored]]] = {}
                for stored in block:
                    state = entity.decode_state(stored.state)
                    known.add(state.id)
                    by_restaurant.setdefault(state.restaurant_id, []).append((state.id, stored))
                for restaurant, rows in by_restaurant.items():
                    _, documents = await self._mirror.read(restaurant, entity.name, [id_ for id_, _ in rows])
                    for (id_, stored), document in zip(rows, documents, strict=True):
                        found.compared += 1
                        await self._compare(entity, restaurant, id_, stored, document, found, mend=mend, tell=tell)
        return known

    async def _compare(
        self,
        entity: Entity,
        restaurant: str,
        id_: str,
        stored: Stored,
        document: Document | None,
        found: Compared,
        *,
        mend: bool,
        tell: Callable[[Difference], None],
    ) -> None:
        state = entity.decode_state(stored.state)
        if document is None and not entity.live(state) and entity.window_sql == "":
            return  # a dish that was deleted: the mirror need not know it
        if document is not None and document.standing > stored.standing:
            found.pending += 1
            return
        what = ""
        if document is None:
            what = "missing"
        elif document.standing < stored.standing:
            what = "behind"
        elif entity.decode_state(document.state) != state:
            what = "differs"
        if not what:
            return
        found.differences[what] += 1
        tell(Difference(entity.name, id_, restaurant, what))
        if mend:
            if what == "differs":
                await self._mirror.trim(restaurant, entity.name, {id_: stored.standing.change_id})
            await self._mirror.apply(
                [Apply(entity, state, stored.standing, stored.state, stored.accepted_at, "stored")]
            )
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
                standing = await states.standings(connection, entity, restaurant, piece)
            for id_, document in zip(piece, documents, strict=True):
                if document is None or id_ in standing:
                    continue
                if document.pending:
                    found.pending += 1
                    continue
                found.differences["unknown"] += 1
                tell(Difference(entity.name, id_, restaurant, "unknown"))
                if mend:
                    found.mended += await self._mirror.trim(restaurant, entity.name, {id_: document.standing.change_id})
