"""Records lost changes again: changes whose message is lost, because a queue was purged or a journal was lost.

A change counts as lost if it is pending for more than five minutes (`lost_message_seconds`) although every lane was
empty for that long. Its state becomes a new change. While a lane has a backlog, or a journal drains after RabbitMQ was
unavailable, no change counts as lost. Two instances may run at the same time, because only one of them can claim the
next version. If a backend is unavailable, the call raises its error, and the next call tries again.
"""

import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

import structlog

from services.sync.failures.last_failures import last_failures
from services.sync.heartbeat import lanes_emptied
from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.errors import InvalidInput
from shared.mirror.mirror import Mirror
from shared.mirror.stored_heads import FailedState, StoredHead
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Standing
from shared.rail.outcomes import ClaimLost, OutOfStock
from shared.settings import Settings

log = structlog.get_logger(__name__)

_STATES_PER_QUERY = 500
_MIN_HEARTBEAT_AGE_SECONDS = 2.0


class LostMessages:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        mirror: Mirror,
        rail: Rail,
        *,
        lanes_emptied: Callable[[], Awaitable[datetime | None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lanes_emptied`: a function that returns a moment such that every message that was sent before it has left
        its lane, or None if it is unknown; by default it reads the heartbeats in PostgreSQL. `clock`: a monotonic clock
        in seconds."""
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail
        self._lanes_emptied = lanes_emptied or self._read_lanes_emptied
        self._clock = clock
        self._searched_at = clock()
        self._empty_since: float | None = None

    async def record_when_due(self) -> int:
        """Records lost changes again if every lane has been empty for `lost_message_seconds`, and if the last search is
        as long ago. Must be called in every round, to know since when the lanes are empty. Returns the number of
        changes that were recorded again."""
        try:
            emptied = await self._lanes_emptied()
        except UNAVAILABLE:
            self._empty_since = None
            raise
        began = self._clock()
        if emptied is None or (now() - emptied).total_seconds() > self._max_heartbeat_age:
            self._empty_since = None
            return 0
        if self._empty_since is None:
            self._empty_since = began
        if began - max(self._empty_since, self._searched_at) < self._settings.lost_message_seconds:
            return 0
        self._searched_at = began
        return await self.record_again()

    @property
    def _max_heartbeat_age(self) -> float:
        """The age, in seconds, up to which the last heartbeat of a lane shows that the lane is empty."""
        return (
            max(_MIN_HEARTBEAT_AGE_SECONDS, 3 * self._settings.heartbeat_interval_seconds)
            + self._settings.reconcile_interval_seconds
        )

    async def record_again(self) -> int:
        """Records lost changes again and returns their number. Operators decide about failed changes."""
        emptied = await self._lanes_emptied()
        if emptied is None:
            return 0
        before = min(emptied, now()) - timedelta(seconds=self._settings.lost_message_seconds)
        recorded = 0
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                ids = await self._mirror.pending_ids(restaurant, entity.name)
                for start in range(0, len(ids), _STATES_PER_QUERY):
                    recorded += await self._record_again(
                        restaurant, entity, ids[start : start + _STATES_PER_QUERY], before.timestamp()
                    )
        return recorded

    async def _record_again(self, restaurant: str, entity: Entity, ids: list[str], before: float) -> int:
        accepted = await self._mirror.accepted_at(restaurant, entity.name, ids)
        old = [id_ for id_, at in zip(ids, accepted, strict=True) if at is not None and at <= before]
        if not old:
            return 0
        _, documents = await self._mirror.read(restaurant, entity.name, old)
        async with self._postgres.connection() as connection:
            head = await states.heads(connection, entity, restaurant, old)
            changes = [(restaurant, document.head.change_id) for document in documents if document is not None]
            failures = await last_failures(connection, changes)
        await self._mirror.settle([StoredHead(restaurant, entity.name, id_, one) for id_, one in head.items()])
        await self._mirror.note_failures(
            [
                FailedState(restaurant, entity.name, id_, change, encode(failures[change]))
                for id_, document in zip(old, documents, strict=True)
                if document is not None and (change := document.head.change_id) in failures
            ]
        )
        recorded = 0
        for id_, document in zip(old, documents, strict=True):
            if document is None or not document.pending or document.failure or document.head.change_id in failures:
                continue
            if id_ in head and head[id_] >= document.head:
                continue
            state = entity.decode_state(document.state)
            draft = Draft(
                entity=entity,
                event="updated",
                state=state,
                base=Standing(document.head, state, document.state),
                at=now(),
                source="sync",
                actor="reconciler",
            )
            try:
                await self._rail.commit(draft)
            except ClaimLost:
                continue  # another change came first, and it carries the whole state
            except (InvalidInput, OutOfStock) as error:
                # This change would be refused every time, so continue with the others.
                log.error("not_recorded_again", entity=entity.name, id=id_, restaurant_id=restaurant, error=str(error))
                continue
            recorded += 1
            log.error("recorded_again", entity=entity.name, id=id_, restaurant_id=restaurant)
        return recorded

    async def _read_lanes_emptied(self) -> datetime | None:
        async with self._postgres.connection() as connection:
            return await lanes_emptied(connection)
