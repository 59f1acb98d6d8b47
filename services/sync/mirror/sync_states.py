"""Keeps the sync states in the mirror equal to PostgreSQL.

The PostgreSQL writer notifies the mirror as it writes (`mirror_notifier`), best effort. This module repairs what the
mirror missed or has lost: states that are committed although the mirror calls them pending, changes that have failed,
and entities with an open conflict. PostgreSQL is the source of all three, and this module writes nothing there.
"""

import math
from datetime import timedelta

import structlog

from services.sync.failures.last_failures import last_failures
from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.mirror import keys
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_STATES_PER_QUERY = 500


class SyncStates:
    """Every method raises MirrorUnavailable, MirrorInDoubt or one of UNAVAILABLE when a store does not answer."""

    def __init__(self, settings: Settings, postgres: Postgres, mirror: Mirror) -> None:
        """`postgres`: a pool of the writer role."""
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self.open_conflicts = math.nan
        """The number of entities with an open conflict, over all restaurants, at the last count; NaN while unknown."""

    async def sync_pending(self) -> int:
        """Marks states as synced that the mirror calls pending although PostgreSQL has them. Returns their number."""
        synced = 0
        before = now() - timedelta(seconds=self._settings.pending_check_after_seconds)
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                ids = await self._mirror.pending_ids(restaurant, entity.name)
                for start in range(0, len(ids), _STATES_PER_QUERY):
                    synced += await self._sync(
                        restaurant, entity, ids[start : start + _STATES_PER_QUERY], before.timestamp()
                    )
        if synced:
            log.info("sync_states_repaired", states=synced)
        return synced

    async def _sync(self, restaurant: str, entity: Entity, ids: list[str], before: float) -> int:
        accepted = await self._mirror.accepted_at(restaurant, entity.name, ids)
        old = [id_ for id_, at in zip(ids, accepted, strict=True) if at is None or at <= before]
        if not old:
            return 0
        async with self._postgres.connection() as connection:
            head = await states.heads(connection, entity, restaurant, old)
        if head:
            await self._mirror.note_sync_states(restaurant, entity.name, list(head.items()))
        await self._note_failed(restaurant, entity, old)
        return len(head)

    async def _note_failed(self, restaurant: str, entity: Entity, ids: list[str]) -> None:
        """Writes failures into the mirror again, because a rebuilt mirror has lost them."""
        _, documents = await self._mirror.read(restaurant, entity.name, ids)
        waiting = {
            document.head.change_id: (id_, document.head)
            for id_, document in zip(ids, documents, strict=True)
            if document is not None and document.pending and not document.failure
        }
        if not waiting:
            return
        async with self._postgres.connection() as connection:
            failed = await last_failures(connection, [(restaurant, change) for change in waiting])
        for change, failure in failed.items():
            await self._mirror.note_sync_states(restaurant, entity.name, [waiting[change]], failure=encode(failure))

    async def note_conflicts(self) -> None:
        # In this order: a conflict that is closed at the second query was open, or noted, before the first.
        try:
            noted = await self._mirror.conflicts()
        finally:  # count them without the mirror too: most conflicts arise while it is lost
            known = await self._in_conflict()
        await self._mirror.note_conflicts(sorted(known - noted), sorted(noted - known))

    async def _in_conflict(self) -> set[str]:
        self.open_conflicts = math.nan
        async with self._postgres.connection() as connection:
            found = await states.list_conflicts(connection)
        self.open_conflicts = len(found)
        return {keys.member(*one) for one in found}
