"""Fills a cold mirror from PostgreSQL, finds where the mirror writer begins to read the log, and makes the mirror warm.

The module mirror_writer.py says when a mirror is warm, and what happens when another mirror replaces it.
"""

import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import uuid4

import structlog
from msgspec import Struct

from shared.entities import registry
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.messaging.log import Start
from shared.messaging.position import LogPosition
from shared.mirror.identity import mirror_identity
from shared.mirror.mirror import NOTHING_APPLIED, Apply, Mirror
from shared.mirror.stored_heads import FeedNote
from shared.postgres import states
from shared.postgres.feed import find_end
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.restaurants import list_restaurants
from shared.settings import Settings

log = structlog.get_logger(__name__)

OVERLAP = timedelta(minutes=10)
"""The mirror writer begins this long before PostgreSQL's last heartbeat in the log. Older changes are late."""
STATES_PER_SCRIPT = 250
"""The maximum number of states in one script: Redis runs no other command while a script runs."""
_LAST_HEARTBEAT = "select min(sent_at) from last_heartbeats where lane <> ''"
_REGISTER = "insert into mirror_identities (identity) values ($1) returning id, at"


class Rewind(Exception):
    """Another mirror has replaced the one that the mirror writer used, or the log does not prove its position."""


class StartPoint(Struct):
    position: LogPosition
    """The position of the mirror."""
    start: Start
    """Where the mirror writer begins to read."""
    server: str
    """The server that is filled (see `Mirror.server`)."""
    warm: bool
    settled_at: float
    """The earliest moment at which the mirror may become warm, on the monotonic clock."""


class WarmUp:
    def __init__(self, settings: Settings, postgres: Postgres, mirror: Mirror) -> None:
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._registered: tuple[int, datetime] | None = None
        """An identity that no mirror has yet, because the last attempt to make one warm did not end."""

    async def begin(self) -> StartPoint:
        """Returns where the writer begins: at the position in the mirror, or after `fill`. Raises like `fill`."""
        found_at = time.monotonic()
        # The server comes first: whatever is read or written afterwards counts only if the server is still the same.
        server, warm = await self._mirror.server()
        position = await self._mirror.log_position()
        if position is None or (position == NOTHING_APPLIED and not warm):
            return await self.fill(server, found_at)
        # A warm mirror that has applied nothing was left by a mirror writer that had found its position broken.
        start = (await self.fallbacks())[0] if position == NOTHING_APPLIED else position
        log.info("mirror_resumes", position=position, start=str(start), warm=warm)
        return StartPoint(position, start, server, warm, found_at + self._settings.mirror_settle_seconds)

    async def fallbacks(self) -> Sequence[Start]:
        """Returns where the log is read again if it does not prove the position of the mirror, the best one first. An
        earlier place costs only time, because applying a change is idempotent."""
        try:
            async with self._postgres.connection() as connection:
                heartbeat_at = await connection.fetchval(_LAST_HEARTBEAT)
        except UNAVAILABLE as error:
            log.warning("mirror_reads_the_whole_log", error=str(error) or type(error).__name__)
            heartbeat_at = None
        return [heartbeat_at - OVERLAP if heartbeat_at else "first"]

    async def fill(self, server: str, found_at: float) -> StartPoint:
        """Fills the empty mirror of a server from PostgreSQL. `found_at`: when it was found cold, on the monotonic
        clock. Raises Rewind, MirrorUnavailable, MirrorInDoubt or one of UNAVAILABLE."""
        async with self._postgres.connection() as connection:
            heartbeat_at = await connection.fetchval(_LAST_HEARTBEAT)
            await self._mirror.begin_log()
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
                        if await self._mirror.apply(chunk, at=NOTHING_APPLIED, server=server) is None:
                            raise Rewind("another mirror has replaced the one that is being filled")
            async for rows in states.holds(connection):
                await self._mirror.hold(rows)
        await self._mirror.settle([], note=FeedNote(end.xid, end.encode(), again=True))
        log.info("mirror_rebuilt", loaded=loaded, since=str(heartbeat_at))
        # In a new system nothing can be in flight.
        settled_at = found_at + self._settings.mirror_settle_seconds if loaded else found_at
        start_at = heartbeat_at - OVERLAP if heartbeat_at else "first"
        return StartPoint(NOTHING_APPLIED, start_at, server, False, settled_at)

    async def stamp(self, position: LogPosition, server: str) -> None:
        """Makes the mirror of a server warm under a new identity, after the log has been read to `position`. Raises
        Rewind if it is another mirror than the one that was filled, MirrorUnavailable, MirrorInDoubt or one of
        UNAVAILABLE."""
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
        if not await self._mirror.warm(position, server, identity):
            self._registered = registered
            raise Rewind("another mirror has replaced the one that was filled")
        log.info("mirror_warm", position=position, identity=id_, prefix=identity.prefix, until=identity.prefix_until)


def stored_state(entity: Entity, stored: states.StoredState) -> Apply:
    """Returns a state of PostgreSQL as it is applied to the mirror."""
    return Apply(entity, entity.decode_state(stored.state), stored.head, stored.state, stored.accepted_at, "stored")
