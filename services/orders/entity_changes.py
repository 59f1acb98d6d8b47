"""Creates and changes entities of every kind: builds the new state, commits it and returns a receipt.

After a lost claim the change is built again on the new head, unless the caller named a version. A repeat with the same
Idempotency-Key has the same id, so it finds what the first request created (shared/rail/idempotency.py).
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from msgspec import Struct

from shared.entities.contract import Head, now
from shared.entities.entity import Entity
from shared.errors import Conflict, InvalidInput, NotFound, Unavailable
from shared.http.etags import Versions
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Heads, Standing
from shared.rail.idempotency import Creations, key_reused
from shared.rail.outcomes import ClaimLost, Committed
from shared.rail.record import Durability
from shared.security.tokens import Identity

MAX_RETRIES = 3
"""The number of times that a change without a version is tried again after another change came first."""
_COMMIT_SECONDS = 0.01
# Changes that add a fact, such as a payment, are retried for longer, because each of many concurrent ones must count.
# While the broker does not answer, each one waits until the previous one is in the journal.
_FACT_TIMEOUT_SECONDS = 4.0

Change = Callable[[Any, datetime, int], tuple[str, Any]]
"""(current state, time, version that the change becomes) -> (event, new state). Returning the current state itself
means that nothing changes. It is called again, with another version, after another change came first."""


class Receipt(Struct, frozen=True):
    """The result of a write: the state after it and its durability."""

    entity: Entity
    state: Any
    raw: bytes
    """The state with the fields that this release does not know."""
    head: Head
    durability: Durability | None
    """How the change was recorded; None for a request that recorded nothing, such as a repeat."""
    visible: bool = True
    replayed: bool = False


def actor_of(identity: Identity) -> str:
    return identity.session_id or identity.user_id


class EntityChanges:
    def __init__(self, rail: Rail, heads: Heads) -> None:
        self._rail = rail
        self._heads = heads
        self._creations = Creations(rail, heads)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    # -- create ------------------------------------------------------------------------------------------------

    async def create(
        self,
        identity: Identity,
        entity: Entity,
        id_: str,
        build: Callable[[datetime], Any],
        *,
        request_hash: str | None,
    ) -> Receipt:
        """Creates an entity. `request_hash`: the hash of a request with an Idempotency-Key, from which `id_` is
        derived. The state that `build` returns must have it. Raises the errors of `build` and the rail, and
        InvalidInput for a key that was used for another request."""
        keyed = request_hash is not None
        at = now()
        try:
            state = build(at)
        except InvalidInput:
            # A repeat may be invalid by now, because the menu has changed since the first request was accepted.
            with contextlib.suppress(Unavailable):
                if keyed and (earlier := await self._heads.earlier(entity, identity.tenant, id_)):
                    return _replay(entity, earlier, request_hash)
            raise
        draft = Draft(
            entity=entity,
            event="created",
            state=state,
            base=None,
            at=at,
            source="orders",
            actor=actor_of(identity),
            keyed=keyed,
        )
        try:
            made = await self._creations.create(draft)
        except ClaimLost as lost:
            raise Conflict(
                "the same request is still being processed", code="in_progress", field="Idempotency-Key"
            ) from lost
        return _receipt(entity, made) if isinstance(made, Committed) else _replay(entity, made, request_hash)

    # -- change ------------------------------------------------------------------------------------------------

    async def change(
        self,
        identity: Identity,
        entity: Entity,
        id_: str,
        versions: Versions | None,
        change: Change,
        *,
        deleted: bool = False,
        adds_fact: bool = False,
    ) -> Receipt:
        """Changes an entity. `versions`: the head must have one of these versions; None means any. `deleted` allows
        a deleted entity. `adds_fact` means that the change is retried for four seconds after concurrent changes. Raises
        NotFound, Conflict (with the head version), Unavailable, and the errors of `change`."""
        if not adds_fact:
            return await self._change(identity, entity, id_, versions, change, deleted=deleted)
        # Changes in this instance run one after the other, because a lost claim costs as much as a won one.
        async with self._locks.setdefault(id_, asyncio.Lock()):
            return await self._change(identity, entity, id_, versions, change, deleted=deleted, adds_fact=True)

    async def _change(
        self,
        identity: Identity,
        entity: Entity,
        id_: str,
        versions: Versions | None,
        change: Change,
        *,
        deleted: bool,
        adds_fact: bool = False,
    ) -> Receipt:
        retries, deadline = 0, time.monotonic() + _FACT_TIMEOUT_SECONDS
        while True:
            found = await self._heads.head(entity, identity.tenant, id_)
            if found is None:
                raise NotFound(f"no such {entity.name}")
            before = found.state
            if not deleted:
                check_not_deleted(entity, before)
            if versions is not None and str(found.head.version) not in versions:
                raise _conflict(found.head)
            at = max(now(), before.updated_at)
            event, after = change(before, at, found.head.version + 1)
            if after is before:
                return Receipt(entity, before, found.raw, found.head, None, replayed=True)
            draft = Draft(
                entity=entity,
                event=event,
                state=after,
                base=found,
                at=at,
                source="orders",
                actor=actor_of(identity),
            )
            try:
                return _receipt(entity, await self._rail.commit(draft))
            except ClaimLost as lost:
                give_up = time.monotonic() > deadline if adds_fact else retries == MAX_RETRIES
                if versions is not None or give_up:
                    raise _conflict(lost.head) from lost
            retries += 1
            await _pause(min(retries, 5))

    async def delete(self, identity: Identity, entity: Entity, id_: str, versions: Versions | None) -> Receipt:
        def change(state: Any, at: datetime, _: int) -> tuple[str, Any]:
            return "deleted", msgspec.structs.replace(state, deleted_at=at, updated_at=at)

        return await self.change(identity, entity, id_, versions, change)

    async def restore(self, identity: Identity, entity: Entity, id_: str, versions: Versions | None) -> Receipt:
        def change(state: Any, at: datetime, _: int) -> tuple[str, Any]:
            if state.deleted_at is None:
                raise Conflict(f"the {entity.name} is not deleted", code="not_deleted")
            return "restored", msgspec.structs.replace(state, deleted_at=None, updated_at=at)

        return await self.change(identity, entity, id_, versions, change, deleted=True)


def check_not_deleted(entity: Entity, state: Any) -> None:
    """Raises NotFound if the state is deleted."""
    if state.deleted_at is not None:
        raise NotFound(f"the {entity.name} is deleted", code=f"{entity.name}_deleted")


async def _pause(commits: int) -> None:
    """Sleeps for a jittered time, about as long as `commits` commits take, so that the losers of a race do not collide
    again."""
    await asyncio.sleep(_COMMIT_SECONDS * commits * random.uniform(0.5, 1.5))  # noqa: S311  (jitter)


def _receipt(entity: Entity, committed: Committed) -> Receipt:
    return Receipt(entity, committed.state, committed.raw, committed.head, committed.durability, committed.visible)


def _replay(entity: Entity, made: Standing, request_hash: str | None) -> Receipt:
    if made.state.request_hash != request_hash:
        raise key_reused()
    return Receipt(entity, made.state, made.raw, made.head, None, replayed=True)


def _conflict(head: Head | None) -> Conflict:
    details: dict[str, Any] = {"field": "If-Match"}
    if head is not None:
        details["version"] = head.version
    return Conflict("another change came first", code="version_conflict", **details)
