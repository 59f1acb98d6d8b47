"""Telling the mirror what became of changes: committed by PostgreSQL, or failed on the way there.

Best effort, beside the writing and never before it: `tell` only enqueues. What the mirror does not take is dropped, and
the reconciler mends the sync states later. An outage is logged when it begins and when it ends. At shutdown a second is
given to what still waits.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime

import structlog
from msgspec import Struct
from redis.exceptions import RedisError

from services.sync.failures.classification import describe
from services.sync.failures.retry_ladder import FailedChange, for_the_mirror
from services.sync.writer.upsert import Written, highest
from shared.entities import registry
from shared.entities.contract import Head, Lane
from shared.lifecycle import BackgroundLoop
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror

log = structlog.get_logger(__name__)

_MOST_WAITING = 100  # batches
_LAST_WORDS = 1.0


class WriteResult(Struct, frozen=True):
    """What became of one batch."""

    committed: Sequence[Written]
    failed: Sequence[FailedChange]
    heartbeats: dict[Lane, datetime]


class MirrorNotifier:
    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._waiting: asyncio.Queue[WriteResult] = asyncio.Queue(_MOST_WAITING)
        self.loop = BackgroundLoop("mirror-notifier", self._run)
        self._away = False

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        if self.loop.running:
            try:
                async with asyncio.timeout(_LAST_WORDS):
                    await self._waiting.join()
            except TimeoutError:
                log.warning("mirror_update_dropped", batches=self._waiting.qsize())
        await self.loop.stop()

    def tell(self, settled: WriteResult) -> None:
        try:
            self._waiting.put_nowait(settled)
        except asyncio.QueueFull:
            self._missed("the mirror is slower than PostgreSQL")

    async def _run(self) -> None:
        while True:
            settled = await self._waiting.get()
            try:
                await self._tell(settled)
                if self._away:
                    self._away = False
                    log.info("mirror_updates_resumed")
            except (MirrorUnavailable, MirrorInDoubt, RedisError) as error:
                self._missed(describe(error))
            except Exception:
                log.exception("mirror_update_dropped")
            finally:
                self._waiting.task_done()
                self.loop.turned()

    async def _tell(self, settled: WriteResult) -> None:
        """All calls at once: they share one pipeline."""
        groups: dict[tuple[str, str], list[tuple[str, Head]]] = {}
        for entity in {one.entity.name for one in settled.committed}:
            for one in highest(each for each in settled.committed if each.entity.name == entity):
                groups.setdefault((one.key[0], entity), []).append((one.key[1], one.change.standing))
        calls = [self._mirror.settle(restaurant, entity, states) for (restaurant, entity), states in groups.items()]
        for (restaurant, entity, _, _), alike in _alike(settled.failed).items():
            states = [(one.change.entity_id, one.change.standing) for one in alike if one.change is not None]
            calls.append(self._mirror.settle(restaurant, entity, states, failure=for_the_mirror(alike[-1])))
        if settled.heartbeats:
            calls.append(self._mirror.note_heartbeats({lane.value: at for lane, at in settled.heartbeats.items()}))
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _missed(self, error: str) -> None:
        if not self._away:
            self._away = True
            log.warning("mirror_update_dropped", error=error)


def _alike(failed: Sequence[FailedChange]) -> dict[tuple[str, str, str, int], list[FailedChange]]:
    """What failed in one batch of the same, told in one call: of a flood of bad changes the mirror must hear little."""
    groups: dict[tuple[str, str, str, int], list[FailedChange]] = {}
    for one in failed:
        change = one.change
        if change is not None and change.entity in registry.ENTITIES:
            key = (change.restaurantid, change.entity, one.failure.error, one.attempt)
            groups.setdefault(key, []).append(one)
    return groups
