"""Getting one batch into PostgreSQL, whatever it takes.

Guarantee: when `write` returns, every change of the batch is committed, or returned as failed: for the ladder or dead.

    sink away           the batch is held and tried again, with jittered back-off; no attempt is burnt. When that has
                        lasted for `sink_hold_seconds`, SinkGone: the caller lets go of its messages, for a broker
                        closes the channel of a consumer that holds them for ever
    anything else       the batch is tried change by change, each in a transaction of its own: only those that fail
                        again have failed, the rest is written
    timeouts only       when changes run into timeouts and nothing else gets through, then the server is slow, not these
                        changes: held like a sink away. One commit in between, and they have failed

It may be cancelled at any time: what was not acknowledged is delivered again, and writing it twice changes nothing.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime

import structlog

from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.store import NewDeadLetter
from services.sync.failures import retry_store
from services.sync.failures.classification import Failure, FailureKind, classify, describe
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

_STUCK = 5  # so many timeouts with nothing getting through: look at the server, not at the changes


class HoldExpired(Exception):
    """PostgreSQL has been away for longer than messages may be held."""


class BatchWriter:
    def __init__(self, postgres: Postgres, settings: Settings) -> None:
        self._postgres = postgres
        self._longest_hold = settings.sink_hold_seconds
        # Before the client's own timeout strikes, so that a slow statement is told from a frozen server.
        self._patience = settings.database_timeout_seconds * 0.7
        self.holding_since: datetime | None = None
        self._hold_began = 0.0
        self._holds = 0

    async def write(self, batch: WriteBatch) -> list[FailedChange]:
        """The changes that failed. Raises SinkGone."""
        if not batch.changes and not batch.heartbeats:
            return []
        while True:
            try:
                await self._commit(batch.changes, batch.heartbeats)
                return []
            except Exception as error:  # noqa: BLE001  (each is classified; none is swallowed)
                failure = classify(error)
            if failure.kind is FailureKind.UNAVAILABLE:
                await self._hold(failure)
                continue
            if len(batch.changes) == 1 and not batch.heartbeats:
                return [batch.changes[0].failed(failure)]
            log.info("batch_taken_apart", lane=batch.lane, changes=len(batch.changes), error=failure.error)
            return await self._one_by_one(batch)

    async def keep_dead(self, letters: Sequence[NewDeadLetter]) -> list[NewDeadLetter] | None:
        """Those that are news. None: they must take their way through the dead queue, whose keeper is more patient."""
        try:
            async with self._postgres.connection() as connection:
                return await dead_letter_store.keep(connection, letters)
        except Exception as error:  # noqa: BLE001  (whatever it is, there is that other way)
            log.warning("letters_not_kept_at_once", letters=len(letters), error=describe(error))
            return None

    async def note_retries(self, climbing: Sequence[Retry]) -> None:
        """Tells the ledger; nobody waits for it when it cannot be told."""
        try:
            async with self._postgres.connection() as connection:
                await retry_store.note(connection, climbing)
        except Exception as error:  # noqa: BLE001  (they are on the ladder all the same)
            log.warning("retries_not_noted", changes=len(climbing), error=describe(error))

    async def wait_for_an_answer(self) -> None:
        """Returns when PostgreSQL has answered a question; after a second at the earliest."""
        while True:
            await asyncio.sleep(random.uniform(1.0, 2.0))  # noqa: S311  (jitter)
            try:
                async with self._postgres.connection() as connection:
                    await connection.fetchval("select 1 from changes limit 1")
            except Exception as error:  # noqa: BLE001  (any of them means no)
                log.debug("postgres_still_unavailable", error=describe(error))
            else:
                return self._served()

    async def _commit(self, changes: Sequence[ReceivedChange], heartbeats: Sequence[Signal] = ()) -> None:
        async with self._postgres.connection() as connection:
            await write_batch(
                connection,
                [one.written for one in changes],
                heartbeats,
                patience=self._patience,
                retried=[one.name for one in changes if one.retried],
            )
        self._served()

    async def _one_by_one(self, batch: WriteBatch) -> list[FailedChange]:
        failed: list[FailedChange] = []
        timed_out: list[tuple[ReceivedChange, Failure]] = []
        served = False  # something got through: the server is not what is slow
        waiting = deque(batch.changes)
        while waiting:
            change = waiting.popleft()
            try:
                await self._commit([change])
                served = True
                continue
            except Exception as error:  # noqa: BLE001  (the same)
                failure = classify(error)
            if failure.kind is FailureKind.UNAVAILABLE:
                waiting.appendleft(change)
                await self._hold(failure)
            elif failure.timed_out and not served:
                timed_out.append((change, failure))
                if len(timed_out) == _STUCK:
                    # Behind the others, so that those come first next time whose turn it has not been.
                    waiting.extend(one for one, _ in timed_out)
                    timed_out.clear()
                    await self._hold(failure)
            else:
                failed.append(change.failed(failure))
        failed.extend(change.failed(failure) for change, failure in timed_out)
        await self._note_heartbeats(batch)
        return failed

    async def _note_heartbeats(self, batch: WriteBatch) -> None:
        while batch.heartbeats:
            try:
                await self._commit([], batch.heartbeats)
                return
            except Exception as error:  # noqa: BLE001  (the same)
                failure = classify(error)
            if failure.kind is FailureKind.UNAVAILABLE:
                await self._hold(failure)
            else:  # the next heartbeat comes in seconds
                log.error("heartbeat_not_stored", lane=batch.lane, error=failure.error)
                batch.heartbeats = []

    async def _hold(self, failure: Failure) -> None:
        if self.holding_since is None:
            self.holding_since, self._hold_began = now(), time.monotonic()
            log.warning("postgres_unavailable", error=failure.error)
        elif time.monotonic() - self._hold_began > self._longest_hold:
            raise HoldExpired(failure.error)
        self._holds += 1
        await asyncio.sleep(backoff(self._holds))

    def _served(self) -> None:
        if self.holding_since is not None:
            log.info("postgres_back", held_seconds=round(time.monotonic() - self._hold_began, 1))
        self.holding_since = None
        self._holds = 0
