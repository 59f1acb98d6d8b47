"""Fills a cold mirror from PostgreSQL, finds where the mirror writer begins to read the log, and makes the mirror warm.

A mirror becomes warm when the following has happened, in this order, after it was found cold:

    settle period  `mirror_settle_seconds` have passed, so that claims of the lost mirror are recorded or taken back.
                   A new system does not wait, because nothing can be in flight there
    heartbeats     two heartbeats that were sent then have come through the log and through each lane that takes changes
                   of requests, into PostgreSQL. Every change recorded before them has been applied from the log, and is
                   in PostgreSQL, on the retry ladder or dead. It takes two, because a second consumer of a lane may
                   still hold older messages; more if a worker has more consumers (`lane_consumers`)
    dead letters   the states of open dead letters are loaded, because PostgreSQL lacks them, and perhaps the log
    feed           one whole turn of the feed loop, so that the mirror has what PostgreSQL has; the same turn notes all
                   failures

Whoever changes an entity then builds on its newest change, so that no version is given twice. Without PostgreSQL, the
mirror stays cold. The module mirror_writer.py says what happens when another mirror replaces this one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import uuid4

import asyncpg
import structlog
from msgspec import Struct

from services.sync.failures.classification import describe
from services.sync.failures.dead_letter_store import open_bodies
from services.sync.heartbeat import HeartbeatSender, stored_heartbeats
from services.sync.mirror.feed_loop import FeedLoop
from services.sync.mirror.stored_states import STATES_PER_SCRIPT, Rewind, compared_with_postgres, readable_states
from shared.backoff import backoff
from shared.entities import registry
from shared.entities.contract import BrokenContract, Lane, decode_change, encode, now, outline, split_batch
from shared.messaging.log import LogHeartbeat, Start
from shared.messaging.position import LogPosition
from shared.mirror.identity import mirror_identity
from shared.mirror.mirror import NOTHING_APPLIED, Apply, Mirror
from shared.mirror.stored_heads import FeedNote
from shared.postgres import states
from shared.postgres.checkpoints import list_checkpoints, positions
from shared.postgres.feed import ForeignDatabase, find_end
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.restaurants import list_restaurants
from shared.settings import Settings

log = structlog.get_logger(__name__)

T = TypeVar("T")

_LANES = (Lane.CRITICAL, Lane.NORMAL)
"""The lanes that must have delivered what was recorded. The background lane has imports, which may wait for long."""
_UNCONFIRMED_PAUSE_SECONDS = 1.0
_LOOK_INTERVAL_SECONDS = 0.05
_KEY_DAYS = 30
"""A repeat of a creation is recognised for this long (scripts/trim.lua keeps keys as long)."""
_REPLACED = "another mirror has replaced the one that is being filled"
_FIRST_MIRROR = "select not exists(select from mirror_identities)"
_REGISTER = "insert into mirror_identities (identity) values ($1) returning id, at"


class StartPoint(Struct):
    position: LogPosition
    """The position of the mirror."""
    start: Start
    """The position at which the mirror writer begins to read."""
    server: str
    """The server that is filled (see `Mirror.server`)."""
    warm: bool
    settled_at: float
    """The earliest moment at which the mirror may become warm, on the monotonic clock."""


class _Heartbeats(Struct):
    """Heartbeats that were sent at one time. All of them must come."""

    not_in_log: set[str]
    not_in_postgres: set[str]

    @property
    def came(self) -> bool:
        return not self.not_in_log and not self.not_in_postgres


class WarmUp:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        mirror: Mirror,
        heartbeats: HeartbeatSender,
        *,
        send_again_seconds: float = 10.0,
    ) -> None:
        """`postgres`: a pool of the writer role. `heartbeats`: need not run. `send_again_seconds`: heartbeats that have
        not come after this time may be lost, or wait behind a backlog, so others are sent too."""
        self._settings = settings
        self._postgres = postgres
        self._mirror = mirror
        self._heartbeats = heartbeats
        self._send_again_seconds = send_again_seconds
        self._sent: list[_Heartbeats] = []
        self._registered: tuple[int, datetime] | None = None
        """An identity that no mirror has yet, because the last attempt to make one warm did not end."""

    async def begin(self) -> StartPoint:
        """Returns where the writer begins: at the position in the mirror, or after `fill`. Raises like `fill`."""
        found_at = time.monotonic()
        # The server comes first: later reads and writes count only if the server is still the same.
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
                return await _log_lows(connection)
        except UNAVAILABLE as error:
            log.warning("mirror_reads_the_whole_log", error=str(error) or type(error).__name__)
            return ["first"]

    async def fill(self, server: str, found_at: float) -> StartPoint:
        """Fills the empty mirror of a server from one snapshot of PostgreSQL. `found_at`: when it was found cold, on
        the monotonic clock. Raises Rewind, MirrorUnavailable, MirrorInDoubt, ForeignDatabase or an error of
        PostgreSQL."""
        async with (
            self._postgres.connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            # The first query takes the snapshot, which must have everything before the place in the log: all later
            # changes are read from the log. The feed loop continues behind the snapshot too.
            starts = await _log_lows(connection)
            end = await find_end(connection)
            await self._mirror.begin_log()
            await self._mirror.known_keys.forget()
            for restaurant in await list_restaurants(connection):
                await self._mirror.keep_restaurant(restaurant.id, encode(restaurant))
            loaded = 0
            since = now() - timedelta(days=self._settings.mirror_window_days)
            for entity in registry.ENTITIES.values():
                async with aclosing(states.live_window(connection, entity, since)) as blocks:
                    async for block in blocks:
                        loaded += len(block)
                        await self._fill_block(readable_states(entity, block), server)
            async with aclosing(states.holds(connection)) as held:
                async for rows in held:
                    await self._mirror.hold(rows)
            new_system = not loaded and await connection.fetchval(_FIRST_MIRROR)
        await self._mirror.settle([], note=FeedNote(end.xid, end.encode(), again=True))
        log.info("mirror_rebuilt", loaded=loaded, start=str(starts[0]))
        settled_at = found_at if new_system else found_at + self._settings.mirror_settle_seconds
        return StartPoint(NOTHING_APPLIED, starts[0], server, False, settled_at)

    async def _fill_block(self, block: Sequence[Apply], server: str) -> None:
        for start in range(0, len(block), STATES_PER_SCRIPT):
            chunk = block[start : start + STATES_PER_SCRIPT]
            if await self._mirror.apply(chunk, at=NOTHING_APPLIED, server=server) is None:
                raise Rewind(_REPLACED)

    # -- from cold to warm -------------------------------------------------------------------------------------

    def read_from_log(self, heartbeats: Iterable[LogHeartbeat]) -> None:
        """Records that the mirror has the log up to these heartbeats."""
        for sent in self._sent:
            sent.not_in_log.difference_update(one.id for one in heartbeats)

    async def prove(self, begun: StartPoint) -> None:
        """Waits until the mirror may become warm, while its mirror writer reads the log. Raises Rewind,
        MirrorUnavailable or MirrorInDoubt."""
        await asyncio.sleep(max(0.0, begun.settled_at - time.monotonic()))
        await self._pass_lanes()
        await self._with_postgres(self._load_dead_letters)
        while not await self._with_postgres(self._tell_feed):  # noqa: ASYNC110  (nothing tells when the mirror is filled)
            await asyncio.sleep(_LOOK_INTERVAL_SECONDS)

    async def _pass_lanes(self) -> None:
        """Waits until all heartbeats of one sending have come."""
        self._sent = []
        send_at = 0.0
        while not any(sent.came for sent in self._sent):
            if time.monotonic() >= send_at:
                pause_seconds = self._send_again_seconds if await self._send() else _UNCONFIRMED_PAUSE_SECONDS
                send_at = time.monotonic() + pause_seconds
            if ids := {id_ for sent in self._sent if not sent.not_in_log for id_ in sent.not_in_postgres}:
                stored = await self._with_postgres(lambda: self._stored(ids))
                for sent in self._sent:
                    sent.not_in_postgres -= stored
            await asyncio.sleep(_LOOK_INTERVAL_SECONDS)

    async def _send(self) -> bool:
        """Sends heartbeats. Returns False if the broker has not confirmed all of them."""
        per_lane = max(2, self._settings.lane_consumers)
        lanes = {str(uuid4()): lane for lane in _LANES for _ in range(per_lane)}
        sent = _Heartbeats(set(lanes), set(lanes))
        self._sent.append(sent)  # before the confirm, because the log may deliver them earlier
        confirmed = all(await asyncio.gather(*(self._heartbeats.send_now(lane, id_) for id_, lane in lanes.items())))
        if not confirmed:
            self._sent.remove(sent)
        return confirmed

    async def _stored(self, ids: Collection[str]) -> set[str]:
        async with self._postgres.connection() as connection:
            return await stored_heartbeats(connection, ids)

    async def _load_dead_letters(self) -> None:
        """Loads the states of open dead letters that are newer than the states in PostgreSQL. They are pending, and the
        feed loop then notes their failures."""
        async with self._postgres.connection() as connection, aclosing(open_bodies(connection)) as blocks:
            async for block in blocks:
                found = [dead for change_id, body in block for dead in _readable_changes(body, change_id)]
                for at in range(0, len(found), STATES_PER_SCRIPT):
                    chunk = found[at : at + STATES_PER_SCRIPT]
                    late = [chunk[place] for place in await self._mirror.apply(chunk) or ()]
                    await self._mirror.apply(await compared_with_postgres(connection, late))

    async def _tell_feed(self) -> bool:
        return await FeedLoop(self._settings, self._postgres, self._mirror).turn()

    async def _with_postgres(self, work: Callable[[], Awaitable[T]]) -> T:
        """Repeats `work` until PostgreSQL answers."""
        attempt = 0
        while True:
            try:
                return await work()
            except (ForeignDatabase, asyncpg.PostgresError, *UNAVAILABLE) as error:
                attempt += 1
                log.warning("warm_up_waits", error=describe(error), attempt=attempt)
                await asyncio.sleep(backoff(attempt))

    async def stamp(self, position: LogPosition, server: str) -> None:
        """Makes the mirror of a server warm under a new identity, after the log has been read to `position`. Raises
        Rewind if it is another mirror than the one that was filled, MirrorUnavailable or MirrorInDoubt."""
        if await self._mirror.server() == (server, True):
            return  # another mirror writer was faster
        if self._registered is None:
            self._registered = await self._with_postgres(lambda: self._register(server))
        # If the mirror does not answer, it may have the identity already.
        registered, self._registered = self._registered, None
        id_, registered_at = registered
        # With two clocks, the prefix is long enough even if one of them is days behind.
        identity = mirror_identity(id_, max(registered_at, now()))
        if not await self._mirror.warm(position, server, identity):
            self._registered = registered
            raise Rewind("another mirror has replaced the one that was filled")
        log.info("mirror_warm", position=position, identity=id_, prefix=identity.prefix, until=identity.prefix_until)

    # -- the keys of requests ------------------------------------------------------------------------------------

    async def load_keys(self) -> None:
        """Loads the heads of the entities that were created with a key in the last weeks, if a warm mirror lacks them.
        Until then, a creation with a key looks in PostgreSQL. Raises Rewind, MirrorUnavailable or MirrorInDoubt."""
        await self._with_postgres(self._load_keys)

    async def _load_keys(self) -> None:
        identity = await self._mirror.known_keys.lacking()
        if identity is None:
            return
        known, loaded = self._mirror.known_keys, 0
        since = now() - timedelta(days=_KEY_DAYS)
        async with self._postgres.connection() as connection:
            for entity in registry.ENTITIES.values():
                if entity.keyed is None:
                    continue
                async with aclosing(states.keyed_heads(connection, entity, entity.keyed, since)) as blocks:
                    async for heads in blocks:
                        loaded += len(heads)
                        if not await known.load(identity, entity.name, heads):
                            raise Rewind(_REPLACED)
        if not await known.complete(identity):
            raise Rewind(_REPLACED)
        log.info("mirror_knows_keys", loaded=loaded)

    async def _register(self, server: str) -> tuple[int, datetime]:
        async with self._postgres.connection() as connection:
            (row,) = await connection.fetch(_REGISTER, f"{server}:{uuid4()}")
        return row["id"], row["at"]


async def _log_lows(connection: Connection) -> Sequence[Start]:
    """Returns positions such that PostgreSQL has everything up to each of them, or has it as a dead letter; the newest
    first. The log may have lost the newest ones."""
    return positions(await list_checkpoints(connection), "log_low") or ["first"]


def _readable_changes(body: bytes, change_id: str) -> list[Apply]:
    """Returns the change with this id in the body of a dead letter, or nothing if this release cannot read it."""
    try:
        event = next((event for event in split_batch(body) if (seen := outline(event)) and seen.id == change_id), None)
        if event is None:
            return []
        change = decode_change(event)
        entity, state = registry.read(change)
    except BrokenContract:
        return []  # no reader of the mirror could read it either
    return [Apply(entity, state, change.head, bytes(change.data.after), change.time, "late")]
