"""Reads entities from the mirror, or from PostgreSQL if the mirror does not have them.

By id: a warm mirror that has the entity has its current state. A cold mirror may be behind or ahead of PostgreSQL, so
both are read and the guard decides; if neither has the entity, the answer is 503, because 404 would say that it does
not exist. A state that the mirror lacks is written into it.

Lists: the pending entities are read from the mirror first, then the page from PostgreSQL without them; the two are
merged. A change that is committed in between is therefore found at least once. Only a warm mirror knows all pending
entities. With another one, or with none, the page has what PostgreSQL has, and is marked as incomplete. Without
PostgreSQL it comes from the mirror's live window, and is incomplete too.
"""

import asyncio
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from shared.entities.contract import Head, SyncState
from shared.entities.entity import Entity
from shared.entities.selection import Selection
from shared.errors import NotFound, Unavailable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Apply, Document, Mirror
from shared.observability.metrics import ReadMetrics
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.postgres.states import StoredState

log = structlog.get_logger(__name__)

_BLOCK_ENTITIES = 200
_MAX_REPAIRS = 100


class AccessFields(Struct, frozen=True):
    """The fields that decide who may see a state. The others stay encoded."""

    customer_session_id: str | None = None
    deleted_at: str | None = None


_access_fields = msgspec.json.Decoder(AccessFields)


class FoundState(Struct, frozen=True):
    entity: Entity
    head: Head
    state: bytes
    served_by: str
    """`mirror` or `postgres`, for the header X-Served-By."""
    document: Document | None = None
    """The mirror's document, which has the sync state. None if the state comes from PostgreSQL."""
    conflict: bool = False
    """True if PostgreSQL has an open conflict of the entity. For a state from the mirror, see `document.conflict`."""

    @property
    def sync_state(self) -> SyncState:
        """The sync state. An open conflict hides every other state, because an operator must decide it."""
        known = self.document
        if self.conflict or (known is not None and known.conflict):
            return SyncState.CONFLICT
        if known is None or not known.pending:
            return SyncState.SYNCED
        return SyncState.FAILED if known.failure else SyncState.PENDING

    def decoded(self) -> Any:
        return self.entity.decode_state(self.state)

    def access_fields(self) -> AccessFields:
        return _access_fields.decode(self.state)


def _from_stored(entity: Entity, stored: StoredState) -> FoundState:
    return FoundState(entity, stored.head, stored.state, "postgres", conflict=stored.conflict)


def _matches(entity: Entity, document: Document, selection: Selection, state: SyncState | None) -> FoundState | None:
    found = FoundState(entity, document.head, document.state, "mirror", document)
    fits = (state is None or found.sync_state is state) and selection.match(found.decoded())
    return found if fits else None


class Page(Struct, frozen=True):
    found: list[FoundState]
    """The entities of the page, newest first."""
    more: bool
    """True if there is a next page."""
    complete: bool
    """False if entities or newer states may be missing, because PostgreSQL was unavailable or the mirror not warm."""
    served_by: str = "postgres"
    """`mirror` or `postgres`, for the header X-Served-By."""


class EntityReads:
    def __init__(self, postgres: Postgres, mirror: Mirror, metrics: ReadMetrics) -> None:
        self._metrics = metrics
        self._postgres = postgres
        self._mirror = mirror
        self._repairs: set[asyncio.Task[None]] = set()

    async def one(self, entity: Entity, restaurant: str, id_: str) -> FoundState:
        """Returns the current state of an entity. Raises NotFound, and Unavailable if no store can answer. Only a warm
        mirror proves that an entity is absent: PostgreSQL may not have it yet."""
        document, warm = await self._from_mirror(entity, restaurant, id_)
        if document is not None and warm:
            self._metrics.mirror.inc("hit")
            return FoundState(entity, document.head, document.state, "mirror", document)
        self._metrics.mirror.inc("miss" if warm else "unavailable")
        try:
            stored = await self._from_postgres(entity, restaurant, id_)
        except UNAVAILABLE as error:
            if document is not None:
                return FoundState(entity, document.head, document.state, "mirror", document)
            raise Unavailable(f"the {entity.name} cannot be read now", retry_after=2.0) from error
        if stored is not None and (document is None or stored.head >= document.head):
            if document is None:
                self._repair_later(entity, stored)
            return _from_stored(entity, stored)
        if document is not None:
            return FoundState(entity, document.head, document.state, "mirror", document)
        if not warm:
            raise Unavailable(f"the {entity.name} is not known before the mirror is warm; retry", retry_after=2.0)
        raise NotFound(f"no such {entity.name}")

    async def page(self, entity: Entity, restaurant: str, selection: Selection, state: SyncState | None = None) -> Page:
        """Returns one page of a list. With `state`, it has only entities with this sync state. Raises
        Unavailable if neither store answers."""
        if state in (SyncState.PENDING, SyncState.FAILED):
            return await self._pending_page(entity, restaurant, selection, state)
        try:
            pending_ids = await self._mirror.pending_ids(restaurant, entity.name)
            warm, pending = await self._matching(entity, restaurant, pending_ids, selection, state)
        except (MirrorUnavailable, MirrorInDoubt) as error:
            log.info("list_without_mirror", error=str(error) or type(error).__name__)
            pending_ids, warm, pending = [], False, []
        try:
            async with self._postgres.tenant(restaurant) as connection:
                if pending_ids and not warm:
                    pending_ids, pending = await self._newer_than_stored(
                        entity, connection, restaurant, pending_ids, selection, state
                    )
                stored, left_out = await states.list_page(
                    connection,
                    entity,
                    restaurant,
                    selection,
                    without=pending_ids,
                    conflict=None if state is None else state is SyncState.CONFLICT,
                )
        except UNAVAILABLE as error:
            return await self._live_page(entity, restaurant, selection, state, error)
        rows = [_from_stored(entity, row) for row in stored]
        return self._cut(pending + rows, selection, complete=warm, last=rows[-1] if left_out else None)

    async def drain(self) -> None:
        """Waits until the running repairs of the mirror have ended."""
        await asyncio.gather(*self._repairs, return_exceptions=True)

    # -- the two stores ------------------------------------------------------------------------------------------

    async def _from_mirror(self, entity: Entity, restaurant: str, id_: str) -> tuple[Document | None, bool]:
        try:
            warm, (document,) = await self._mirror.read(restaurant, entity.name, [id_])
        except (MirrorUnavailable, MirrorInDoubt):
            return None, False
        return document, warm

    async def _from_postgres(self, entity: Entity, restaurant: str, id_: str) -> StoredState | None:
        async with self._postgres.tenant(restaurant) as connection:
            return await states.find_state(connection, entity, restaurant, id_)

    async def _pending_page(self, entity: Entity, restaurant: str, selection: Selection, state: SyncState) -> Page:
        """Returns a page of pending or failed entities, which only a warm mirror knows. Raises Unavailable."""
        try:
            read_ids = self._mirror.failed_ids if state is SyncState.FAILED else self._mirror.pending_ids
            ids = await read_ids(restaurant, entity.name)
            warm, found = await self._matching(entity, restaurant, ids, selection, state)
        except (MirrorUnavailable, MirrorInDoubt):
            warm, found = False, []
        if not warm:
            raise Unavailable("only a warm mirror can list pending changes", retry_after=2.0)
        return self._cut(found, selection, complete=True)

    async def _live_page(
        self, entity: Entity, restaurant: str, selection: Selection, state: SyncState | None, error: BaseException
    ) -> Page:
        try:
            most = selection.before[0].timestamp() if selection.before else float("inf")
            ids = await self._mirror.live_ids(restaurant, entity.name, max_score=most)
            _, found = await self._matching(entity, restaurant, ids, selection, state)
        except (MirrorUnavailable, MirrorInDoubt):
            raise Unavailable("the list cannot be read now", retry_after=2.0) from error
        return self._cut(found, selection, complete=False, served_by="mirror")

    async def _newer_than_stored(
        self,
        entity: Entity,
        connection: Connection,
        restaurant: str,
        ids: list[str],
        selection: Selection,
        state: SyncState | None,
    ) -> tuple[list[str], list[FoundState]]:
        """Finds the pending documents of a cold mirror that are newer than the states in PostgreSQL, because a cold
        mirror may lag. Returns the ids of all of them, and the states of those that match the selection."""
        try:
            _, documents = await self._mirror.read(restaurant, entity.name, ids)
        except (MirrorUnavailable, MirrorInDoubt):
            return [], []
        stored = await states.heads(connection, entity, restaurant, ids)
        newer, matching = [], []
        for id_, document in zip(ids, documents, strict=True):
            if document is not None and (id_ not in stored or document.head > stored[id_]):
                newer.append(id_)
                if (found := _matches(entity, document, selection, state)) is not None:
                    matching.append(found)
        return newer, matching

    async def _matching(
        self, entity: Entity, restaurant: str, ids: list[str], selection: Selection, state: SyncState | None
    ) -> tuple[bool, list[FoundState]]:
        """Returns (whether the mirror was warm for every read, matching states). `ids` must have the newest first,
        because reading stops when the page is full. Without ids it asks only whether the mirror is warm."""
        found: list[FoundState] = []
        all_warm = True
        for start in range(0, max(len(ids), 1), _BLOCK_ENTITIES):
            warm, documents = await self._mirror.read(restaurant, entity.name, ids[start : start + _BLOCK_ENTITIES])
            found += [
                one
                for document in documents
                if document is not None and (one := _matches(entity, document, selection, state)) is not None
            ]
            all_warm = all_warm and warm
            if len(found) > selection.limit:
                break
        return all_warm, found

    def _cut(
        self,
        found: list[FoundState],
        selection: Selection,
        *,
        complete: bool,
        served_by: str = "postgres",
        last: FoundState | None = None,
    ) -> Page:
        """`last`: the page must end here, because PostgreSQL has left out what comes after it."""

        def newest(one: FoundState) -> tuple[float, str]:
            state = one.decoded()
            return state.created_at.timestamp(), state.id

        placed = sorted(((newest(one), one) for one in found), key=lambda pair: pair[0], reverse=True)
        end = None if last is None else newest(last)
        kept = [one for place, one in placed if end is None or place >= end]
        return Page(kept[: selection.limit], len(kept) > selection.limit or end is not None, complete, served_by)

    # -- repair ------------------------------------------------------------------------------------------------

    def _repair_later(self, entity: Entity, stored: StoredState) -> None:
        if self._mirror.available and len(self._repairs) < _MAX_REPAIRS:
            self._metrics.mirror.inc("repair")
            task = asyncio.create_task(self._repair(entity, stored), name="mirror-repair")
            self._repairs.add(task)
            task.add_done_callback(self._repairs.discard)

    async def _repair(self, entity: Entity, stored: StoredState) -> None:
        state = entity.decode_state(stored.state)
        try:
            await self._mirror.apply([Apply(entity, state, stored.head, stored.state, stored.accepted_at, "stored")])
        except (MirrorUnavailable, MirrorInDoubt) as error:
            log.info(
                "mirror_repair_skipped", subject=f"{entity.name}/{state.id}", error=str(error) or type(error).__name__
            )
