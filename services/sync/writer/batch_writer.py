"""Writes one batch into PostgreSQL, and waits while PostgreSQL is unavailable.

Guarantee: when `write` returns, every change of the batch is committed or returned as failed. The caller must send a
failed change to a retry queue or a dead-letter queue.

    unavailable      The batch is held and tried again, with jittered backoff; no attempt is burned. After
                     `sink_hold_seconds`, `write` raises HoldExpired. The caller must then release its messages, because
                     a broker closes the channel of a consumer that holds messages too long.
    any other error  Every change is tried in a transaction of its own. A change that fails again counts as failed, and
                     the others are written.
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
from datetime import datetime

import structlog

from services.sync.failures import dead_letter_store, retry_store
from services.sync.failures.classification import Failure, FailureKind, classify, describe
from services.sync.failures.dead_letter_store import NewDeadLetter
from services.sync.failures.retry_ladder import FailedChange
from services.sync.failures.retry_store import Retry
from services.sync.writer.batches import ReceivedChange, WriteBatch
from services.sync.writer.upsert import write_batch
from shared.backoff import backoff
from shared.entities.contract import now
from shared.entities.signal import Signal
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_TIMEOUTS_OF_SLOW_SERVER = 5
"""After this number of timeouts without a commit, the server counts as slow."""


class HoldExpired(Exception):
    """PostgreSQL was unavailable for longer than messages may be held."""


class BatchWriter:
    def __init__(self, postgres: Postgres, settings: Settings) -> None:
        self._postgres = postgres
        self._max_hold_seconds = settings.sink_hold_seconds
        # The timeout of the server is shorter than that of the client, so that a slow statement can be distinguished
        # from a frozen server.
        self._timeout_seconds = settings.database_timeout_seconds * 0.7
        self.holding_since: datetime | None = None
        self._hold_began = 0.0
        self._holds = 0

    async def write(self, batch: WriteBatch) -> list[FailedChange]:
        """Writes the batch. Returns the changes that failed. Raises HoldExpired."""
        if not batch.changes and not batch.heartbeats:
            return []
        while True:
            try:
                await self._commit(batch.changes, batch.heartbeats)
                return []
            except Exception as error:  # noqa: BLE001  (each error is classified, none is ignored)
                failure = classify(error)
            if failure.kind is FailureKind.UNAVAILABLE:
                await self._hold(failure)
                continue
            if len(batch.changes) == 1 and not batch.heartbeats:
                return [batch.changes[0].failed(failure)]
            log.info("batch_split", lane=batch.lane, changes=len(batch.changes), error=failure.error)
            return await self._write_one_by_one(batch)

    async def store_dead_letters(self, dead_letters: Sequence[NewDeadLetter]) -> list[NewDeadLetter] | None:
        """Stores dead letters. Returns those whose death was not stored yet. Returns None if nothing could be stored;
        then all of them must go through the dead-letter queue, because the collector tries longer."""
        try:
            async with self._postgres.connection() as connection:
                return await dead_letter_store.keep(connection, dead_letters)
        except Exception as error:  # noqa: BLE001  (after any error, the dead letters go through the queue)
            log.warning("dead_letters_not_stored_directly", dead_letters=len(dead_letters), error=describe(error))
            return None

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

    async def _commit(self, changes: Sequence[ReceivedChange], heartbeats: Sequence[Signal] = ()) -> None:
        async with self._postgres.connection() as connection:
            await write_batch(
                connection,
                [change.decoded for change in changes],
                heartbeats,
                timeout_seconds=self._timeout_seconds,
                retried=[change.name for change in changes if change.retried],
            )
        self._end_hold()

    async def _write_one_by_one(self, batch: WriteBatch) -> list[FailedChange]:
        failed: list[FailedChange] = []
        timed_out: list[tuple[ReceivedChange, Failure]] = []
        # True once a change was committed. A timeout then does not mean that the server is slow.
        committed = False
        waiting = deque(batch.changes)
        while waiting:
            change = waiting.popleft()
            try:
                await self._commit([change])
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
                await self._commit([], batch.heartbeats)
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
