"""The reconciler: heals what nobody met. Every few seconds, over all tenants:

- claims that their owner left behind are finished (recorded and revealed as the same change);
- what the mirror says of the way of each state is put right: written, failed, in conflict (sync_states.py);
- what is pending for more than five minutes although every lane was empty for as long is recorded anew, as a change of
  its own: the message that carried it is lost (a queue was purged, a journal will not come back). While lanes are
  behind, or a journal drains after RabbitMQ was away, nothing is taken for lost;
- what was paid in a state that a fork superseded is brought back into its order (forked_payments.py);
- versions without their predecessor are reported when they are older than ten minutes;
- what has left the live window leaves the mirror, once PostgreSQL has it; restaurants that are new come to it.

Everything it does is harmless when done twice or by two instances at once. While a backend is away it does what the
others allow and tries again at the next round. It may be stopped at any time.
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

_TRIM_EVERY = 60.0
_BLOCK = 500
_GAP_MINUTES = 10
_REST = 9
_MOST_BLOCKS = 20
_LEAST_BEHIND = 2.0
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
        self._settle_again_at = 0.0
        self._healed_at = time.monotonic()
        self._empty_since: float | None = None

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        while True:
            for work in (
                self.finish_claims,
                self._settle_sometimes,
                self.states.note_conflicts,
                self._forked_payments.bring_back,
                self._heal_sometimes,
                self._trim_sometimes,
            ):
                try:
                    await work()
                except (MirrorUnavailable, MirrorInDoubt, TicketrailError, *UNAVAILABLE) as error:
                    log.warning("reconciler_waits", work=work.__name__, error=str(error) or type(error).__name__)
            self.loop.turned()
            await asyncio.sleep(self._settings.reconcile_interval_seconds)

    async def finish_claims(self) -> int:
        """Returns how many were finished."""
        finished = 0
        for member in await self._mirror.claims_left_behind():
            left = await self._mirror.mark(member)
            if left is None:
                continue
            try:
                await self._rail.finish(left)
            except BrokenContract as error:
                # Of a newer version, or broken: it stays for one that can read it, and does not stop the others.
                log.error("claim_not_finished", member=member, reason=error.reason, error=str(error))
                continue
            finished += 1
        return finished

    async def _settle_sometimes(self) -> None:
        """For a tenth of the time at most: while PostgreSQL is behind by tens of thousands, looking for each of them
        again and again would slow down what brings them there."""
        began = time.monotonic()
        if began < self._settle_again_at:
            return
        try:
            await self.states.settle_pending()
        finally:
            ended = time.monotonic()
            self._settle_again_at = ended + _REST * (ended - began)

    async def _heal_sometimes(self) -> None:
        """Asks at every round whether heartbeats come through every lane, so that it knows since when they do."""
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
        if began - max(self._empty_since, self._healed_at) >= self._settings.lost_message_seconds:
            self._healed_at = began
            await self.heal_pending()

    @property
    def _behind(self) -> float:
        """Seconds: how old the last heartbeat of a lane that is empty may be."""
        return (
            max(_LEAST_BEHIND, 3 * self._settings.heartbeat_interval_seconds)
            + self._settings.reconcile_interval_seconds
        )

    async def _lanes_emptied(self) -> datetime | None:
        """What was sent before this has left its lane; None while nothing is known of one of them."""
        async with self._postgres.connection() as connection:
            found: datetime | None = await connection.fetchval(_LANES_EMPTIED, [lane.value for lane in Lane])
        return found

    async def heal_pending(self) -> int:
        """Returns how many states were recorded anew. What has failed is left to the operators."""
        emptied = await self._lanes_emptied()
        if emptied is None:
            return 0
        before = min(emptied, now()) - timedelta(seconds=self._settings.lost_message_seconds)
        healed = 0
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                ids = await self._mirror.pending_ids(restaurant, entity.name)
                for start in range(0, len(ids), _BLOCK):
                    healed += await self._heal(restaurant, entity, ids[start : start + _BLOCK], before.timestamp())
        return healed

    async def _heal(self, restaurant: str, entity: Entity, ids: list[str], before: float) -> int:
        accepted = await self._mirror.accepted_at(restaurant, entity.name, ids)
        old = [id_ for id_, at in zip(ids, accepted, strict=True) if at is not None and at <= before]
        if not old:
            return 0
        async with self._postgres.connection() as connection:
            head = await states.heads(connection, entity, restaurant, old)
        _, documents = await self._mirror.read(restaurant, entity.name, old)
        healed = 0
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
                continue  # somebody has changed it meanwhile: that change carries the whole state
            except (InvalidInput, OutOfStock) as error:
                # It would be refused every time: it does not stop the others.
                log.error("not_recorded_again", entity=entity.name, id=id_, restaurant_id=restaurant, error=str(error))
                continue
            healed += 1
            log.error("recorded_again", entity=entity.name, id=id_, restaurant_id=restaurant)
        return healed

    async def _trim_sometimes(self) -> None:
        if time.monotonic() - self._trimmed_at >= _TRIM_EVERY:
            self._trimmed_at = time.monotonic()
            await self._keep_restaurants()
            await self.report_gaps()
            await self.trim()

    async def _keep_restaurants(self) -> None:
        """A restaurant that is new becomes known to the mirror: what it is asked for while PostgreSQL is away."""
        async with self._postgres.connection() as connection:
            restaurants = await every_restaurant(connection)
        for restaurant in restaurants:
            await self._mirror.keep_restaurant(restaurant.id, encode(restaurant))

    async def report_gaps(self) -> int:
        """A jump in versions is legal, and closes by itself; one that is older than ten minutes is told."""
        async with self._postgres.connection() as connection:
            found = await states.gaps(connection, older_minutes=_GAP_MINUTES, younger_minutes=_GAP_MINUTES + 60)
        for gap in found:
            log.error("version_gap", **gap)
        return len(found)

    async def trim(self) -> int:
        """Returns how many documents left the mirror."""
        before = now() - timedelta(days=self._settings.mirror_window_days)
        trimmed = 0
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                if not entity.window_sql:
                    continue  # all of it stays
                stays = 0
                # More than one block after an import alone.
                for _ in range(_MOST_BLOCKS):
                    looked, left = await self._trim_block(restaurant, entity, before, stays)
                    trimmed += left
                    stays += looked - left
                    if looked < _BLOCK:
                        break
        if trimmed:
            log.info("mirror_trimmed", documents=trimmed)
        return trimmed

    async def _trim_block(self, restaurant: str, entity: Entity, before: datetime, stays: int) -> tuple[int, int]:
        """(how many were looked at, how many of them left); `stays`: so many of the newest were looked at before."""
        ids = await self._mirror.live_ids(restaurant, entity.name, most=before.timestamp(), count=stays + _BLOCK)
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
