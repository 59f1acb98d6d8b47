"""Orphaned journals: journals in this instance's folder whose own instance does not run, such as after a scale-down.

Their entries were accepted, so they must not wait for their instance. Another instance takes the lease of the number,
drains the journal into the broker and releases the lease. An entry leaves a journal only after its publisher confirm.
No lease is held while the broker is unavailable. An orphaned journal never gives an order number. The loop may be
stopped at any time."""

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
        self, folder: Path, publisher: Publisher, tracer: Tracer | None, *, own: int, max_bytes: int, every: float
    ) -> None:
        """`own`: the number of this instance. `every`: seconds between looks."""
        self._folder = folder
        self._publisher = publisher
        self._tracer = tracer
        self._own = own
        self._max_bytes = max_bytes
        self._every = every
        self._empty: dict[
            int, int
        ] = {}  # number -> state of an empty journal, which is not opened again before it changes
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
            await asyncio.sleep(self._every)

    async def drain(self) -> int:
        """Looks at each journal once; returns how many entries left them. Raises NotSent or InDoubt when the broker
        does not take them, JournalBroken when one cannot be read: the others were tried before it is raised."""
        drained, failed = 0, None
        for number, path in (await asyncio.to_thread(journals_in, self._folder)).items():
            if number == self._own or self._empty.get(number) == await asyncio.to_thread(_changed, path):
                continue
            lease = Lease.attempt(self._folder, "orders", number)
            if lease is None:  # its instance runs
                self._empty.pop(number, None)
                continue
            with lease:
                try:
                    drained += await self._drain_one(path, lease)
                    self._empty[number] = await asyncio.to_thread(_changed, path)
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


def _changed(path: Path) -> int:
    """When the journal or its write-ahead log was last written, in nanoseconds."""
    return max((file.stat().st_mtime_ns for file in files_of(path)), default=0)
