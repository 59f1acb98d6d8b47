"""Reading orders: the mirror first, PostgreSQL behind it, and what is found there goes back to the mirror.

By id: a warm mirror that has the order has the truth. A cold one may be behind, or ahead, of PostgreSQL: then both are
asked and the guard decides.

Lists: what is pending (acknowledged, not in PostgreSQL yet) is taken first, then the page from PostgreSQL without
those, and the two are merged: an order that is committed in between is met at least once. Without PostgreSQL the list
comes from the mirror's live window, and says so.
"""

import asyncio

import msgspec
import structlog
from msgspec import Struct

from services.orders.filters import Filters
from shared.entities import order as orders
from shared.entities.contract import Standing
from shared.entities.order import Order
from shared.errors import NotFound, Unavailable
from shared.metrics import ReadMetrics
from shared.mirror.connection import MirrorAway, MirrorInDoubt
from shared.mirror.mirror import Apply, Document, Mirror
from shared.postgres import states
from shared.postgres.pool import AWAY, Connection, Postgres
from shared.postgres.states import Stored

log = structlog.get_logger(__name__)

_ENTITY = orders.ENTITY
_BLOCK = 200


class Seen(Struct, frozen=True):
    """Of an order, what decides who may see it: the rest of what a store holds need not be read to be sent."""

    customer_session_id: str | None = None
    deleted_at: str | None = None


_seen = msgspec.json.Decoder(Seen)


class Found(Struct, frozen=True):
    standing: Standing
    state: bytes
    served_by: str
    """mirror or postgres"""
    document: Document | None = None

    def order(self) -> Order:
        return msgspec.json.decode(self.state, type=Order)

    def seen(self) -> Seen:
        return _seen.decode(self.state)


class Page(Struct, frozen=True):
    found: list[Found]
    more: bool
    complete: bool
    """False: only what the mirror's live window holds, because PostgreSQL is away."""


class Reads:
    def __init__(self, postgres: Postgres, mirror: Mirror, metrics: ReadMetrics) -> None:
        self._metrics = metrics
        self._postgres = postgres
        self._mirror = mirror
        self._repairs: set[asyncio.Task[None]] = set()

    async def one(self, restaurant: str, id_: str) -> Found:
        """Raises NotFound, or Unavailable when no store that would have it answers."""
        document, warm = await self._from_mirror(restaurant, id_)
        if document is not None and warm:
            self._metrics.mirror.inc("hit")
            return Found(document.standing, document.state, "mirror", document)
        self._metrics.mirror.inc("miss" if warm else "away")
        try:
            stored = await self._from_postgres(restaurant, id_)
        except AWAY as error:
            if document is not None:
                return Found(document.standing, document.state, "mirror", document)
            raise Unavailable("the order cannot be read now", retry_after=2.0) from error
        if stored is not None and (document is None or stored.standing >= document.standing):
            if document is None:
                self._repair_later(stored)
            return Found(stored.standing, stored.state, "postgres")
        if document is not None:
            return Found(document.standing, document.state, "mirror", document)
        raise NotFound("no such order")

    async def base(self, restaurant: str, id_: str) -> Found:
        """What a change is built on; raises NotFound, or Unavailable: without a warm mirror nobody can say what stands,
        not even that there is no such order."""
        document, warm = await self._from_mirror(restaurant, id_)
        if not warm:
            raise Unavailable("changes wait until the mirror is warm", retry_after=2.0)
        if document is not None:
            return Found(document.standing, document.state, "mirror", document)
        try:
            stored = await self._from_postgres(restaurant, id_)
        except AWAY as error:
            raise Unavailable("the order cannot be read now", retry_after=2.0) from error
        if stored is None:
            raise NotFound("no such order")
        return Found(stored.standing, stored.state, "postgres")

    async def page(self, restaurant: str, filters: Filters) -> Page:
        """Raises Unavailable when neither store answers."""
        try:
            pending_ids = await self._mirror.pending_ids(restaurant, _ENTITY.name)
            warm, pending = await self._matching(restaurant, pending_ids, filters)
        except (MirrorAway, MirrorInDoubt) as error:
            log.info("list_without_mirror", error=str(error) or type(error).__name__)
            pending_ids, warm, pending = [], True, []
        try:
            async with self._postgres.tenant(restaurant) as connection:
                if not warm:
                    pending_ids, pending = await self._newer_than_stored(connection, restaurant, pending_ids, filters)
                stored = await states.page_of_orders(
                    connection, _ENTITY, restaurant, {**filters.for_sql(), "without": pending_ids}, filters.limit + 1
                )
        except AWAY as error:
            return await self._live_page(restaurant, filters, error)
        found = pending + [Found(row.standing, row.state, "postgres") for row in stored]
        return self._cut(found, filters, complete=True)

    async def drain(self) -> None:
        await asyncio.gather(*self._repairs, return_exceptions=True)

    # -- the parts ---------------------------------------------------------------------------------------------

    async def _from_mirror(self, restaurant: str, id_: str) -> tuple[Document | None, bool]:
        try:
            warm, (document,) = await self._mirror.read(restaurant, _ENTITY.name, [id_])
        except (MirrorAway, MirrorInDoubt):
            return None, False
        return document, warm

    async def _from_postgres(self, restaurant: str, id_: str) -> Stored | None:
        async with self._postgres.tenant(restaurant) as connection:
            return await states.one(connection, _ENTITY, restaurant, id_)

    async def _live_page(self, restaurant: str, filters: Filters, error: BaseException) -> Page:
        try:
            most = filters.before[0].timestamp() if filters.before else float("inf")
            ids = await self._mirror.live_ids(restaurant, _ENTITY.name, most=most)
            _, found = await self._matching(restaurant, ids, filters)
        except (MirrorAway, MirrorInDoubt):
            raise Unavailable("orders cannot be listed now", retry_after=2.0) from error
        return self._cut(found, filters, complete=False)

    async def _newer_than_stored(
        self, connection: Connection, restaurant: str, ids: list[str], filters: Filters
    ) -> tuple[list[str], list[Found]]:
        """What a cold mirror calls pending may be older than what PostgreSQL has: only what is newer counts. Returns
        the ids of that, and those of them that match."""
        try:
            _, documents = await self._mirror.read(restaurant, _ENTITY.name, ids)
        except (MirrorAway, MirrorInDoubt):
            return [], []
        stored = await states.standings(connection, _ENTITY, restaurant, ids)
        newer, matching = [], []
        for id_, document in zip(ids, documents, strict=True):
            if document is not None and (id_ not in stored or document.standing > stored[id_]):
                newer.append(id_)
                if filters.match(_ENTITY.decode_state(document.state)):
                    matching.append(Found(document.standing, document.state, "mirror", document))
        return newer, matching

    async def _matching(self, restaurant: str, ids: list[str], filters: Filters) -> tuple[bool, list[Found]]:
        """Of ids, the newest first, as many as the page needs; and whether the mirror was warm all the while."""
        found: list[Found] = []
        all_warm = True
        for start in range(0, len(ids), _BLOCK):
            warm, documents = await self._mirror.read(restaurant, _ENTITY.name, ids[start : start + _BLOCK])
            found += [
                Found(document.standing, document.state, "mirror", document)
                for document in documents
                if document is not None and filters.match(msgspec.json.decode(document.state, type=Order))
            ]
            all_warm = all_warm and warm
            if len(found) > filters.limit:
                break
        return all_warm, found

    def _cut(self, found: list[Found], filters: Filters, *, complete: bool) -> Page:
        def newest(one: Found) -> tuple[float, str]:
            order = one.order()
            return order.created_at.timestamp(), order.id

        found.sort(key=newest, reverse=True)
        return Page(found[: filters.limit], len(found) > filters.limit, complete)

    # -- repair ------------------------------------------------------------------------------------------------

    def _repair_later(self, stored: Stored) -> None:
        if self._mirror.available and len(self._repairs) < 100:
            self._metrics.mirror.inc("repair")
            task = asyncio.create_task(self._repair(stored), name="mirror-repair")
            self._repairs.add(task)
            task.add_done_callback(self._repairs.discard)

    async def _repair(self, stored: Stored) -> None:
        order = msgspec.json.decode(stored.state, type=Order)
        try:
            await self._mirror.apply(
                [Apply(_ENTITY, order, stored.standing, stored.state, stored.accepted_at, "stored")]
            )
        except (MirrorAway, MirrorInDoubt) as error:
            log.info("repair_skipped", order_id=order.id, error=str(error) or type(error).__name__)
