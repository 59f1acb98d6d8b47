"""Reads the accepted changes from the change log: each change once, and the first heartbeat after it.

`AcceptedLog` reads in the background between `start` and `stop`. `settle` removes the changes that PostgreSQL has, and
keeps only their number. If the log loses its end, or is created again, `AcceptedLog` reads it again from its start and
sets `restarted`. While RabbitMQ is unavailable, it waits.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any
from uuid import uuid4

import msgspec

from services.sync.ledger import sources
from services.sync.ledger.balance import AcceptedChange, is_id
from shared.entities.contract import BrokenContract, Lane, PartialEvent, split_batch
from shared.errors import Unavailable
from shared.messaging.log import LogBatch, LogReader, Start
from shared.observability.tracing import trace_id_of
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.settings import Settings

_READ_TIMEOUT_SECONDS = 20.0
_MAX_OPEN = 20_000
"""The number of open changes above which they are settled while the log is read, to bound the memory."""


_partial_events = msgspec.json.Decoder(PartialEvent)


class AcceptedLog:
    def __init__(self, settings: Settings, ops: Postgres, since: datetime | None) -> None:
        """`since`: the moment from which changes are read; None is the beginning of the log."""
        self._ops = ops
        self._since = since
        self._reader = LogReader(
            settings.rabbitmq_url,
            name=f"ledger-{uuid4().hex[:6]}",
            idle_seconds=max(settings.heartbeat_interval_seconds * 3, 2.0),
        )
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._caught_up = False
        self.restarted = False
        self._restart()

    def _restart(self) -> None:
        self._seen: set[bytes] = set()
        self._before_heartbeat: dict[str, list[str]] = {lane.value: [] for lane in Lane}
        self.synced: Counter[str] = Counter()
        """Restaurant -> number of changes that PostgreSQL has."""
        self.open: dict[str, AcceptedChange] = {}
        """Change id -> change, for changes that were not found in PostgreSQL."""
        self.next_heartbeat: dict[str, datetime] = {}
        """Id of an open change -> sending time of the first heartbeat after it in its lane."""
        self.unreadable = 0

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._follow(), name="ledger-log")

    async def stop(self) -> None:
        """Stops reading. May be called twice, and without `start`."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def read_to_the_end(self) -> None:
        """Waits until everything that was in the log at the start is read. Raises Unavailable."""
        while not self._caught_up:
            if self._task is None or self._task.done():
                raise Unavailable("the change log is not being read")
            self._news.clear()
            try:
                async with asyncio.timeout(_READ_TIMEOUT_SECONDS):
                    await self._news.wait()
            except TimeoutError as error:
                raise Unavailable("the change log cannot be read; retry", retry_after=5.0) from error

    async def settle(self, entries: Sequence[AcceptedChange]) -> None:
        """Removes the changes that PostgreSQL has. Raises one of UNAVAILABLE."""
        found = await sources.synced(self._ops, entries)
        for change in entries:
            if change.change_id in found and self.open.pop(change.change_id, None) is not None:
                self.next_heartbeat.pop(change.change_id, None)
                self.synced[change.restaurant_id] += 1

    def has(self, change_id: str) -> bool:
        """Returns whether the log has the change."""
        return _packed(change_id) in self._seen

    async def _follow(self) -> None:
        start: Start = self._since or "first"

        async def from_the_start() -> Sequence[Start]:
            return (start,)

        async with aclosing(self._reader.read(start, fallbacks=from_the_start)) as batches:
            async for batch in batches:
                self._take(batch)
                if not self._caught_up and len(self.open) > _MAX_OPEN:
                    with contextlib.suppress(*UNAVAILABLE):
                        await self.settle(list(self.open.values()))
                self._caught_up = self._caught_up or batch.caught_up
                self._news.set()

    def _take(self, batch: LogBatch) -> None:
        if batch.broken:
            self._restart()
            self.restarted = True
        after_heartbeat: dict[str, list[str]] = {lane: [] for lane in self._before_heartbeat}
        last_heartbeats = {heartbeat.lane: heartbeat for heartbeat in batch.heartbeats}
        for entry in batch.entries:
            before_heartbeat = (
                self._before_heartbeat
                if entry.lane in last_heartbeats and entry.offset < last_heartbeats[entry.lane].offset
                else after_heartbeat
            )
            for change in self._read(entry.lane, entry.body):
                if not self.has(change.change_id):
                    self._seen.add(_packed(change.change_id))
                    self.open[change.change_id] = change
                    before_heartbeat.setdefault(change.lane, []).append(change.change_id)
        for lane, heartbeat in last_heartbeats.items():
            self.next_heartbeat.update(
                (change_id, heartbeat.sent_at)
                for change_id in self._before_heartbeat.get(lane, ())
                if change_id in self.open
            )
            self._before_heartbeat[lane] = []
        for lane, ids in after_heartbeat.items():
            self._before_heartbeat.setdefault(lane, []).extend(ids)

    def _read(self, lane: str, body: bytes) -> Iterable[AcceptedChange]:
        try:
            events = split_batch(body)
        except BrokenContract:
            self.unreadable += 1
            return
        for event in events:
            try:
                seen = _partial_events.decode(event)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                seen = PartialEvent()
            if not is_id(seen.id):
                self.unreadable += 1
                continue
            yield AcceptedChange(
                change_id=seen.id,
                restaurant_id=seen.restaurantid if is_id(seen.restaurantid) else "",
                subject=str(seen.subject)[:200],
                version=seen.entityversion if isinstance(seen.entityversion, int) else 0,
                lane=lane,
                accepted_at=_time(seen.time),
                trace_id=trace_id_of(seen.traceparent) if isinstance(seen.traceparent, str) else None,
                seen_in="log",
            )


def _packed(change_id: str) -> bytes:
    return bytes.fromhex(change_id.replace("-", ""))


def _time(value: Any) -> datetime | None:
    try:
        found = msgspec.convert(value, datetime)
    except (msgspec.ValidationError, ValueError, TypeError):
        return None
    return found if found.tzinfo is not None else None
