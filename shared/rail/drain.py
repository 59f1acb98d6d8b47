"""The drainer: publishes the entries of the journal, also while new changes are published.

An entry leaves the journal only after its publisher confirm. If a publish is in doubt, the entry is published again,
which is harmless. While the broker is unavailable, the drainer waits for the connection. It may be stopped at any time.
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
from shared.rail.record import MAX_MESSAGE_BYTES, send_attributes, send_span_name

log = structlog.get_logger(__name__)

_POLL_INTERVAL_SECONDS = 0.2
# The maximum pause after publishes without a confirm. Each repeat adds a copy to those bound queues that are not full.
_MAX_PAUSE_SECONDS = 5.0


class Drainer:
    def __init__(self, journal: Journal, publisher: Publisher, tracer: Tracer | None = None) -> None:
        self._journal = journal
        self._publisher = publisher
        self._tracer = tracer
        self.loop = BackgroundLoop("journal-drain", self._run)
        self.drained = dict.fromkeys(Lane, 0)
        """Maps a lane to the number of its entries that have left the journal."""

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
        """Publishes one message with the oldest entries of each lane. Returns the number of entries that left the
        journal. If the queue of a lane is full, the other lanes continue. The first error (NotSent, InDoubt) is raised
        at the end."""
        drained, failed = 0, None
        for lane in Lane:
            entries = _one_message(await self._journal.oldest(MAX_BATCH_CHANGES, lane))
            if not entries:
                continue
            began = time.time_ns()
            try:
                await self._publisher.publish(lane.value, encode_batch(entry.event for entry in entries))
            except (NotSent, InDoubt) as error:
                failed = failed or error
                continue
            self._trace(lane, entries, began)
            await self._journal.remove(entries)
            drained += len(entries)
            self.drained[lane] += len(entries)
        if drained:
            log.info("journal_drained", changes=drained, left=self._journal.depth)
        if failed:
            raise failed
        return drained

    def _trace(self, lane: Lane, drained: list[JournalEntry], began: int) -> None:
        if self._tracer is None or not self._tracer.on:
            return
        ended = time.time_ns()
        attributes = {**send_attributes(lane, len(drained)), "ticketrail.from_journal": True}
        for entry in drained:
            context = traceparent_in(entry.event)
            if self._tracer.will_export(context):
                # The change carries the context of the span that wrote it to the journal.
                self._tracer.add(
                    context,
                    send_span_name(lane),
                    began,
                    ended,
                    kind=SpanKind.CLIENT,
                    attributes=attributes,
                    links=(context,),
                )


def _one_message(entries: list[JournalEntry]) -> list[JournalEntry]:
    """Returns the first entries that fit into one message, or only the first entry if it is larger than a message."""
    size, count = 0, 0
    for entry in entries:
        size += len(entry.event)
        if count and size > MAX_MESSAGE_BYTES:
            break
        count += 1
    return entries[:count]
