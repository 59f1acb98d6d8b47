"""The feed loop tells the mirror what PostgreSQL has: which states are committed, and which changes failed.

Guarantee: every state that PostgreSQL has, or a later one, gets into the mirror and is synced there. The loop reads the
feed (shared/postgres/feed.py) from the position that the mirror has. A pending state in the mirror becomes synced when
PostgreSQL has it or a later one; an older or missing state is replaced by the one of PostgreSQL. The mirror notes the
position in the same script, after everything before it was applied. If another mirror replaces this one, the loop
therefore continues from the position of that one.

It wakes when the PostgreSQL writer of this process has committed, or after a second. It does not wait for a transaction
that stays open: the loop sends what is visible beyond it at once, and only the position waits. After a minute it raises
an alarm, because the loop then reads much again when the mirror is replaced.

If the position is not in PostgreSQL any more (feed.py says when), PostgreSQL has lost commits that the mirror shows as
synced. One pass over all documents then marks those as pending that PostgreSQL lacks, before the loop continues.

Failures come from `retries` and `dead_letters`, in the order of their transactions. The loop sends all open failures
again when it begins.

A mirror that is being filled has no position yet: the loop waits for it. While a store is unavailable, the loop waits
with jittered backoff. Several workers may run it at the same time. Shutdown: it may be stopped at any time.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import asyncpg
import structlog
from msgspec import Struct

from services.sync.failures.classification import describe
from services.sync.failures.last_failures import new_failures
from services.sync.mirror.stored_states import STATES_PER_SCRIPT, Rewind, load_states
from shared.backoff import backoff
from shared.entities import registry
from shared.entities.contract import Head, encode, now
from shared.lifecycle import BackgroundLoop
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.mirror.stored_heads import FailedState, FeedNote, StoredHead
from shared.postgres import states
from shared.postgres.feed import (
    FeedChange,
    FeedPosition,
    ForeignDatabase,
    PositionLost,
    Snapshot,
    VisibleFeed,
    find_end,
)
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_INTERVAL_SECONDS = 1.0
# The loop sends the commits of this time together. Requests have revealed almost all of them by then.
_GATHER_SECONDS = 0.1
_STALL_ALARM_SECONDS = 60.0
_FAILURE_SECONDS = 60.0
"""If the mirror does not have the change yet, the loop sends the failure again for this long."""
_MAX_EARLY_FAILURES = 10_000


class _EarlyFailure(Struct, frozen=True):
    failed: FailedState
    until: float
    """On the monotonic clock."""


class FeedLoop:
    def __init__(self, settings: Settings, postgres: Postgres, mirror: Mirror) -> None:
        """`postgres`: a pool of the writer role."""
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._feed: VisibleFeed | None = None
        self._noted = FeedPosition()
        self._failures_seen: Snapshot | None = None
        self._early: dict[str, _EarlyFailure] = {}
        """Change id -> a failure of a change that the mirror did not have."""
        self._woken = asyncio.Event()
        self._stalled = False
        self.loop = BackgroundLoop("mirror-feed", self._run)

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    def wake(self) -> None:
        """Makes the loop read the feed soon, because something was committed."""
        self._woken.set()

    @property
    def stalled_seconds(self) -> float:
        """How long an open transaction has held back the position; 0 if none does."""
        return 0.0 if self._feed is None else self._feed.stalled_seconds

    async def _run(self) -> None:
        attempt = 0
        while True:
            try:
                await self.turn()
                attempt = 0
            except Rewind as rewind:
                self._feed = None
                log.warning("feed_rewind", reason=str(rewind))
            except (MirrorUnavailable, MirrorInDoubt, ForeignDatabase, asyncpg.PostgresError, *UNAVAILABLE) as error:
                attempt += 1
                self._feed = None
                log.warning("feed_waits", error=describe(error), attempt=attempt)
                await asyncio.sleep(backoff(attempt))
            self.loop.turned()
            self._note_stall()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL_SECONDS):
                    await self._woken.wait()
                await asyncio.sleep(_GATHER_SECONDS)
            self._woken.clear()

    async def turn(self) -> bool:
        """Tells the mirror everything that is visible in PostgreSQL now. Returns False if the next turn has to do it:
        the mirror is being filled, or its position is lost. Raises Rewind, MirrorUnavailable, MirrorInDoubt,
        ForeignDatabase or an error of PostgreSQL."""
        position = await self._mirror.feed_position()
        if position is None:  # the mirror is being filled
            self._feed = None
            return False
        known = FeedPosition.decode(position)
        if self._feed is None or known.xid < self._noted.xid:
            self._feed, self._noted, self._failures_seen = VisibleFeed(known), known, None
        async with self._postgres.connection() as connection:
            try:
                async with aclosing(self._feed.read(connection)) as pages:
                    async for page in pages:
                        if page.restarted:
                            log.warning("feed_restarted", xid=page.position.xid)
                            await self._check_all(connection)
                        await self._tell(connection, page.changes, page.position, again=page.restarted)
            except PositionLost as lost:
                log.warning("feed_reloads", position=str(lost))
                await self._reload(connection)
                return False
            await self._tell_failures(connection)
            self._failures_seen = self._feed.seen
        return True

    # -- commits -----------------------------------------------------------------------------------------------

    async def _tell(
        self, connection: Connection, changes: Iterable[FeedChange], position: FeedPosition, *, again: bool
    ) -> None:
        highest: dict[tuple[str, str, str], Head] = {}
        for change in changes:
            key = (change.restaurant_id, change.entity, change.entity_id)
            head = Head(change.version, change.change_id)
            if change.entity in registry.ENTITIES and (key not in highest or highest[key] < head):
                highest[key] = head
        entities = [StoredHead(*key, head) for key, head in highest.items()]
        if not entities and position == self._noted:
            return
        chunks = [entities[at : at + STATES_PER_SCRIPT] for at in range(0, len(entities), STATES_PER_SCRIPT)] or [[]]
        for place, chunk in enumerate(chunks, start=1):
            last = place == len(chunks)
            await self._settle(
                connection, chunk, FeedNote(position.xid, position.encode(), again) if last else None, again=again
            )
        self._noted = position

    async def _settle(
        self,
        connection: Connection,
        entities: Sequence[StoredHead],
        note: FeedNote | None = None,
        *,
        again: bool = False,
        mark: bool = False,
    ) -> None:
        """Settles entities, and loads those that the mirror lacks or has in an older state."""
        at = None if again or mark else self._noted.xid
        while True:
            behind = await self._mirror.settle(entities, at=at, note=note, mark=mark)
            if behind is None:
                raise Rewind("another mirror, which has not read the feed as far, has replaced the one that was in use")
            if not behind:
                return
            # A request may reveal the same state meanwhile, which makes it pending, so settle these again.
            entities = await load_states(self._mirror, connection, [entities[place] for place in behind])

    async def _check_all(self, connection: Connection) -> None:
        """Compares all documents with PostgreSQL: marks those as pending that PostgreSQL lacks, and loads newer
        states."""
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                ids = await self._mirror.live_ids(restaurant, entity.name)
                for at in range(0, len(ids), STATES_PER_SCRIPT):
                    chunk = ids[at : at + STATES_PER_SCRIPT]
                    heads = await states.heads(connection, entity, restaurant, chunk)
                    entities = [StoredHead(restaurant, entity.name, id_, heads.get(id_)) for id_ in chunk]
                    await self._settle(connection, entities, mark=True)

    async def _reload(self, connection: Connection) -> None:
        """Brings the mirror to the states of PostgreSQL without the feed, and begins at its end."""
        end = await find_end(connection)
        since = now() - timedelta(days=self._settings.mirror_window_days)
        for entity in registry.ENTITIES.values():
            async for block in states.live_window(connection, entity, since):
                found = [(entity.decode_state(stored.state), stored.head) for stored in block]
                entities = [StoredHead(state.restaurant_id, entity.name, state.id, head) for state, head in found]
                for at in range(0, len(entities), STATES_PER_SCRIPT):
                    await self._settle(connection, entities[at : at + STATES_PER_SCRIPT], again=True)
        await self._check_all(connection)
        await self._mirror.settle([], note=FeedNote(end.xid, end.encode(), again=True))
        self._feed = None

    # -- failures ----------------------------------------------------------------------------------------------

    async def _tell_failures(self, connection: Connection) -> None:
        at = time.monotonic()
        await self._note_failures([early.failed for early in self._early.values() if early.until > at], at)
        async with aclosing(new_failures(connection, self._failures_seen)) as blocks:
            async for block in blocks:
                failures = [
                    FailedState(one.restaurant_id, one.entity, one.entity_id, one.change_id, encode(one.last))
                    for one in block
                ]
                await self._note_failures(failures, at)

    async def _note_failures(self, failures: Sequence[FailedState], at: float) -> None:
        absent = await self._mirror.note_failures(failures)
        known, self._early = self._early, {**self._early}
        for one in failures:
            self._early.pop(one.change_id, None)
        for place in absent[:_MAX_EARLY_FAILURES]:
            one = failures[place]
            until = known[one.change_id].until if one.change_id in known else at + _FAILURE_SECONDS
            if until > at:
                self._early[one.change_id] = _EarlyFailure(one, until)

    def _note_stall(self) -> None:
        stalled = self.stalled_seconds >= _STALL_ALARM_SECONDS
        if stalled and not self._stalled:
            log.warning("feed_stalled", seconds=round(self.stalled_seconds), reason="a transaction stays open")
        elif self._stalled and not stalled:
            log.info("feed_moves")
        self._stalled = stalled

    def state(self) -> dict[str, Any]:
        """Returns the state for the health endpoint."""
        return {"stalled_seconds": round(self.stalled_seconds, 1), "stalled": self._stalled}
