"""The ledger loop compares the change log with `changes` and repairs what one of them lacks.

Guarantee: a change that is in the log gets into `changes`, unless it is a dead letter, and a change in `changes` gets
into the log. That holds after a lane was purged, a stream lost its end, or PostgreSQL lost its last commits.

One worker leads: it holds an advisory lock of PostgreSQL, and works in sessions (session.py). A session begins at the
newest checkpoint whose `log_at` the log proves, and ends with its connection to PostgreSQL, or when a side does not
prove what was read of it: then this side has lost something.

While a store is unavailable, the leader waits with jittered backoff, and begins a new session. Two leaders for a moment
send the same ids twice, which changes nothing. Shutdown: it may be stopped at any time.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import asyncpg
import structlog

from services.sync.failures.classification import describe
from services.sync.ledger.repairs import Repairs
from services.sync.ledger.session import EndOfSession, LedgerSession, LedgerTotals, Patience
from shared.backoff import backoff
from shared.lifecycle import BackgroundLoop, end_tasks
from shared.messaging.log import LogReader, Start
from shared.messaging.publisher import BROKEN_LINK, Publisher
from shared.postgres.checkpoints import Checkpoint, last_checkpoint, list_checkpoints, positions
from shared.postgres.feed import ForeignDatabase, PositionLost
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_LEADER_LOCK = 0x6C656467
_FOLLOWER_INTERVAL_SECONDS = 2.0
_ROUND_SECONDS = 1.0


class LedgerLoop:
    def __init__(
        self, settings: Settings, postgres: Postgres, publisher: Publisher, *, patience: Patience | None = None
    ) -> None:
        """`postgres`: a pool of the writer role."""
        self._settings = settings
        self._postgres = postgres
        self._patience = patience or Patience()
        self._repairs = Repairs(settings, publisher)
        self._session: LedgerSession | None = None
        self.totals = LedgerTotals()
        self.loop = BackgroundLoop("ledger", self._run)

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    def state(self) -> dict[str, Any]:
        """Returns the state for the health endpoint."""
        session = self._session
        return {
            "leads": session is not None,
            "only_in_log": 0 if session is None else len(session.sides.log),
            "only_in_postgres": 0 if session is None else len(session.sides.feed),
            "resent": self.totals.resent,
            "republished": self.totals.republished,
            "unexplained": len(self.totals.unexplained),
        }

    async def _run(self) -> None:
        attempt = 0
        while True:
            try:
                async with self._postgres.connection() as connection:
                    if await connection.fetchval("select pg_try_advisory_lock($1)", _LEADER_LOCK):
                        await self._lead(connection)
                attempt = 0
                await asyncio.sleep(_FOLLOWER_INTERVAL_SECONDS)
            except (EndOfSession, PositionLost) as ended:
                log.warning("ledger_session_ended", reason=str(ended))
            except (ForeignDatabase, asyncpg.PostgresError, *UNAVAILABLE, *BROKEN_LINK) as error:
                attempt += 1
                log.warning("ledger_waits", error=describe(error), attempt=attempt)
                await asyncio.sleep(backoff(attempt))
            finally:
                self._session = None
            self.loop.turned()

    async def _lead(self, connection: Connection) -> None:
        """Runs one session. Ends only with an error."""
        last = await last_checkpoint(connection)
        begun = await self._provable(await list_checkpoints(connection))
        self._session = session = LedgerSession(
            self._settings,
            connection,
            self._repairs,
            self._patience,
            self.totals,
            begun=begun,
            last=last.id if last else None,
        )
        log.info("ledger_leads", log_low=begun.log_low if begun else None)
        reading = asyncio.create_task(session.read_log(self._reader("ledger")), name="ledger-log")
        try:
            while not reading.done():
                await session.round()
                self.loop.turned()
                await asyncio.wait({reading}, timeout=_ROUND_SECONDS)
            await reading  # raises its error
        finally:
            await end_tasks(reading)

    async def _provable(self, checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
        """Returns the newest checkpoint whose `log_at` the log proves."""
        candidates = positions(checkpoints, "log_at")
        if not candidates:
            return None

        async def older() -> Sequence[Start]:
            return candidates[1:]

        async with aclosing(self._reader("ledger-begins").read(candidates[0], fallbacks=older)) as batches:
            async for batch in batches:
                proved = candidates[0] if batch.broken is None else batch.broken.back_to
                return next((one for one in checkpoints if one.log_at == proved), None)
        return None

    def _reader(self, name: str) -> LogReader:
        idle_seconds = max(self._settings.heartbeat_interval_seconds * 3, 2.0)
        return LogReader(self._settings.rabbitmq_url, name=name, idle_seconds=idle_seconds)
