"""What the mirror says of the way of each state to PostgreSQL, kept in step with what PostgreSQL says.

The worker tells the mirror as it writes (settlement.py), best effort. What the mirror missed then, or lost since, it is
told here: what is written although it calls it pending, what has failed on its way, and which entities have an open
conflict. PostgreSQL is the source of all three; nothing is written there.
"""

import math
from datetime import timedelta

import structlog

from services.sync.ledger import store as ledger_store
from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.mirror import keys
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_BLOCK = 500


class SyncStates:
    """Every method raises what the stores raise."""

    def __init__(self, settings: Settings, postgres: Postgres, mirror: Mirror) -> None:
        """`postgres` as the writer role."""
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self.open_conflicts = math.nan
        """Entities with one, over all restaurants, as they were counted last; NaN while nobody knows."""

    async def settle_pending(self) -> int:
        """Returns how many states were found in PostgreSQL although the mirror called them pending."""
        settled = 0
        before = now() - timedelta(seconds=self._settings.pending_check_after_seconds)
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                ids = await self._mirror.pending_ids(restaurant, entity.name)
                for start in range(0, len(ids), _BLOCK):
                    settled += await self._settle(restaurant, entity, ids[start : start + _BLOCK], before.timestamp())
        if settled:
            log.info("reconciler_settled", states=settled)
        return settled

    async def _settle(self, restaurant: str, entity: Entity, ids: list[str], before: float) -> int:
        accepted = await self._mirror.accepted_at(restaurant, entity.name, ids)
        old = [id_ for id_, at in zip(ids, accepted, strict=True) if at is None or at <= before]
        if not old:
            return 0
        async with self._postgres.connection() as connection:
            head = await states.heads(connection, entity, restaurant, old)
        if head:
            await self._mirror.note_sync_states(restaurant, entity.name, list(head.items()))
        await self._tell_failed(restaurant, entity, old)
        return len(head)

    async def _tell_failed(self, restaurant: str, entity: Entity, ids: list[str]) -> None:
        """A mirror that was filled anew has forgotten what failed."""
        _, documents = await self._mirror.read(restaurant, entity.name, ids)
        waiting = {
            document.head.change_id: (id_, document.head)
            for id_, document in zip(ids, documents, strict=True)
            if document is not None and document.pending and not document.failure
        }
        if not waiting:
            return
        async with self._postgres.connection() as connection:
            failed = await ledger_store.failures(connection, [(restaurant, change) for change in waiting])
        for change, failure in failed.items():
            await self._mirror.note_sync_states(restaurant, entity.name, [waiting[change]], failure=encode(failure))

    async def note_conflicts(self) -> None:
        # In this order: what is closed by the second look was open, or told, before the first.
        try:
            told = await self._mirror.conflicts()
        finally:  # they are counted without the mirror too: when that is lost most of them are made
            known = await self._in_conflict()
        await self._mirror.note_conflicts(sorted(known - told), sorted(told - known))

    async def _in_conflict(self) -> set[str]:
        self.open_conflicts = math.nan
        async with self._postgres.connection() as connection:
            found = await states.in_conflict(connection)
        self.open_conflicts = len(found)
        return {keys.member(*one) for one in found}
