"""Repairs states that stay pending in the mirror.

A change that has been pending for five minutes (`lost_message_seconds`) is looked up:

    PostgreSQL has a later state             the mirror loads that state
    the ledger knows the change              the ledger loop repairs it
    it is on the retry ladder, or dead       it stays there
    none of these                            its message is lost, so its state becomes a new change

The five minutes run on the monotonic clock, and only while this worker leads the ledger and every read reaches the end
of the log: then every accepted change is in the log, or in a journal that drains. After an interruption they begin
again. Two instances may run at the same time, because only one of them can claim the next version. If a backend is
unavailable, the call raises its error, and the next call tries again.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from services.sync.failures.last_failures import last_failures
from services.sync.ledger import store as ledger_store
from services.sync.mirror.stored_states import load_states
from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.errors import InvalidInput
from shared.mirror.mirror import Document, Mirror
from shared.mirror.stored_heads import FailedState, StoredHead
from shared.postgres import states
from shared.postgres.pool import Postgres
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Standing
from shared.rail.outcomes import ClaimLost, OutOfStock
from shared.settings import Settings

log = structlog.get_logger(__name__)

_STATES_PER_QUERY = 250
_LOOKS_PER_WAIT = 10


class KnownChanges(Protocol):
    """The changes that the leader of the ledger knows (services/sync/ledger/ledger_loop.py)."""

    @property
    def steady_seconds(self) -> float: ...

    def knows(self, change_id: str) -> bool: ...


class LostMessages:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        mirror: Mirror,
        rail: Rail,
        ledger: KnownChanges,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: a monotonic clock in seconds."""
        self._wait = settings.lost_message_seconds
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail
        self._ledger = ledger
        self._clock = clock
        self._next_at = clock()
        self._pending: dict[tuple[str, str, float], float] = {}
        """(entity, id, time of its state) of each pending state -> when it was first seen."""

    async def record_when_due(self) -> int:
        """Looks at the pending states if the last time is long enough ago. Returns the number of changes that were
        recorded again."""
        if self._clock() < self._next_at:
            return 0
        self._next_at = self._clock() + self._wait / _LOOKS_PER_WAIT
        return await self.record_again()

    async def record_again(self) -> int:
        """Checks the pending states, and records the lost ones again. Returns their number."""
        at, recorded = self._clock(), 0
        known, self._pending = self._pending, {}
        # A change that waited before the log was read to its end may have been in a journal.
        begin = at - self._ledger.steady_seconds
        if begin >= at:
            return 0
        for restaurant in await self._mirror.restaurant_ids():
            for entity in registry.ENTITIES.values():
                ids = await self._mirror.pending_ids(restaurant, entity.name)
                overdue = []
                accepted = await self._mirror.accepted_at(restaurant, entity.name, ids)
                for id_, state_at in zip(ids, accepted, strict=True):
                    if state_at is None:
                        continue
                    key = (entity.name, id_, state_at)
                    self._pending[key] = max(known.get(key, at), begin)
                    if at - self._pending[key] >= self._wait:
                        overdue.append(id_)
                for start in range(0, len(overdue), _STATES_PER_QUERY):
                    block = overdue[start : start + _STATES_PER_QUERY]
                    recorded += await self._record_again(restaurant, entity, block)
        return recorded

    async def _record_again(self, restaurant: str, entity: Entity, ids: Sequence[str]) -> int:
        _, found = await self._mirror.read(restaurant, entity.name, ids)
        documents = {id_: one for id_, one in zip(ids, found, strict=True) if one is not None}
        changes = {id_: one.head.change_id for id_, one in documents.items()}
        # Ask the ledger first: a change that it forgets is in PostgreSQL by then, or dead.
        known = {change for change in changes.values() if self._ledger.knows(change)}
        async with self._postgres.connection() as connection:
            failures = await last_failures(connection, [(restaurant, change) for change in changes.values()])
            dead = await ledger_store.dead(connection, list(changes.values()))
            heads = await states.heads(connection, entity, restaurant, ids)
            stored = [StoredHead(restaurant, entity.name, id_, head) for id_, head in heads.items()]
            behind = await self._mirror.settle(stored)
            if behind:
                await load_states(self._mirror, connection, [stored[place] for place in behind])
        await self._mirror.note_failures(
            [
                FailedState(restaurant, entity.name, id_, change, encode(failures[change]))
                for id_, change in changes.items()
                if change in failures
            ]
        )
        recorded = 0
        for id_, document in documents.items():
            change = changes[id_]
            if not document.pending or document.failure or change in known or change in failures or change in dead:
                continue
            if id_ in heads and heads[id_] >= document.head:
                continue
            recorded += await self._record(restaurant, entity, id_, document)
        return recorded

    async def _record(self, restaurant: str, entity: Entity, id_: str, document: Document) -> bool:
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
            return False  # another change came first, and it carries the whole state
        except (InvalidInput, OutOfStock) as error:
            # This change would be refused every time, so continue with the others.
            log.error("not_recorded_again", entity=entity.name, id=id_, restaurant_id=restaurant, error=str(error))
            return False
        log.error("recorded_again", entity=entity.name, id=id_, restaurant_id=restaurant)
        return True
