"""The reconciler repairs in the background what no request repairs. Every few seconds, for all tenants, it does this:

- It finishes stale claims: it records and reveals the claimed change (shared/rail/claim_finisher.py).
- It sets the sync state `conflict` in the mirror (mirror/open_conflicts.py).
- It loads or records again what stays pending in the mirror (lost_messages.py); only the leader of the ledger does.
- It restores payments that a fork left out (conflicts/forked_payments.py).
- It removes documents that have left the live window from the mirror, after it has asked PostgreSQL for each of them,
  and adds new restaurants.

Every step is idempotent and may run in two instances at the same time. While a backend is unavailable, the steps that
do not need it continue, and the other steps are tried again in the next round. Shutdown: it may be stopped at any time.
"""

import asyncio
import time
from datetime import datetime, timedelta

import structlog

from services.sync.conflicts.forked_payments import ForkedPayments
from services.sync.maintenance.lost_messages import KnownChanges, LostMessages
from services.sync.mirror.open_conflicts import OpenConflicts
from shared.entities import registry
from shared.entities.contract import Head, encode, now
from shared.entities.entity import Entity
from shared.errors import TicketrailError
from shared.lifecycle import BackgroundLoop
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.mirror.stored_heads import StoredHead
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.rail.commit import Rail
from shared.restaurants import list_restaurants
from shared.settings import Settings

log = structlog.get_logger(__name__)

_TRIM_INTERVAL_SECONDS = 60.0
_STATES_PER_QUERY = 500
_MAX_TRIM_QUERIES = 20


class Reconciler:
    def __init__(
        self, settings: Settings, postgres: Postgres, mirror: Mirror, rail: Rail, ledger: KnownChanges
    ) -> None:
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail
        self._forked_payments = ForkedPayments(postgres, mirror, rail)
        self.open_conflicts = OpenConflicts(postgres, mirror)
        self.lost_messages = LostMessages(settings, postgres, mirror, rail, ledger)
        self.loop = BackgroundLoop("reconciler", self._run)
        self._trimmed_at = 0.0

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        while True:
            for name, work in (
                ("finish_claims", self._rail.claim_finisher.finish_all),
                ("note_conflicts", self.open_conflicts.note),
                ("restore_payments", self._forked_payments.restore),
                ("record_lost_messages", self.lost_messages.record_when_due),
                ("trim", self._trim_at_times),
            ):
                try:
                    await work()
                except (MirrorUnavailable, MirrorInDoubt, TicketrailError, *UNAVAILABLE) as error:
                    log.warning("reconciler_waits", work=name, error=str(error) or type(error).__name__)
            self.loop.turned()
            await asyncio.sleep(self._settings.reconcile_interval_seconds)

    async def _trim_at_times(self) -> None:
        if time.monotonic() - self._trimmed_at >= _TRIM_INTERVAL_SECONDS:
            self._trimmed_at = time.monotonic()
            await self._keep_restaurants()
            await self.trim()

    async def _keep_restaurants(self) -> None:
        """Adds new restaurants to the mirror, because services read them there while PostgreSQL is unavailable."""
        async with self._postgres.connection() as connection:
            restaurants = await list_restaurants(connection)
        for restaurant in restaurants:
            await self._mirror.keep_restaurant(restaurant.id, encode(restaurant))

    async def trim(self) -> int:
        """Removes documents that have left the live window. Returns their number."""
        before = now() - timedelta(days=self._settings.mirror_window_days)
        trimmed = 0
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                if not entity.window_sql:
                    continue  # all documents of this entity stay
                kept = 0
                # There is more than one block only after an import.
                for _ in range(_MAX_TRIM_QUERIES):
                    read, removed = await self._trim_block(restaurant, entity, before, kept)
                    trimmed += removed
                    kept += read - removed
                    if read < _STATES_PER_QUERY:
                        break
        if trimmed:
            log.info("mirror_trimmed", documents=trimmed)
        return trimmed

    async def _trim_block(self, restaurant: str, entity: Entity, before: datetime, kept: int) -> tuple[int, int]:
        """Removes documents of one block. Returns (documents read, documents removed). `kept`: the number of documents
        that earlier blocks kept, which are skipped."""
        ids = await self._mirror.live_ids(
            restaurant, entity.name, max_score=before.timestamp(), limit=kept + _STATES_PER_QUERY
        )
        ids = ids[kept:]
        _, documents = await self._mirror.read(restaurant, entity.name, ids)
        old: dict[str, Head | None] = {}
        for id_, document in zip(ids, documents, strict=True):
            if document is None:
                old[id_] = None
            elif not document.pending:
                state = entity.decode_state(document.state)
                if not entity.live(state) and state.updated_at < before:
                    old[id_] = document.head
        return len(ids), await self._trim_synced(restaurant, entity, old) if old else 0

    async def _trim_synced(self, restaurant: str, entity: Entity, old: dict[str, Head | None]) -> int:
        """Removes the documents that PostgreSQL has now, in this state or a later one. It may have lost a commit since
        the document became synced (a failover without the last commits): such a document becomes pending again."""
        async with self._postgres.connection() as connection:
            heads = await states.heads(connection, entity, restaurant, list(old))
        kept = {id_ for id_, head in old.items() if head is not None and (id_ not in heads or heads[id_] < head)}
        if kept:
            log.error("synced_state_is_not_in_postgres", entity=entity.name, restaurant_id=restaurant, ids=sorted(kept))
            entities = [StoredHead(restaurant, entity.name, id_, heads.get(id_)) for id_ in sorted(kept)]
            await self._mirror.settle(entities, mark=True)
        seen = {id_: "" if head is None else head.change_id for id_, head in old.items() if id_ not in kept}
        return await self._mirror.trim(restaurant, entity.name, seen) if seen else 0
