"""The drainer: empties the journal into the broker, beside new changes.

An entry leaves the journal only after its confirm; one whose publish was in doubt is published again, which is
harmless. While the broker is away it waits for the connection. It may be stopped at any time.
"""

import asyncio

import structlog

from shared.entities.contract import MAX_BATCH, Lane, encode_batch
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.rail.journal import Journal, JournalBroken

log = structlog.get_logger(__name__)

_PAUSE = 0.2  # between looks at an empty journal, and after a publish that was not confirmed


class Drainer:
    def __init__(self, journal: Journal, publisher: Publisher) -> None:
        self._journal = journal
        self._publisher = publisher
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="journal-drain")

    async def stop(self) -> None:
        """May be called twice, and without a start."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._publisher.wait_connected()
            if self._journal.depth:
                try:
                    await self.drain_some()
                    continue
                except (NotSent, InDoubt, JournalBroken) as error:
                    log.warning("journal_drain_waits", depth=self._journal.depth, error=str(error))
            await asyncio.sleep(_PAUSE)

    async def drain_some(self) -> int:
        """One message for each lane among the oldest entries; returns how many entries left the journal."""
        entries = await self._journal.oldest(MAX_BATCH)
        for lane in Lane:
            mine = [entry for entry in entries if entry.lane is lane]
            if mine:
                await self._publisher.publish(lane.value, encode_batch(entry.event for entry in mine))
                await self._journal.remove(mine)
        log.info("journal_drained", changes=len(entries), left=self._journal.depth)
        return len(entries)
