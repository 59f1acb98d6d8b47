"""Writes one batch into PostgreSQL, and waits while PostgreSQL is unavailable.

Guarantee: when `write` returns, every change of the batch is committed, stored as a dead letter, or returned as unsent.
The caller must send an unsent change to a retry queue or a dead-letter queue.

    unavailable      The batch is held and tried again, with jittered backoff; no attempt is burned. After
                     `sink_hold_seconds`, `write` raises HoldExpired. The caller must then release its messages, because
                     a broker closes the channel of a consumer that holds messages too long.
    any other error  Every change is tried in a transaction of its own. A change that fails again counts as failed, and
                     the others are written.
    dead letters     Changes that no retry can write are stored in the transaction of their batch; those that the batch
                     turns out to have, at its end. If PostgreSQL refuses a dead letter, the change is unsent.
    only timeouts    If changes time out and no other change succeeds, the server is slow, and the batch is held as if
                     PostgreSQL were unavailable. If another change succeeds, those that time out count as failed.

Shutdown: `write` may be cancelled at any time. Unacknowledged messages are delivered again, and writing a change twice
is idempotent.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime

import structlog
from msgspec import Struct

from services.sync.failures import dead_letter_store, retry_store
from services.sync.failures.classification import Failure, FailureKind, classify, describe
from services.sync.failures.dead_letter_store import NewDeadLetter
from services.sync.failures.parsing import dead_letter_of
from services.sync.failures.retry_ladder import FailedChange, is_dead
from services.sync.failures.retry_store import Retry
from services.sync.writer.batches import ReceivedChange, WriteBatch
from services.sync.writer.upsert import write_batch
from shared.backoff import backoff
from shared.entities.contract import Lane, now
from shared.entities.signal import Signal
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_TIMEOUTS_OF_SLOW_SERVER = 5
"""After this number of timeouts without a commit, the server counts as slow."""


class HoldExpired(Exception):
    """PostgreSQL was unavailable for longer than messages may be held."""


class Written(Struct):
    """The changes of a batch that are not committed, by their next step."""

    failed: list[FailedChange]
    """The changes that PostgreSQL did not take."""
    dead: list[FailedChange]
    """The failed and the unreadable changes that are stored as dead letters."""
    new: list[NewDeadLetter]
    """The dead letters of `dead` whose death was not stored before."""
    unsent: list[FailedChange]
    """The failed and the unreadable changes that must be sent to a retry queue or a dead-letter queue."""


class BatchWriter:
    def __init__(self, postgres: Postgres, settings: Settings) -> None:
        self._postgres = postgres
        self._max_hold_seconds = settings.sink_hold_seconds
        self._steps_ms = settings.retry_steps_ms
        # The timeout of the server is shorter than that of the client, so that a slow statement can be distinguished
        # from a frozen server.
        self._timeout_seconds = settings.database_timeout_seconds * 0.7
        self.holding_since: datetime | None = None
        self._hold_began = 0.0
        self._holds = 0

    async def write(self, batch: WriteBatch) -> Written:
        """Writes the batch. Raises HoldExpired."""
        found = Written([], [], [], [])
        dead = self._dead_of(batch.failed, found)
        while batch.changes or batch.heartbeats or dead:
            try:
                found.new = await self._commit(batch.lane, batch.changes, batch.heartbeats, dead)
            except Exception as error:  # noqa: BLE001  (each error is classified, none is ignored)
                failure = classify(error)
            else:
                found.dead = dead
                break
            if failure.kind is FailureKind.UNAVAILABLE:
                await self._hold(failure)
                continue
            if len(batch.changes) == 1 and not batch.heartbeats and not dead:
                found.failed = [batch.changes[0].failed(failure)]
            else:
                log.info("batch_split", lane=batch.lane, changes=len(batch.changes), error=failure.error)
                found.failed = await self._write_one_by_one(batch)
            await self._store_dead(batch.lane, dead + self._dead_of(found.failed, found), found)
            break
        return found

    def _dead_of(self, failed: Sequence[FailedChange], found: Written) -> list[FailedChange]:
        """Returns the changes that are dead letters, and adds the others to `found.unsent`."""
        dead = [failed_change for failed_change in failed if is_dead(failed_change, self._steps_ms)]
        found.unsent += [failed_change for failed_change in failed if not is_dead(failed_change, self._steps_ms)]
        return dead

    async def _store_dead(self, lane: Lane, dead: list[FailedChange], found: Written) -> None:
        """Stores dead letters together, or each one alone if PostgreSQL refuses one. Adds the refused ones to
        `found.unsent`: the collector tries longer. Raises HoldExpired."""
        while dead:
            try:
                found.new += await self._commit(lane, dead=dead)
            except Exception as error:  # noqa: BLE001  (the error is classified)
                failure = classify(error)
            else:
                found.dead += dead
                return
            if failure.kind is FailureKind.UNAVAILABLE:
                await self._hold(failure)
                continue
            log.warning("dead_letters_not_stored", lane=lane, dead_letters=len(dead), error=failure.error)
            if len(dead) == 1:
                found.unsent += dead
                return
            for one in dead:
                await self._store_dead(lane, [one], found)
            return

    async def note_retries(self, retries: Sequence[Retry]) -> None:
        """Stores in `retries` that the changes are on the retry ladder, for the ledger. An error is only logged."""
        try:
            async with self._postgres.connection() as connection:
                await retry_store.note(connection, retries)
        except Exception as error:  # noqa: BLE001  (the changes are on the retry ladder anyway)
            log.warning("retries_not_stored", changes=len(retries), error=describe(error))

    async def wait_for_an_answer(self) -> None:
        """Waits until PostgreSQL answers a query, but at least a second."""
        while True:
            await asyncio.sleep(random.uniform(1.0, 2.0))  # noqa: S311  (jitter)
            try:
                async with self._postgres.connection() as connection:
                    await connection.fetchval("select 1 from changes limit 1")
            except Exception as error:  # noqa: BLE001  (any error means that PostgreSQL is not ready)
                log.debug("postgres_still_unavailable", error=describe(error))
            else:
                return self._end_hold()

    async def _commit(
        self,
        lane: Lane,
        changes: Sequence[ReceivedChange] = (),
        heartbeats: Sequence[Signal] = (),
        dead: Sequence[FailedChange] = (),
    ) -> list[NewDeadLetter]:
        """Writes everything in one transaction. Returns the dead letters whose death was not stored before."""
        new: list[NewDeadLetter] = []
        async with (
            self._postgres.connection() as connection,
            # A batch without dead letters is one transaction of `write_batch`. Otherwise both parts share an outer one.
            connection.transaction() if dead and (changes or heartbeats) else nullcontext(),
        ):
            if changes or heartbeats:
                await write_batch(
                    connection,
                    [change.decoded for change in changes],
                    heartbeats,
                    timeout_seconds=self._timeout_seconds,
                    retried=[change.name for change in changes if change.retried],
                )
            if dead:
                new = await dead_letter_store.keep(
                    connection, [dead_letter_of(failed_change, lane) for failed_change in dead]
                )
        self._end_hold()
        return new

    async def _write_one_by_one(self, batch: WriteBatch) -> list[FailedChange]:
        failed: list[FailedChange] = []
        timed_out: list[tuple[ReceivedChange, Failure]] = []
        # True once a change was committed. A timeout then does not mean that the server is slow.
        committed = False
        waiting = deque(batch.changes)
        while waiting:
            change = waiting.popleft()
            try:
                await self._commit(batch.lane, [change])
                committed = True
                continue
            except Exception as error:  # noqa: BLE001  (the error is classified)
                failure = classify(error)
            if failure.kind is FailureKind.UNAVAILABLE:
                waiting.appendleft(change)
                await self._hold(failure)
            elif failure.timed_out and not committed:
                timed_out.append((change, failure))
                if len(timed_out) == _TIMEOUTS_OF_SLOW_SERVER:
                    # Append the changes that timed out, so that untried changes come first.
                    waiting.extend(change for change, _ in timed_out)
                    timed_out.clear()
                    await self._hold(failure)
            else:
                failed.append(change.failed(failure))
        failed.extend(change.failed(failure) for change, failure in timed_out)
        await self._write_heartbeats(batch)
        return failed

    async def _write_heartbeats(self, batch: WriteBatch) -> None:
        while batch.heartbeats:
            try:
                await self._commit(batch.lane, heartbeats=batch.heartbeats)
                return
            except Exception as error:  # noqa: BLE001  (the error is classified)
                failure = classify(error)
            if failure.kind is FailureKind.UNAVAILABLE:
                await self._hold(failure)
            else:  # the next heartbeat follows in seconds
                log.error("heartbeat_not_stored", lane=batch.lane, error=failure.error)
                batch.heartbeats = []

    async def _hold(self, failure: Failure) -> None:
        if self.holding_since is None:
            self.holding_since, self._hold_began = now(), time.monotonic()
            log.warning("postgres_unavailable", error=failure.error)
        elif time.monotonic() - self._hold_began > self._max_hold_seconds:
            raise HoldExpired(failure.error)
        self._holds += 1
        await asyncio.sleep(backoff(self._holds))

    def _end_hold(self) -> None:
        if self.holding_since is not None:
            log.info("postgres_back", held_seconds=round(time.monotonic() - self._hold_began, 1))
        self.holding_since = None
        self._holds = 0
