"""One session of the ledger: it reads the log and the feed in their orders, keeps the ids that one side alone has
(sides.py), and looks them up.

The leader has a session with repairs. Only the log has a change: 30 s after a heartbeat behind it came through its
lane, look it up. In `changes` or dead, it is done; on the retry ladder, it waits. Else read the event again and send it
to its lane alone, every 5 minutes, 10 times. Then it is unexplained. Only the feed has it: after 10 s in which the log
was read to its end, publish it to the logs.

A report (report.py) has a session without repairs, which lists the differences.

Every five seconds the leader writes a checkpoint (shared/postgres/checkpoints.py): from where the comparison must begin
again. A checkpoint must follow the last one of this leader.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing

import structlog
from msgspec import Struct, field

from services.sync.ledger import store
from services.sync.ledger.log_changes import changes_in
from services.sync.ledger.repairs import Repairs
from services.sync.ledger.sides import MAX_IDS, FeedOnly, LogOnly, Sides
from shared.entities.contract import Lane
from shared.messaging.log import LogBatch, LogHeartbeat, LogReader, Start
from shared.messaging.log_tap import TappedReader
from shared.messaging.position import LogPosition
from shared.postgres.checkpoints import BEFORE_LOG, Checkpoint, append_checkpoint, prune_checkpoints
from shared.postgres.feed import FeedPosition, read_page
from shared.postgres.pool import Connection
from shared.settings import Settings

log = structlog.get_logger(__name__)

_CHECKPOINT_SECONDS = 5.0
_PRUNE_SECONDS = 60.0
_CHECKPOINT_DAYS = 30
_FEED_PAGE = 1_000
_MAX_PAGES_PER_ROUND = 20
_MAX_LOOKED_UP = 2_000
"""The maximum number of changes in one look-up, and of repairs in a round."""
_MAX_RESENDS = 10
_MAX_HEARTBEATS = 1_000
_MAX_EXPIRED_RANGES = 100


class EndOfSession(Exception):
    """A side does not prove what the session has read of it."""


class Patience(Struct, frozen=True):
    """Times in seconds, as in the description of this module."""

    look_up: float = 30.0
    missing_in_log: float = 10.0
    resend: float = 300.0


class ExpiredRange(Struct, frozen=True):
    """Offsets of the log between which the retention has removed entries that were not compared."""

    after: int
    before: int


class LedgerTotals(Struct):
    """The counts of all leaders. Each checkpoint stores them, so that the next leader continues to count."""

    open: dict[str, int] = field(default_factory=dict)
    """Place -> number of changes that one side alone has: `queued`, `retrying`, `resent` and `unexplained` for the
    changes that only the log has, `only_in_postgres` for the others."""
    resent: int = 0
    republished: int = 0
    unexplained: set[str] = field(default_factory=set)
    """The changes that only the log has, and that ten repeats did not bring into PostgreSQL."""
    expired: list[ExpiredRange] = field(default_factory=list)


class _LookedUp(Struct):
    """A change that a look-up did not find in `changes`."""

    times: int
    """How often it was sent again; 0 while it is on the retry ladder."""
    next_at: float
    """On the monotonic clock."""


class _Came(Struct, frozen=True):
    """A heartbeat that came through its lane: every change before it in the log has left the lane."""

    offset: int
    at: float
    """The monotonic time at which this session saw it in PostgreSQL; in a report, the time of its commit."""


class Places(Struct, frozen=True):
    """The places of the changes that the log has and `changes` lacks."""

    retrying: set[str]
    dead: dict[str, str]
    """Change id -> open, replaying, discarded or edited."""


class LedgerSession:
    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        patience: Patience,
        *,
        begun: Checkpoint | None,
        repairs: Repairs | None = None,
        totals: LedgerTotals | None = None,
        last: str | None = None,
    ) -> None:
        """`begun`: the checkpoint at which the session begins; None is the first entry. `repairs`: None in a report; a
        leader also passes its `totals`, and `last`, the id of the last checkpoint, which the next one must follow. The
        `connection` of a leader holds its lock."""
        self._settings = settings
        self._connection = connection
        self._repairs = repairs
        self._patience = patience
        self.totals = totals or LedgerTotals()
        self.last = last
        """Id of the last checkpoint."""
        feed = (begun.feed_xid, begun.feed_seq) if begun else (0, 0)
        self.sides = Sides(begun.log_low if begun else BEFORE_LOG, begun.log_at if begun else BEFORE_LOG, feed)
        self._feed = FeedPosition(xid=feed[0], seq=feed[1])
        self._heartbeats: list[LogHeartbeat] = []
        """Heartbeats of the log that did not come through their lanes yet."""
        self._came: dict[str, list[_Came]] = {}
        self._waiting: dict[str, _LookedUp] = {}
        self.unreadable = 0
        """The number of events without a valid change id. They are dead letters."""
        self.caught_up = False
        """True after everything was read that was in the log at the beginning."""
        self.feed_at_end = False
        self._at_end = self._steady_since = 0.0
        """When the log was read to its end last, and since when that was never long ago; on the monotonic clock."""
        self._room = asyncio.Event()
        self._room.set()
        now = time.monotonic()
        self._checkpoint_at, self._prune_at = now + _CHECKPOINT_SECONDS, now

    # -- the log ---------------------------------------------------------------------------------------------------

    async def read_log(self, reader: LogReader | TappedReader) -> None:
        """Reads the log without end. Raises EndOfSession."""
        start: Start = "first" if self.sides.log_position == BEFORE_LOG else self.sides.log_position
        async with aclosing(reader.read(start)) as batches:
            async for batch in batches:
                if batch.broken is not None:
                    if batch.broken.reason != "expired":
                        raise EndOfSession(f"the position in the log is {batch.broken.reason}")
                    self._pass_expired(batch.broken.position, batch.positions[0])
                self._take(batch)
                await self._room.wait()

    def _pass_expired(self, after: LogPosition, first: LogPosition) -> None:
        self.sides.log_position = LogPosition(first.offset - 1, 0)
        if first.offset <= after.offset + 1:
            return
        log.error("ledger_range_expired", after=after.offset, before=first.offset)
        # A session that begins at the same checkpoint finds the same range, which may have grown.
        others = [one for one in self.totals.expired if one.after != after.offset]
        self.totals.expired = [*others, ExpiredRange(after.offset, first.offset)][-_MAX_EXPIRED_RANGES:]

    def _take(self, batch: LogBatch) -> None:
        before: dict[LogPosition, LogPosition] = {}
        previous = self.sides.log_position
        for position in batch.positions:
            before[position] = previous
            if not self.sides.read_log_to(position):
                raise EndOfSession("the log was cut while it was read again")
            previous = position
        for entry in batch.entries:
            # A message that a leader published to the log alone has no lane.
            lane = entry.lane if entry.lane in set(Lane) else Lane.BACKGROUND.value
            changes, unreadable = changes_in(entry.body)
            self.unreadable += unreadable
            for change, _ in changes:
                self.sides.from_log(change.id, LogOnly(entry.position, before[entry.position], lane, change))
        self._heartbeats = [*self._heartbeats, *batch.heartbeats][-_MAX_HEARTBEATS:]
        if batch.at_end is not None:
            self._note_end(batch.at_end)
        if batch.caught_up:
            if self.sides.rereads:
                raise EndOfSession("the log ends before the last entry that was read")
            self.caught_up = True
        if len(self.sides.log) > MAX_IDS:
            self._room.clear()

    def _note_end(self, at: float) -> None:
        if at - self._at_end > self._max_pause:
            self._steady_since = at
        self._at_end = at

    @property
    def _max_pause(self) -> float:
        """The seconds after which a log that delivers nothing, not even a heartbeat, counts as interrupted."""
        return max(10.0, 3 * self._settings.heartbeat_interval_seconds)

    @property
    def steady_seconds(self) -> float:
        """How long every read has reached the end of the log without a pause; 0 during a pause."""
        now = time.monotonic()
        steady = self.caught_up and not self.sides.rereads and now - self._at_end <= self._max_pause
        return now - self._steady_since if steady else 0.0

    # -- a round ---------------------------------------------------------------------------------------------------

    async def round(self) -> None:
        """Reads the feed to its end. A leader also repairs overdue differences, and writes a checkpoint if it is time.
        Raises EndOfSession, PositionLost, ForeignDatabase or an error of PostgreSQL."""
        await self._read_feed()
        await self._note_came_through()
        if self._repairs is not None:
            await self._look_up(self._repairs)
            await self._republish(self._repairs)
        # A report must finish, however many changes wait in the lanes.
        if len(self.sides.log) <= MAX_IDS or (self._repairs is None and self.feed_at_end):
            self._room.set()
        if self._repairs is not None:
            await self._keep_checkpoints()

    async def _read_feed(self) -> None:
        self.feed_at_end = False
        for _ in range(_MAX_PAGES_PER_ROUND):
            if len(self.sides.feed) > MAX_IDS:
                # The feed waits until the log has been read further.
                self.feed_at_end = self.caught_up
                return
            page = await read_page(self._connection, self._feed, limit=_FEED_PAGE)
            if page.restarted:
                raise EndOfSession("PostgreSQL has lost commits that were read")
            now = time.monotonic()
            for change in page.changes:
                self.sides.from_feed(FeedOnly(change, now))
            self._feed = page.position
            self.sides.feed_position = (page.position.xid, page.position.seq)
            if len(page.changes) < _FEED_PAGE:
                self.feed_at_end = True
                return

    async def _note_came_through(self) -> None:
        if not self._heartbeats:
            return
        came = await store.came_through(self._connection, [one.id for one in self._heartbeats])
        now = time.monotonic()
        for one in self._heartbeats:
            if one.id in came:
                # A leader waits on its own clock, because another server of PostgreSQL may have written the row.
                at = now if self._repairs else now - came[one.id]
                # The newest ones, and one that is old enough for `look_up`.
                known = self._came.setdefault(one.lane, [])
                old = [other for other in known if other.at <= now - self._patience.look_up]
                self._came[one.lane] = [*old[-1:], *known[len(old) :], _Came(one.offset, at)]
        self._heartbeats = [one for one in self._heartbeats if one.id not in came]

    def left_their_lanes(self, *, patience: float) -> set[str]:
        """Returns the changes that only the log has although they left their lane more than `patience` seconds ago."""
        before = time.monotonic() - patience
        left = {
            lane: max((one.offset for one in came if one.at <= before), default=-1) for lane, came in self._came.items()
        }
        return {id_ for id_, found in self.sides.log.items() if found.at.offset < left.get(found.lane, -1)}

    def overdue(self) -> Iterator[tuple[str, FeedOnly]]:
        """Yields the changes that only the feed has although the log was read to its end meanwhile."""
        yield from self.sides.overdue(self._at_end - self._patience.missing_in_log)

    async def look_up(self, wanted: Mapping[str, LogOnly]) -> Places:
        """Looks up changes that only the log has, and takes those from their side that `changes` has. The places are
        asked in the order in which a change passes them."""
        keys = [(restaurant, id_) for id_, found in wanted.items() if (restaurant := found.change.restaurant_id)]
        retrying = await store.retrying(self._connection, keys)
        dead = await store.dead(self._connection, list(wanted))
        synced = await store.synced(self._connection, keys)
        for change_id, place in synced.items():
            self._forget(change_id, place)
        return Places(retrying - synced.keys(), {id_: how for id_, how in dead.items() if id_ not in synced})

    async def look_up_all(self) -> AsyncIterator[Places]:
        """Looks up all changes that only the log has, in blocks."""
        known = list(self.sides.log.items())
        for start in range(0, len(known), _MAX_LOOKED_UP):
            yield await self.look_up(dict(known[start : start + _MAX_LOOKED_UP]))

    def _forget(self, change_id: str, place: tuple[int, int] | None) -> None:
        self.sides.found(change_id, place)
        self._waiting.pop(change_id, None)
        self.totals.unexplained.discard(change_id)

    # -- repairs -----------------------------------------------------------------------------------------------------

    async def _look_up(self, repairs: Repairs) -> None:
        """Looks up the changes that only the log has although they must have left their lane, and sends them again."""
        now = time.monotonic()
        due: dict[str, LogOnly] = {}
        for change_id in self.left_their_lanes(patience=self._patience.look_up):
            waiting = self._waiting.get(change_id)
            if waiting is None or waiting.next_at <= now:
                due[change_id] = self.sides.log[change_id]
                if len(due) >= _MAX_LOOKED_UP:
                    break
        if not due:
            return
        places = await self.look_up(due)
        for change_id in places.dead:
            self._forget(change_id, None)
        for change_id in places.retrying:
            times = self._waiting[change_id].times if change_id in self._waiting else 0
            self._waiting[change_id] = _LookedUp(times, now + self._patience.look_up)
        lost = {id_: one for id_, one in due.items() if id_ in self.sides.log and id_ not in places.retrying}
        if lost:
            await self._resend(repairs, lost, now)

    async def _resend(self, repairs: Repairs, lost: dict[str, LogOnly], now: float) -> None:
        wanted = {}
        for change_id, found in lost.items():
            times = self._waiting[change_id].times if change_id in self._waiting else 0
            if times >= _MAX_RESENDS or change_id in self.totals.unexplained:
                self._waiting[change_id] = _LookedUp(_MAX_RESENDS, now + self._patience.resend)
                if change_id not in self.totals.unexplained:
                    self.totals.unexplained.add(change_id)
                    log.error("change_unexplained", change_id=change_id, restaurant_id=found.change.restaurant_id)
            else:
                wanted[change_id] = found
        if not wanted:
            return
        sent = await repairs.resend(wanted)
        for change_id in sent:
            times = self._waiting[change_id].times + 1 if change_id in self._waiting else 1
            self._waiting[change_id] = _LookedUp(times, now + self._patience.resend)
        self.totals.resent += len(sent)
        log.error("changes_sent_again", changes=len(sent), missing=len(wanted), examples=sent[:5])

    async def _republish(self, repairs: Repairs) -> None:
        """Publishes what the log lacks."""
        overdue = list(self.overdue())[:_MAX_LOOKED_UP]
        if not overdue:
            return
        done = await repairs.republish(self._connection, [(one.change.restaurant_id, id_) for id_, one in overdue])
        now = time.monotonic()
        for change_id, found in overdue:  # they leave this side when the log reader meets them
            if change_id in self.sides.feed:
                self.sides.feed[change_id] = FeedOnly(found.change, now)
        self.totals.republished += done
        log.error(
            "changes_published_again", changes=done, missing=len(overdue), examples=[id_ for id_, _ in overdue[:5]]
        )

    async def _keep_checkpoints(self) -> None:
        now = time.monotonic()
        if now >= self._checkpoint_at and not self.sides.rereads:
            self._checkpoint_at = now + _CHECKPOINT_SECONDS
            await self._write_checkpoint()
        if now >= self._prune_at:
            self._prune_at = now + _PRUNE_SECONDS
            await prune_checkpoints(self._connection, days=_CHECKPOINT_DAYS)

    async def _write_checkpoint(self) -> None:
        sides, totals = self.sides, self.totals
        # The feed has brought the others, or they are in an expired range.
        totals.unexplained &= sides.log.keys()
        self._waiting = {id_: one for id_, one in self._waiting.items() if id_ in sides.log}
        places = Counter(
            "unexplained" if id_ in totals.unexplained else "resent" if one.times else "retrying"
            for id_, one in self._waiting.items()
        )
        totals.open = {
            "queued": len(sides.log) - len(self._waiting),
            **{place: places[place] for place in ("retrying", "resent", "unexplained")},
            "only_in_postgres": len(sides.feed),
        }
        written = await append_checkpoint(
            self._connection, self.last, log_low=sides.log_low, log_at=sides.log_at, feed=sides.feed_low, counts=totals
        )
        if written is None:
            raise EndOfSession("the newest checkpoint is not from this leader")
        self.last = written
