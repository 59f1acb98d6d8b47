"""The drainer: publishes the entries of the journal, even while new changes are published.

An entry leaves the journal only after its publisher confirm. If a publish is in doubt, the entry is published again,
which is harmless. While the broker is unavailable, the drainer waits for the connection. It may be stopped at any time.

The publisher of a drainer has a connection of its own, so that new changes do not wait behind the journal. Each publish
in doubt may leave a copy of its entries in the broker. Therefore the messages become smaller after a doubt, and grow
again while the broker confirms them in time.
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
_FIRST_MESSAGE_BYTES = 64 << 10
_MIN_MESSAGE_BYTES = 512
"""A message of this size has only one change."""
_CONFIRMS_BEFORE_GROWTH = 10


class Drainer:
    def __init__(self, journal: Journal, publisher: Publisher, tracer: Tracer | None = None) -> None:
        self._journal = journal
        self._publisher = publisher
        self._tracer = tracer
        self.message_bytes = _FIRST_MESSAGE_BYTES
        """The maximum size of the next message with several entries."""
        self._confirms = 0
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
            entries = await self._journal.oldest(MAX_BATCH_CHANGES, lane, self.message_bytes)
            if not entries:
                continue
            began = time.time_ns()
            try:
                await self._publisher.publish(lane.value, encode_batch(entry.event for entry in entries))
            except (NotSent, InDoubt) as error:
                failed = failed or error
                if isinstance(error, InDoubt):
                    self._shrink()
                continue
            self._grow()
            self._trace(lane, entries, began)
            await self._journal.remove(entries)
            drained += len(entries)
            self.drained[lane] += len(entries)
        if drained:
            log.info("journal_drained", changes=drained, left=self._journal.depth)
        if failed:
            raise failed
        return drained

    def _shrink(self) -> None:
        self.message_bytes = max(self.message_bytes // 2, _MIN_MESSAGE_BYTES)
        self._confirms = 0

    def _grow(self) -> None:
        self._confirms += 1
        if self._confirms == _CONFIRMS_BEFORE_GROWTH:
            self.message_bytes = min(self.message_bytes * 2, MAX_MESSAGE_BYTES)
            self._confirms = 0

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
