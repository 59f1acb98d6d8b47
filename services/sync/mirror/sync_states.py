"""Repairs the sync states in the mirror, so that they agree with PostgreSQL.

The PostgreSQL writer notifies the mirror of each result, best effort (`mirror_notifier`). This module repairs the sync
states that the mirror missed or has lost: states that are committed although the mirror shows them as pending, changes
that have failed, and entities with an open conflict. It reads PostgreSQL and writes only the mirror.
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
    """Repairs sync states. Every method raises MirrorUnavailable, MirrorInDoubt or one of UNAVAILABLE if a store does
    not answer."""

    def __init__(self, settings: Settings, postgres: Postgres, mirror: Mirror) -> None:
        """`postgres`: a pool of the writer role."""
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self.open_conflicts = math.nan
        """The number of entities with an open conflict in all restaurants at the last count; NaN while unknown."""

    async def sync_pending(self) -> int:
        """Marks the states as synced that the mirror shows as pending although PostgreSQL has them. Returns their
        number."""
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
        """Sets and clears the state `conflict` in the mirror, and counts the open conflicts."""
        # The mirror is read first. Otherwise a conflict that opens between the two reads would be cleared in the
        # mirror.
        try:
            in_mirror = await self._mirror.conflicts()
        finally:  # count conflicts even if the mirror is unavailable, because most of them arise while it is lost
            in_postgres = await self._open_conflicts()
        await self._mirror.note_conflicts(sorted(in_postgres - in_mirror), sorted(in_mirror - in_postgres))

    async def _open_conflicts(self) -> set[str]:
        self.open_conflicts = math.nan
        async with self._postgres.connection() as connection:
            found = await states.list_conflicts(connection)
        self.open_conflicts = len(found)
        return {keys.member(*entity_key) for entity_key in found}
