"""Notifies the mirror of the result of each change: committed in PostgreSQL, or failed.

Notifications are best effort, and the PostgreSQL writer does not wait for them: `notify` only enqueues. If the mirror
does not accept a notification, it is dropped, and the reconciler repairs the sync states later. The beginning and the
end of an outage are logged. At shutdown, waiting notifications are sent for at most one second.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime

import structlog
from msgspec import Struct
from redis.exceptions import RedisError

from services.sync.failures.classification import describe
from services.sync.failures.retry_ladder import FailedChange, failure_for_mirror
from services.sync.writer.upsert import DecodedChange, highest
from shared.entities import registry
from shared.entities.contract import Head, Lane
from shared.lifecycle import BackgroundLoop
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror

log = structlog.get_logger(__name__)

_MAX_WAITING_BATCHES = 100
_SHUTDOWN_GRACE_SECONDS = 1.0


class WriteResult(Struct, frozen=True):
    """The result of writing one batch."""

    committed: Sequence[DecodedChange]
    failed: Sequence[FailedChange]
    heartbeats: dict[Lane, datetime]


class MirrorNotifier:
    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._waiting: asyncio.Queue[WriteResult] = asyncio.Queue(_MAX_WAITING_BATCHES)
        self.loop = BackgroundLoop("mirror-notifier", self._run)
        self._unavailable = False

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        if self.loop.running:
            try:
                async with asyncio.timeout(_SHUTDOWN_GRACE_SECONDS):
                    await self._waiting.join()
            except TimeoutError:
                log.warning("mirror_update_dropped", batches=self._waiting.qsize())
        await self.loop.stop()

    def notify(self, result: WriteResult) -> None:
        """Enqueues a notification, or drops it if too many are waiting."""
        try:
            self._waiting.put_nowait(result)
        except asyncio.QueueFull:
            self._dropped("the mirror is slower than PostgreSQL")

    async def _run(self) -> None:
        while True:
            result = await self._waiting.get()
            try:
                await self._send(result)
                if self._unavailable:
                    self._unavailable = False
                    log.info("mirror_updates_resumed")
            except (MirrorUnavailable, MirrorInDoubt, RedisError) as error:
                self._dropped(describe(error))
            except Exception:
                log.exception("mirror_update_dropped")
            finally:
                self._waiting.task_done()
                self.loop.turned()

    async def _send(self, result: WriteResult) -> None:
        """Sends the notifications of a batch to the mirror, in one pipeline."""
        groups: dict[tuple[str, str], list[tuple[str, Head]]] = {}
        for entity in {decoded.entity.name for decoded in result.committed}:
            for decoded in highest(other for other in result.committed if other.entity.name == entity):
                groups.setdefault((decoded.key[0], entity), []).append((decoded.key[1], decoded.change.head))
        calls = [
            self._mirror.note_sync_states(restaurant, entity, states) for (restaurant, entity), states in groups.items()
        ]
        for (restaurant, entity, _, _), group in _by_cause(result.failed).items():
            states = [
                (failed_change.change.entity_id, failed_change.change.head)
                for failed_change in group
                if failed_change.change is not None
            ]
            calls.append(
                self._mirror.note_sync_states(restaurant, entity, states, failure=failure_for_mirror(group[-1]))
            )
        if result.heartbeats:
            calls.append(self._mirror.note_heartbeats({lane.value: at for lane, at in result.heartbeats.items()}))
        for reply in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(reply, BaseException):
                raise reply

    def _dropped(self, error: str) -> None:
        if not self._unavailable:
            self._unavailable = True
            log.warning("mirror_update_dropped", error=error)


def _by_cause(failed: Sequence[FailedChange]) -> dict[tuple[str, str, str, int], list[FailedChange]]:
    """Groups the failures of one batch by cause. There is one call per group, so that a burst of failures does not
    overload the mirror."""
    groups: dict[tuple[str, str, str, int], list[FailedChange]] = {}
    for failed_change in failed:
        change = failed_change.change
        if change is not None and change.entity in registry.ENTITIES:
            key = (change.restaurantid, change.entity, failed_change.failure.error, failed_change.attempt)
            groups.setdefault(key, []).append(failed_change)
    return groups
