"""Edits, discards and restores dead letters, for the API and the command line.

An edit commits a change. A discard commits a change if the mirror already shows the change of the dead letter. The
action locks the dead letter, so that the second of two operators gets a Conflict. The change is recorded before the row
of the dead letter is updated. A failure in between leaves the dead letter open and the change recorded; a second
attempt is then harmless.
"""

from typing import Any

import msgspec

from services.sync.dead_letters import actions
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.editing import Effect, edited_event, event_in
from services.sync.dead_letters.store import DeadLetter, FullDeadLetter
from services.sync.difference import difference
from services.sync.operator_changes import Recorded, commit, record_first
from shared.entities import registry
from shared.entities.contract import now
from shared.errors import InvalidInput, NotFound
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import Connection, Postgres
from shared.rail.commit import Rail
from shared.rail.head import Heads


class DeadLetterRepairs:
    def __init__(self, postgres: Postgres, mirror: Mirror, rail: Rail) -> None:
        """`postgres`: a pool of the ops role."""
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail

    async def edit(
        self, id_: str, event: dict[str, Any], *, revision: int, why: str | None, actor: str, role: str
    ) -> DeadLetter:
        """Commits the operator's event as a new change at head version + 1 and resolves the dead letter by it.

        Raises InvalidInput, NotFound, Conflict, Unavailable, OutcomeUnknown."""
        with record_first("the dead letter") as recorded:
            async with self._postgres.connection() as connection, connection.transaction():
                dead_letter = await actions.take(connection, id_, revision=revision)
                original = event_in(dead_letter.body)
                entity, name, state, encoded = edited_event(original, event)
                base = await Heads.through(connection, self._mirror).head(entity, state.restaurant_id, state.id)
                recorded.change_id = await commit(self._rail, entity, name, state, base, actor=actor, made_from=encoded)
                return await actions.replace(
                    connection,
                    id_,
                    revision=revision,
                    event=event,
                    difference=difference(original, event) if original is not None else [],
                    change_id=recorded.change_id,
                    why=why,
                    actor=actor,
                    role=role,
                )

    async def effect(self, id_: str, event: dict[str, Any]) -> Effect:
        """Returns what an edit with this event would do, and does nothing. Raises InvalidInput, NotFound,
        Unavailable."""
        with record_first("the dead letter"):
            async with self._postgres.connection() as connection:
                dead_letter = await dead_letter_store.one(connection, id_)
                if dead_letter is None:
                    raise NotFound("no such dead letter")
                entity, name, state, _ = edited_event(event_in(dead_letter.body), event)
                base = await Heads.through(connection, self._mirror).head(entity, state.restaurant_id, state.id)
                head = None if base is None else base.head.version
                return Effect(entity.type(name), state.restaurant_id, f"{entity.name}/{state.id}", head)

    async def discard(self, id_: str, *, revision: int, why: str, actor: str, role: str) -> DeadLetter:
        """Discards the dead letter. If the mirror shows its change, a new change restores the state of PostgreSQL, or
        deletes the entity if PostgreSQL has none. Raises what `edit` raises."""
        if not why.strip():
            raise InvalidInput("must not be empty", field="why")
        with record_first("the dead letter") as recorded:
            async with self._postgres.connection() as connection, connection.transaction():
                return await self.discard_in(
                    connection, id_, revision=revision, why=why, actor=actor, role=role, recorded=recorded
                )

    async def discard_in(
        self,
        connection: Connection,
        id_: str,
        *,
        revision: int,
        why: str,
        actor: str,
        role: str,
        recorded: Recorded | None = None,
    ) -> DeadLetter:
        """Discards the dead letter in the caller's transaction. `recorded` gets the change that reverts. Raises what
        `edit` raises."""
        dead_letter = await actions.take(connection, id_, revision=revision)
        reverting = await self._revert(connection, dead_letter, actor)
        if recorded is not None:
            recorded.change_id = reverting
        return await actions.discard(
            connection, id_, revision=revision, why=why, actor=actor, role=role, replaced_by=reverting
        )

    async def restore(self, id_: str, *, revision: int, why: str | None, actor: str, role: str) -> DeadLetter:
        """Opens a discarded dead letter again. Raises NotFound, Conflict, Unavailable."""
        with record_first("the dead letter"):
            async with self._postgres.connection() as connection, connection.transaction():
                return await actions.restore(connection, id_, revision=revision, why=why, actor=actor, role=role)

    async def _revert(self, connection: Connection, dead_letter: FullDeadLetter, actor: str) -> str | None:
        """Commits a change that reverts the change of the dead letter. Returns the id of the new change, or None if the
        mirror does not show the change of the dead letter."""
        entity = registry.ENTITIES.get(dead_letter.entity or "")
        restaurant, id_ = dead_letter.restaurant_id, dead_letter.entity_id
        if entity is None or restaurant is None or id_ is None or dead_letter.change_id is None:
            return None
        shown = await Heads.through(connection, self._mirror).head(entity, restaurant, id_)
        if shown is None or shown.head.change_id != dead_letter.change_id:
            return None
        stored = await states.find_state(connection, entity, restaurant, id_)
        if stored is None:
            gone = msgspec.structs.replace(shown.state, deleted_at=now())
            return await commit(self._rail, entity, "deleted", gone, shown, actor=actor)
        if stored.head >= shown.head:
            return None  # PostgreSQL has this change or a later one, so there is nothing to revert
        before = entity.decode_state(stored.state)
        return await commit(self._rail, entity, "updated", before, shown, actor=actor, made_from=stored.state)
