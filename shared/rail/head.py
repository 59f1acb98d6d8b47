"""Reads the head that a change is built on. Everything that commits a change reads it here.

A warm mirror that has the entity has its head. An entity that a warm mirror lacks has left the live window, or does not
exist; PostgreSQL knows. Without a warm mirror the head is unknown, because PostgreSQL may be behind, and a change on an
outdated head is a fork.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from shared.entities.contract import Head, now
from shared.entities.entity import Entity
from shared.errors import Unavailable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Connection

Connect = Callable[[str], AbstractAsyncContextManager[Connection]]
"""Restaurant -> a connection that sees it."""


class Standing(NamedTuple):
    """The current state of an entity as the rail reads it."""

    head: Head
    state: Any
    raw: bytes
    """The state as the store has it, with the fields that this release does not know."""


class Heads:
    def __init__(self, mirror: Mirror, connect: Connect, *, window: timedelta = timedelta()) -> None:
        """`window`: the live window of the mirror."""
        self._mirror = mirror
        self._connect = connect
        self._window = window

    @classmethod
    def through(cls, connection: Connection, mirror: Mirror) -> "Heads":
        """Returns heads that read PostgreSQL through this connection, whose caller may hold locks."""
        return cls(mirror, lambda _: nullcontext(connection))

    async def head(self, entity: Entity, restaurant: str, id_: str, born: datetime | None = None) -> Standing | None:
        """Returns the standing of an entity, or None if it does not exist. `born`: the time when the entity was
        created, if it exists and if the caller knows it. Raises Unavailable unless the mirror is warm, and if only
        PostgreSQL can answer and is unavailable. If `born` lies in the live window, a warm mirror alone can answer."""
        return (await self.heads(entity, restaurant, {id_: born})).get(id_)

    async def heads(self, entity: Entity, restaurant: str, born: Mapping[str, datetime | None]) -> dict[str, Standing]:
        """Returns what `head` returns, for many ids with one read of each store. `born`: id -> the argument of
        `head`."""
        try:
            warm, found = await self._in_mirror(entity, restaurant, born)
        except (MirrorUnavailable, MirrorInDoubt) as error:
            raise _cold() from error
        if not warm:
            raise _cold()
        if missing := [id_ for id_ in born if id_ not in found]:
            try:
                found |= await self._in_postgres(entity, restaurant, missing)
            except UNAVAILABLE as error:
                if not all(self._in_window(born[id_]) for id_ in missing):
                    raise Unavailable(f"the {entity.name} cannot be read now", retry_after=2.0) from error
        return found

    async def earlier(self, entity: Entity, restaurant: str, id_: str) -> Standing | None:
        """Returns what an earlier creation with this id has made, for a creation without a claim; None if no store has
        it. A cold mirror may be behind PostgreSQL or ahead of it, so the larger head counts. Raises Unavailable if
        PostgreSQL is unavailable and the mirror lacks the entity."""
        try:
            warm, found = await self._in_mirror(entity, restaurant, [id_])
        except (MirrorUnavailable, MirrorInDoubt):
            warm, found = False, {}
        in_mirror = found.get(id_)
        if warm and in_mirror is not None:
            return in_mirror
        try:
            stored = (await self._in_postgres(entity, restaurant, [id_])).get(id_)
        except UNAVAILABLE as error:
            if in_mirror is None:
                raise Unavailable(f"the {entity.name} cannot be read now", retry_after=2.0) from error
            stored = None
        return max((one for one in (in_mirror, stored) if one), key=lambda one: one.head, default=None)

    async def _in_mirror(self, entity: Entity, restaurant: str, ids: Iterable[str]) -> tuple[bool, dict[str, Standing]]:
        asked = list(ids)
        warm, documents = await self._mirror.read(restaurant, entity.name, asked)
        return warm, {
            id_: Standing(one.head, entity.decode_state(one.state), one.state)
            for id_, one in zip(asked, documents, strict=True)
            if one is not None
        }

    async def _in_postgres(self, entity: Entity, restaurant: str, ids: list[str]) -> dict[str, Standing]:
        async with self._connect(restaurant) as connection:
            stored = await states.states_of(connection, entity, restaurant, ids)
        return {id_: Standing(one.head, entity.decode_state(one.state), one.state) for id_, one in stored.items()}

    def _in_window(self, born: datetime | None) -> bool:
        return born is not None and now() - born < self._window


def _cold() -> Unavailable:
    return Unavailable("nothing can be changed until the mirror is warm; retry", retry_after=2.0)
