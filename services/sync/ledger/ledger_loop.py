"""The ledger loop compares the change log with `changes` and repairs what one of them lacks.

Guarantee: a change that is in the log gets into `changes`, unless it is a dead letter, and a change in `changes` gets
into the log. That holds after a lane was purged, a stream lost its end, or PostgreSQL lost its last commits.

One worker leads: it holds an advisory lock of PostgreSQL, and works in sessions (session.py). A session begins at the
newest checkpoint whose `log_at` the log proves, and ends with its connection to PostgreSQL, or when a side lacks an
entry that was read from it: then this side has lost something. The others read the checkpoints of the leader, so that
every worker shows the same figures.

While a store is unavailable, the leader waits with jittered backoff, and begins a new session. Two leaders for a moment
send the same ids twice, which changes nothing. Shutdown: it may be stopped at any time.
"""

import asyncio
import time
from typing import Any

import asyncpg
import msgspec
import structlog

from services.sync.failures.classification import describe
from services.sync.ledger.begin import ledger_reader, oldest_kept, provable
from services.sync.ledger.repairs import Repairs
from services.sync.ledger.session import EndOfSession, LedgerSession, LedgerTotals, Patience
from shared.backoff import backoff
from shared.lifecycle import BackgroundLoop, end_tasks
from shared.messaging.log import LogReader
from shared.messaging.log_tap import LogTap, TappedReader
from shared.messaging.publisher import BROKEN_LINK, Publisher
from shared.postgres.checkpoints import Checkpoint, last_checkpoint, list_checkpoints
from shared.postgres.feed import ForeignDatabase, PositionLost
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

MAX_AGE_SECONDS = 300.0
"""The alarm `age` is raised when the newest checkpoint is older, because no worker compares then."""
OPEN_PLACES = ("queued", "retrying", "resent", "unexplained", "only_in_postgres")
"""The places in `LedgerTotals.open`."""
LEADER_LOCK = 0x6C656467
"""The advisory lock that the leader holds."""
_FOLLOWER_INTERVAL_SECONDS = 2.0
_ROUND_SECONDS = 1.0


class LedgerLoop:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        publisher: Publisher,
        *,
        tap: LogTap | None = None,
        patience: Patience | None = None,
    ) -> None:
        """`postgres`: a pool of the writer role. `tap`: the batches that the mirror writer of this process reads."""
        self._settings = settings
        self._postgres = postgres
        self._tap = tap
        self._tapped: TappedReader | None = None
        self._patience = patience or Patience()
        self._repairs = Repairs(settings, publisher)
        self._session: LedgerSession | None = None
        self.totals = LedgerTotals()
        self._seen: object = None
        """The newest checkpoint that this worker knows."""
        self._seen_at = time.monotonic()
        self.loop = BackgroundLoop("ledger", self._run)

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    @property
    def age_seconds(self) -> float:
        """The seconds since the leader wrote a checkpoint, as far as this worker knows."""
        return time.monotonic() - self._seen_at

    @property
    def steady_seconds(self) -> float:
        """How long this worker has led, with every read reaching the end of the log. `knows` is complete while this is
        not 0."""
        return 0.0 if self._session is None else self._session.steady_seconds

    def knows(self, change_id: str) -> bool:
        """Returns whether the log has the change although PostgreSQL lacks it, so that the leader repairs it."""
        return self._session is not None and change_id in self._session.sides.log

    def state(self) -> dict[str, Any]:
        """Returns the state for the health endpoint. `shares_log`: it takes the log that the mirror writer reads."""
        alarms = {"unexplained": bool(self.totals.unexplained), "age": self.age_seconds > MAX_AGE_SECONDS}
        return {
            "leads": self._session is not None,
            "shares_log": self._session is not None and self._tapped is not None and self._tapped.joined,
            "age_seconds": round(self.age_seconds, 1),
            "open": self.totals.open,
            "resent": self.totals.resent,
            "republished": self.totals.republished,
            "unexplained": len(self.totals.unexplained),
            "expired_ranges": len(self.totals.expired),
            "alarms": [name for name, raised in alarms.items() if raised],
        }

    async def _run(self) -> None:
        attempt = 0
        while True:
            try:
                async with self._postgres.connection() as connection:
                    last = await last_checkpoint(connection)
                    self._note(last)
                    if await connection.fetchval("select pg_try_advisory_lock($1)", LEADER_LOCK):
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

    def _note(self, last: Checkpoint | None) -> None:
        """Takes over what the last leader has found."""
        if last is not None and last.id != self._seen:
            self._seen, self._seen_at = last.id, time.monotonic() - max(0.0, last.age_seconds)
            self.totals = totals_of(last)

    async def _lead(self, connection: Connection) -> None:
        """Runs one session. Ends only with an error."""
        last = await last_checkpoint(connection)
        self._note(last)
        known = await list_checkpoints(connection)
        begun = await provable(ledger_reader(self._settings, "ledger-begins"), known) or await oldest_kept(connection)
        self._session = session = LedgerSession(
            self._settings,
            connection,
            self._patience,
            begun=begun,
            repairs=self._repairs,
            totals=self.totals,
            last=last.id if last else None,
        )
        log.info("ledger_leads", log_low=begun.log_low if begun else None)
        reading = asyncio.create_task(session.read_log(self._reader()), name="ledger-log")
        try:
            while not reading.done():
                await session.round()
                if session.last != self._seen:
                    self._seen, self._seen_at = session.last, time.monotonic()
                self.loop.turned()
                await asyncio.wait({reading}, timeout=_ROUND_SECONDS)
            await reading  # raises its error
        finally:
            await end_tasks(reading)

    def _reader(self) -> LogReader | TappedReader:
        reader = ledger_reader(self._settings, "ledger")
        if self._tap is None:
            return reader
        self._tapped = TappedReader(reader, self._tap, silence_seconds=2 * self._settings.heartbeat_interval_seconds)
        return self._tapped


def totals_of(checkpoint: Checkpoint) -> LedgerTotals:
    """Returns what the leader had found when it wrote the checkpoint."""
    return msgspec.json.decode(checkpoint.counts, type=LedgerTotals)
