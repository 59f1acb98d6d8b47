"""The reconciler repairs in the background what no request repairs. Every few seconds, over all tenants, it

- finishes stale claims: records and reveals the same change;
- repairs the sync states in the mirror (mirror/sync_states.py);
- records a lost message again: the state of a change that is pending for more than five minutes although every lane was
  empty for that long becomes a new change, because its message is lost (a queue was purged, or a journal does not
  return). While lanes are behind, or a journal drains after RabbitMQ was unavailable, nothing counts as lost;
- restores payments of a state that a fork superseded (conflicts/forked_payments.py);
- reports versions without predecessor that are older than ten minutes;
- removes documents that have left the live window from the mirror, once PostgreSQL has them, and adds new restaurants.

Every step is idempotent and may run in two instances at the same time. While a backend is unavailable, the steps that
do not need it go on, and the others are tried again in the next round. Shutdown: at any time.
"""

import asyncio
import time
from datetime import datetime, timedelta

import structlog

from services.sync.conflicts.forked_payments import ForkedPayments
from services.sync.mirror.sync_states import SyncStates
from shared.entities import registry
from shared.entities.contract import BrokenContract, Lane, encode, now
from shared.entities.entity import Entity
from shared.errors import InvalidInput, TicketrailError
from shared.lifecycle import BackgroundLoop
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.rail.commit import ClaimLost, OutOfStock, Rail
from shared.rail.draft import Draft
from shared.restaurants import every_restaurant
from shared.settings import Settings

log = structlog.get_logger(__name__)

_TRIM_INTERVAL_SECONDS = 60.0
_STATES_PER_QUERY = 500
_GAP_MINUTES = 10
_PAUSE_PER_SECOND_OF_WORK = 9
"""Seconds to pause for each second that repairing the sync states took."""
_MAX_TRIM_QUERIES = 20
_MIN_BEHIND_SECONDS = 2.0
_LANES_EMPTIED = "select min(sent_at) from heartbeats where lane = any($1) having count(*) = cardinality($1)"


class Reconciler:
    def __init__(self, settings: Settings, postgres: Postgres, mirror: Mirror, rail: Rail) -> None:
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail
        self._forked_payments = ForkedPayments(postgres, mirror, rail)
        self.states = SyncStates(settings, postgres, mirror)
        self.loop = BackgroundLoop("reconciler", self._run)
        self._trimmed_at = 0.0
        self._sync_states_again_at = 0.0
        self._recorded_again_at = time.monotonic()
        self._empty_since: float | None = None

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        while True:
            for work in (
                self.finish_claims,
                self._sync_states_at_times,
                self.states.note_conflicts,
                self._forked_payments.restore,
                self._record_again_at_times,
                self._trim_at_times,
            ):
                try:
                    await work()
                except (MirrorUnavailable, MirrorInDoubt, TicketrailError, *UNAVAILABLE) as error:
                    log.warning("reconciler_waits", work=work.__name__, error=str(error) or type(error).__name__)
            self.loop.turned()
            await asyncio.sleep(self._settings.reconcile_interval_seconds)

    async def finish_claims(self) -> int:
        """Finishes stale claims. Returns their number."""
        finished = 0
        for member in await self._mirror.stale_claims():
            left = await self._mirror.mark(member)
            if left is None:
                continue
            try:
                await self._rail.finish(left)
            except BrokenContract as error:
                # Made by a newer release, or broken: leave it to an instance that can read it, and go on.
                log.error("claim_not_finished", member=member, reason=error.reason, error=str(error))
                continue
            finished += 1
        return finished

    async def _sync_states_at_times(self) -> None:
        """Uses at most a tenth of the time: while PostgreSQL is behind by tens of thousands of changes, looking each of
        them up repeatedly would slow down the writer."""
        began = time.monotonic()
        if began < self._sync_states_again_at:
            return
        try:
            await self.states.sync_pending()
        finally:
            ended = time.monotonic()
            self._sync_states_again_at = ended + _PAUSE_PER_SECOND_OF_WORK * (ended - began)

    async def _record_again_at_times(self) -> None:
        """Checks in every round whether heartbeats come through every lane, to know since when they do."""
        try:
            emptied = await self._lanes_emptied()
        except UNAVAILABLE:
            self._empty_since = None
            raise
        began = time.monotonic()
        if emptied is None or (now() - emptied).total_seconds() > self._behind:
            self._empty_since = None
            return
        if self._empty_since is None:
            self._empty_since = began
        if began - max(self._empty_since, self._recorded_again_at) >= self._settings.lost_message_seconds:
            self._recorded_again_at = began
            await self.record_lost_again()

    @property
    def _behind(self) -> float:
        """The greatest age of the last heartbeat of an empty lane, in seconds."""
        return (
            max(_MIN_BEHIND_SECONDS, 3 * self._settings.heartbeat_interval_seconds)
            + self._settings.reconcile_interval_seconds
        )

    async def _lanes_emptied(self) -> datetime | None:
        """Returns a moment before which every sent message has left its lane; None while a lane had no heartbeat."""
        async with self._postgres.connection() as connection:
            found: datetime | None = await connection.fetchval(_LANES_EMPTIED, [lane.value for lane in Lane])
        return found

    async def record_lost_again(self) -> int:
        """Records lost changes again and returns their number. Failed changes are left to the operators."""
        emptied = await self._lanes_emptied()
        if emptied is None:
            return 0
        before = min(emptied, now()) - timedelta(seconds=self._settings.lost_message_seconds)
        recorded = 0
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                ids = await self._mirror.pending_ids(restaurant, entity.name)
                for start in range(0, len(ids), _STATES_PER_QUERY):
                    recorded += await self._record_again(
                        restaurant, entity, ids[start : start + _STATES_PER_QUERY], before.timestamp()
                    )
        return recorded

    async def _record_again(self, restaurant: str, entity: Entity, ids: list[str], before: float) -> int:
        accepted = await self._mirror.accepted_at(restaurant, entity.name, ids)
        old = [id_ for id_, at in zip(ids, accepted, strict=True) if at is not None and at <= before]
        if not old:
            return 0
        async with self._postgres.connection() as connection:
            head = await states.heads(connection, entity, restaurant, old)
        _, documents = await self._mirror.read(restaurant, entity.name, old)
        recorded = 0
        for id_, document in zip(old, documents, strict=True):
            if document is None or not document.pending or document.failure:
                continue
            if id_ in head and head[id_] >= document.head:
                continue
            state = entity.decode_state(document.state)
            draft = Draft(
                entity=entity,
                event="updated",
                state=state,
                base=document.head,
                before=state,
                at=now(),
                source="sync",
                actor="reconciler",
            )
            try:
                await self._rail.commit(draft)
            except ClaimLost:
                continue  # another change was made meanwhile, and carries the whole state
            except (InvalidInput, OutOfStock) as error:
                # It would be refused every time: go on with the others.
                log.error("not_recorded_again", entity=entity.name, id=id_, restaurant_id=restaurant, error=str(error))
                continue
            recorded += 1
            log.error("recorded_again", entity=entity.name, id=id_, restaurant_id=restaurant)
        return recorded

    async def _trim_at_times(self) -> None:
        if time.monotonic() - self._trimmed_at >= _TRIM_INTERVAL_SECONDS:
            self._trimmed_at = time.monotonic()
            await self._keep_restaurants()
            await self.report_gaps()
            await self.trim()

    async def _keep_restaurants(self) -> None:
        """Adds new restaurants to the mirror, which needs them while PostgreSQL is unavailable."""
        async with self._postgres.connection() as connection:
            restaurants = await every_restaurant(connection)
        for restaurant in restaurants:
            await self._mirror.keep_restaurant(restaurant.id, encode(restaurant))

    async def report_gaps(self) -> int:
        """Logs version gaps that are older than ten minutes. Younger ones are normal: they close by themselves."""
        async with self._postgres.connection() as connection:
            found = await states.list_gaps(connection, older_minutes=_GAP_MINUTES, younger_minutes=_GAP_MINUTES + 60)
        for gap in found:
            log.error("version_gap", **gap)
        return len(found)

    async def trim(self) -> int:
        """Removes documents that have left the live window. Returns their number."""
        before = now() - timedelta(days=self._settings.mirror_window_days)
        trimmed = 0
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                if not entity.window_sql:
                    continue  # all of them stay
                stays = 0
                # Only an import leaves more than one block.
                for _ in range(_MAX_TRIM_QUERIES):
                    looked, left = await self._trim_block(restaurant, entity, before, stays)
                    trimmed += left
                    stays += looked - left
                    if looked < _STATES_PER_QUERY:
                        break
        if trimmed:
            log.info("mirror_trimmed", documents=trimmed)
        return trimmed

    async def _trim_block(self, restaurant: str, entity: Entity, before: datetime, stays: int) -> tuple[int, int]:
        """Returns (documents read, documents removed). `stays`: how many of the newest to skip, because they stay."""
        ids = await self._mirror.live_ids(
            restaurant, entity.name, most=before.timestamp(), count=stays + _STATES_PER_QUERY
        )
        ids = ids[stays:]
        _, documents = await self._mirror.read(restaurant, entity.name, ids)
        old = {}
        for id_, document in zip(ids, documents, strict=True):
            if document is None:
                old[id_] = ""
            elif not document.pending:
                state = entity.decode_state(document.state)
                if not entity.live(state) and state.updated_at < before:
                    old[id_] = document.head.change_id
        return len(ids), await self._mirror.trim(restaurant, entity.name, old) if old else 0
