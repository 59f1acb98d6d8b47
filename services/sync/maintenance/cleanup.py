"""The cleanup deletes expired data: refresh tokens, one-time codes, revocations, the audit of identity after 400 days,
the progress of imports that were not resumed for 30 days, old heartbeats, dead letters and replays that were closed
longer ago than their retention, and trace files that are older than a week. Orders, changes and open dead letters are
never deleted. The cleanup is idempotent, and two cleanups may run at the same time.
"""

import asyncio
import time

import structlog

from services.sync.dead_letters import retention
from shared.lifecycle import BackgroundLoop
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

# An expired token stays for a week, so that a second use of it is still detected.
_EXPIRED_TOKENS = "delete from refresh_tokens where expires_at < now() - interval '7 days'"
_REVOKED_TOKENS = "delete from refresh_tokens where revoked_at < now() - interval '7 days'"
_CODES = "delete from one_time_codes where expires_at < now() - interval '7 days'"
_IDENTITY_EVENTS = "delete from identity_events where at < now() - interval '400 days'"
_REVOCATIONS = "delete from revocations where until < now()"
_IMPORTS = "delete from imports where updated_at < now() - interval '30 days'"
_HEARTBEATS = "delete from heartbeats where at < now() - interval '1 hour'"
_TRACE_DAYS = 7.0


class Cleanup:
    def __init__(self, settings: Settings, postgres: Postgres) -> None:
        """`postgres`: a pool of the writer role."""
        self._settings = settings
        self._postgres = postgres
        self.loop = BackgroundLoop("cleanup", self._run)

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.cleanup_interval_seconds)
            try:
                removed = await self.clean()
            except UNAVAILABLE as error:
                log.warning("cleanup_waits", error=str(error) or type(error).__name__)
            else:
                if any(removed.values()):
                    log.info("cleaned_up", **removed)
            self.loop.turned()

    async def clean(self) -> dict[str, int]:
        """Deletes expired data. Returns kind -> number of deleted rows or files. Raises one of UNAVAILABLE."""
        async with self._postgres.connection() as connection:
            tokens = [await connection.execute(statement) for statement in (_EXPIRED_TOKENS, _REVOKED_TOKENS, _CODES)]
            events = await connection.execute(_IDENTITY_EVENTS)
            revocations = await connection.execute(_REVOCATIONS)
            imports = await connection.execute(_IMPORTS)
            heartbeats = await connection.execute(_HEARTBEATS)
            days = self._settings.dead_letter_retention_days
            dead_letters = await retention.remove_closed_dead_letters(connection, days)
            replays = await retention.remove_ended_jobs(connection, days)
        return {
            "tokens": sum(_rows(status) for status in tokens),
            "identity_events": _rows(events),
            "revocations": _rows(revocations),
            "imports": _rows(imports),
            "heartbeats": _rows(heartbeats),
            "dead_letters": dead_letters,
            "replays": replays,
            "trace_files": await asyncio.to_thread(self._old_traces),
        }

    def _old_traces(self) -> int:
        """Deletes the trace files of services that do not run any more. Running services rotate their own files."""
        removed, before = 0, time.time() - _TRACE_DAYS * 86_400
        folder = self._settings.traces_path
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_file() and path.stat().st_mtime < before:
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def _rows(status: str) -> int:
    return int(status.rpartition(" ")[2])
