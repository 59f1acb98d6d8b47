"""The drainer: publishes the entries of the journal, while new changes are published too.

An entry leaves the journal only after its publisher confirm. An entry whose publish was in doubt is published again,
which is harmless. While the broker is unavailable the drainer waits for the connection. It may be stopped at any time.
"""

import asyncio
import time

import structlog
from opentelemetry.trace import SpanKind

from shared.entities.contract import MAX_BATCH_CHANGES, Lane, encode_batch, traceparent_in
from shared.lifecycle import BackgroundLoop
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.observability.tracing import Tracer
from shared.rail.journal import Journal, JournalBroken, JournalEntry
from shared.rail.record import MAX_BODY, sending, sends

log = structlog.get_logger(__name__)

_POLL_INTERVAL_SECONDS = 0.2
# The longest wait after unconfirmed publishes: each repeat adds a copy to those bound queues that are not full.
_MAX_PAUSE_SECONDS = 5.0


class Drainer:
    def __init__(self, journal: Journal, publisher: Publisher, tracer: Tracer | None = None) -> None:
        self._journal = journal
        self._publisher = publisher
        self._tracer = tracer
        self.loop = BackgroundLoop("journal-drain", self._run)
        self.drained = dict.fromkeys(Lane, 0)
        """Entries of each lane that have left the journal."""

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def _run(self) -> None:
        pause = _POLL_INTERVAL_SECONDS
        while True:
            await self._publisher.wait_connected()
            # A journal that could not be opened is tried again, because it may have entries.
            if self._journal.depth or not self._journal.opened:
                try:
                    await self.drain_some()
                    self.loop.turned()
                    pause = _POLL_INTERVAL_SECONDS
                    continue
                except (NotSent, InDoubt, JournalBroken) as error:
                    log.warning("journal_drain_waits", depth=self._journal.depth, error=str(error))
                    pause = min(2 * pause, _MAX_PAUSE_SECONDS)
            self.loop.turned()
            await asyncio.sleep(pause)

    async def drain_some(self) -> int:
        """Publishes one message with the oldest entries of each lane. Returns how many entries left the journal. A lane
        whose queue is full does not stop the others; the first error (NotSent, InDoubt) is raised at the end."""
        drained, failed = 0, None
        for lane in Lane:
            mine = _one_message(await self._journal.oldest(MAX_BATCH_CHANGES, lane))
            if not mine:
                continue
            began = time.time_ns()
            try:
                await self._publisher.publish(lane.value, encode_batch(entry.event for entry in mine))
            except (NotSent, InDoubt) as error:
                failed = failed or error
                continue
            self._trace(lane, mine, began)
            await self._journal.remove(mine)
            drained += len(mine)
            self.drained[lane] += len(mine)
        if drained:
            log.info("journal_drained", changes=drained, left=self._journal.depth)
        if failed:
            raise failed
        return drained

    def _trace(self, lane: Lane, drained: list[JournalEntry], began: int) -> None:
        if self._tracer is None or not self._tracer.on:
            return
        ended = time.time_ns()
        attributes = {**sending(lane, len(drained)), "ticketrail.from_journal": True}
        for entry in drained:
            context = traceparent_in(entry.event)
            if self._tracer.wanted(context):
                # The change carries the context of the span that journaled it.
                self._tracer.add(
                    context,
                    sends(lane),
                    began,
                    ended,
                    kind=SpanKind.CLIENT,
                    attributes=attributes,
                    links=(context,),
                )


def _one_message(entries: list[JournalEntry]) -> list[JournalEntry]:
    """The first entries that fit into one message; only the first if it is larger than a message."""
    size, count = 0, 0
    for entry in entries:
        size += len(entry.event)
        if count and size > MAX_BODY:
            break
        count += 1
    return entries[:count]
