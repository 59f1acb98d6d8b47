"""Orphaned journals: journals in this instance's folder whose own instance does not run, for example after a
scale-down.

Their entries were accepted, so they must not wait until their instance runs again. Another instance takes the lease of
the number, drains the journal into the broker and releases the lease. An entry leaves a journal only after its
publisher confirm. No lease is held while the broker is unavailable. An orphaned journal never gives an order number.
The loop may be stopped at any time.
"""

import asyncio
from pathlib import Path

import structlog

from shared.lifecycle import BackgroundLoop
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.observability.tracing import Tracer
from shared.rail.drain import Drainer
from shared.rail.instance import Lease, NumberTaken
from shared.rail.journal import Journal, JournalBroken
from shared.rail.set_aside import files_of, journals_in

log = structlog.get_logger(__name__)


class OrphanedJournals:
    def __init__(
        self,
        folder: Path,
        publisher: Publisher,
        tracer: Tracer | None,
        *,
        own: int,
        max_bytes: int,
        interval_seconds: float,
    ) -> None:
        """`own`: the number of this instance. `interval_seconds`: the pause between two scans of the folder."""
        self._folder = folder
        self._publisher = publisher
        self._tracer = tracer
        self._own = own
        self._max_bytes = max_bytes
        self._interval_seconds = interval_seconds
        self._empty: dict[int, int] = {}
        """Maps the number of an empty journal to its last write. The journal is not opened again before it changes."""
        self.loop = BackgroundLoop("orphaned-journals", self._run)

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        while True:
            await self._publisher.wait_connected()
            try:
                await self.drain()
            except (NotSent, InDoubt, JournalBroken, NumberTaken, OSError) as error:
                log.warning("orphaned_journals_wait", error=str(error) or type(error).__name__)
            self.loop.turned()
            await asyncio.sleep(self._interval_seconds)

    async def drain(self) -> int:
        """Drains each orphaned journal once. Returns the number of entries that left them. Raises NotSent or InDoubt if
        the broker does not take entries, and JournalBroken if a journal cannot be read. It tries all journals before it
        raises."""
        drained, failed = 0, None
        for number, path in (await asyncio.to_thread(journals_in, self._folder)).items():
            if number == self._own or self._empty.get(number) == await asyncio.to_thread(_last_written_ns, path):
                continue
            lease = Lease.attempt(self._folder, "orders", number)
            if lease is None:  # the instance of the journal runs
                self._empty.pop(number, None)
                continue
            with lease:
                try:
                    drained += await self._drain_one(path, lease)
                    self._empty[number] = await asyncio.to_thread(_last_written_ns, path)
                except (NotSent, InDoubt, JournalBroken) as error:
                    failed = failed or error
        if failed:
            raise failed
        return drained

    async def _drain_one(self, path: Path, lease: Lease) -> int:
        journal = Journal(path, instance=lease.number, max_bytes=self._max_bytes, lease=lease)
        try:
            await journal.open()
            found = journal.depth
            drainer = Drainer(journal, self._publisher, self._tracer)
            while journal.depth:
                await drainer.drain_some()
        finally:
            await journal.close()
        if found:
            log.info("orphaned_journal_drained", journal=str(path), changes=found)
        return found


def _last_written_ns(path: Path) -> int:
    """Returns the time when the journal or its write-ahead log was last written, in nanoseconds since 1970."""
    return max((file.stat().st_mtime_ns for file in files_of(path)), default=0)
