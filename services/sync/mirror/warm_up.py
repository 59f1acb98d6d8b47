"""Fills a cold mirror from PostgreSQL, finds where the mirror writer begins to read the log, and makes the mirror warm.

The module mirror_writer.py says when a mirror is warm, and what happens when another mirror replaces it.
"""

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from uuid import uuid4

import structlog
from msgspec import Struct

from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.messaging.log import LogReader, Start
from shared.mirror.identity import mirror_identity
from shared.mirror.mirror import Apply, LogState, Mirror
from shared.mirror.stored_heads import FeedNote
from shared.postgres import states
from shared.postgres.feed import find_end
from shared.postgres.pool import Postgres
from shared.restaurants import list_restaurants
from shared.settings import Settings

log = structlog.get_logger(__name__)

OVERLAP = timedelta(minutes=10)
"""The mirror writer begins this long before PostgreSQL's last heartbeat in the log. Older changes are late."""
NO_OFFSET = -1
STATES_PER_SCRIPT = 250
"""The maximum number of states in one script: Redis runs no other command while a script runs."""
_LAST_HEARTBEAT = "select min(sent_at) from heartbeats where lane <> ''"
_EPOCH = "select epoch from log_epochs order by id desc limit 1"
_REGISTER = "insert into mirror_identities (identity) values ($1) returning id, at"


class Rewind(Exception):
    """Another mirror or another log has replaced the one that the mirror writer used."""


class StartPoint(Struct):
    state: LogState
    start: Start
    server: str
    """The server that is filled (see `Mirror.server`)."""
    warm: bool
    settled_at: float
    """The earliest moment at which the mirror may become warm, on the monotonic clock."""


class WarmUp:
    def __init__(
        self, settings: Settings, postgres: Postgres, mirror: Mirror, new_reader: Callable[[], LogReader]
    ) -> None:
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._new_reader = new_reader
        self._registered: tuple[int, datetime] | None = None
        """An identity that no mirror has yet, because the last attempt to make one warm did not end."""

    async def begin(self) -> StartPoint:
        """Returns where the writer begins: at the offset in the mirror, or after `fill`. Raises like `fill`."""
        found_at = time.monotonic()
        # The server comes first: whatever is read or written afterwards counts only if the server is still the same.
        server, warm = await self._mirror.server()
        state = await self._mirror.log_state()
        if state is not None and state.offset != NO_OFFSET:
            log.info("mirror_resumes", offset=state.offset, warm=warm)
            return StartPoint(state, state.offset, server, warm, found_at + self._settings.mirror_settle_seconds)
        return await self.fill(server, found_at)

    async def fill(self, server: str, found_at: float) -> StartPoint:
        """Fills the empty mirror of a server from PostgreSQL. `found_at`: when it was found cold, on the monotonic
        clock. Raises Rewind, MirrorUnavailable, MirrorInDoubt or one of UNAVAILABLE."""
        # Prefer the epoch in the log, because a restored PostgreSQL may have an older epoch.
        epoch = await self._new_reader().first_epoch()
        async with self._postgres.connection() as connection:
            epoch = epoch or await connection.fetchval(_EPOCH)
            heartbeat_at = await connection.fetchval(_LAST_HEARTBEAT)
            if epoch is None:
                raise TimeoutError("the change log does not exist yet: run `ticketrail migrate`")
            state = LogState(epoch, NO_OFFSET)
            await self._mirror.begin_log(state)
            for restaurant in await list_restaurants(connection):
                await self._mirror.keep_restaurant(restaurant.id, encode(restaurant))
            # The feed loop goes on from here. Everything before it is among the states that are loaded below.
            end = await find_end(connection)
            loaded = 0
            since = now() - timedelta(days=self._settings.mirror_window_days)
            for entity in registry.ENTITIES.values():
                async for block in states.live_window(connection, entity, since):
                    loaded += len(block)
                    for start in range(0, len(block), STATES_PER_SCRIPT):
                        chunk = [stored_state(entity, stored) for stored in block[start : start + STATES_PER_SCRIPT]]
                        if await self._mirror.apply(chunk, at=state, server=server) is None:
                            raise Rewind("another mirror has replaced the one that is being filled")
            async for rows in states.holds(connection):
                await self._mirror.hold(rows)
        await self._mirror.settle([], note=FeedNote(end.xid, end.encode(), again=True))
        log.info("mirror_rebuilt", loaded=loaded, since=str(heartbeat_at))
        # In a new system nothing can be in flight.
        settled_at = found_at + self._settings.mirror_settle_seconds if loaded else found_at
        return StartPoint(state, heartbeat_at - OVERLAP if heartbeat_at else "first", server, False, settled_at)

    async def stamp(self, state: LogState, server: str) -> None:
        """Makes the mirror of a server warm under a new identity, after the log has been read to `state`. Raises Rewind
        if it is another mirror than the one that was filled, MirrorUnavailable, MirrorInDoubt or one of UNAVAILABLE."""
        if await self._mirror.server() == (server, True):
            return  # another mirror writer was faster
        if self._registered is None:
            async with self._postgres.connection() as connection:
                (row,) = await connection.fetch(_REGISTER, f"{server}:{uuid4()}")
            self._registered = (row["id"], row["at"])
        # If the mirror does not answer, it may have the identity already.
        registered, self._registered = self._registered, None
        id_, registered_at = registered
        # With two clocks, the prefix is long enough even if one of them is days behind.
        identity = mirror_identity(id_, max(registered_at, now()))
        if not await self._mirror.warm(state, server, identity):
            self._registered = registered
            raise Rewind("another mirror has replaced the one that was filled")
        log.info("mirror_warm", offset=state.offset, identity=id_, prefix=identity.prefix, until=identity.prefix_until)


def stored_state(entity: Entity, stored: states.StoredState) -> Apply:
    """Returns a state of PostgreSQL as it is applied to the mirror."""
    return Apply(entity, entity.decode_state(stored.state), stored.head, stored.state, stored.accepted_at, "stored")
