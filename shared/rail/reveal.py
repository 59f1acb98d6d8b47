"""The third step of a commit: writes the state into the mirror under the guard, which removes the claim."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from shared.entities.contract import Change
from shared.entities.entity import Entity
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Apply, Mirror

log = structlog.get_logger(__name__)

RETRY_PAUSE_SECONDS = 0.05


class Reveal:
    def __init__(
        self,
        mirror: Mirror,
        timeout_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._mirror = mirror
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._sleep = sleep

    async def __call__(self, entity: Entity, change: Change, state: Any, *, keep_trying: bool = True) -> bool:
        """Returns whether the mirror has the change now. Tries for `timeout_seconds`, or only once without
        `keep_trying`. After a failure, the mirror writer applies the change from the log."""
        revealed = Apply(entity, state, change.head, bytes(change.data.after), change.time)
        deadline = self._clock() + self._timeout_seconds
        while True:
            try:
                await self._mirror.apply([revealed])
                return True
            except (MirrorUnavailable, MirrorInDoubt) as error:
                if not keep_trying or self._mirror.down or self._clock() > deadline:
                    log.warning("not_revealed", change_id=change.id, error=str(error) or type(error).__name__)
                    return False
            await self._sleep(RETRY_PAUSE_SECONDS)
