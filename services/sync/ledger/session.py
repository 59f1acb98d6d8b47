"""One session of the leader of the ledger: it reads the log and the feed in their orders, keeps the ids that one side
alone has (sides.py), and repairs them.

Only the log has it: 30 s after a heartbeat behind it came through its lane, look it up. In `changes` or dead, it is
done; on the retry ladder, it waits. Else read the event again and send it to its lane alone, every 5 minutes, 10 times.
Then it is unexplained.

Only the feed has it: after 10 s in which the log was read to its end, publish it to the logs.

Every five seconds it writes a checkpoint (shared/postgres/checkpoints.py): from where the comparison must begin again.
A checkpoint must follow the last one of this leader.
"""

import asyncio
import time
from contextlib import aclosing

import structlog
from msgspec import Struct, field

from services.sync.ledger import store
from services.sync.ledger.repairs import Repairs, changes_in
from services.sync.ledger.sides import MAX_IDS, FeedOnly, LogOnly, Sides
from shared.entities.contract import Lane
from shared.messaging.log import LogBatch, LogHeartbeat, LogReader, Start
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
_MAX_REPAIRS_PER_ROUND = 2_000
_MAX_RESENDS = 10
_MAX_HEARTBEATS = 1_000
# A smaller batch shows that the reader had received everything that the log had.
_AT_END_MESSAGES = 64
_AT_END_BYTES = 1 << 20
_CAME_THROUGH = "select id::text from heartbeats where id = any($1::uuid[])"


class EndOfSession(Exception):
    """A side does not prove what the session has read of it."""


class Patience(Struct, frozen=True):
    """Times in seconds, as in the table of this module."""

    look_up: float = 30.0
    missing_in_log: float = 10.0
    resend: float = 300.0


class LedgerTotals(Struct):
    """What all sessions of this process have done."""

    resent: int = 0
    republished: int = 0
    unexplained: set[str] = field(default_factory=set)
    """The changes that only the log has, and that ten repeats did not bring into PostgreSQL."""


class _Sent(Struct):
    times: int
    next_at: float
    """On the monotonic clock."""


class _Came(Struct, frozen=True):
    """A heartbeat that came through its lane: what is before it in the log has left the lane."""

    offset: int
    at: float
    """When this session saw it in PostgreSQL, on the monotonic clock."""


class LedgerSession:
    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        repairs: Repairs,
        patience: Patience,
        totals: LedgerTotals,
        *,
        begun: Checkpoint | None,
        last: str | None,
    ) -> None:
        """`connection`: holds the lock of the leader. `begun`: the checkpoint at which the session begins. `last`: id
        of the last checkpoint, which the next one must follow."""
        self._settings = settings
        self._connection = connection
        self._repairs = repairs
        self._patience = patience
        self._totals = totals
        self._last = last
        feed = (begun.feed_xid, begun.feed_seq) if begun else (0, 0)
        self.sides = Sides(begun.log_low if begun else BEFORE_LOG, begun.log_at if begun else BEFORE_LOG, feed)
        self._feed = FeedPosition(xid=feed[0], seq=feed[1])
        self._heartbeats: list[LogHeartbeat] = []
        """Heartbeats of the log that did not come through their lanes yet."""
        self._came: dict[str, list[_Came]] = {}
        self._sent: dict[str, _Sent] = {}
        self._at_end = 0.0
        """When the log was read to its end last, on the monotonic clock."""
        self._room = asyncio.Event()
        self._room.set()
        now = time.monotonic()
        self._checkpoint_at, self._prune_at = now + _CHECKPOINT_SECONDS, now

    # -- the log ---------------------------------------------------------------------------------------------------

    async def read_log(self, reader: LogReader) -> None:
        """Reads the log without end. Raises EndOfSession."""
        start: Start = "first" if self.sides.log_position == BEFORE_LOG else self.sides.log_position
        async with aclosing(reader.read(start)) as batches:
            async for batch in batches:
                if batch.broken is not None:
                    if batch.broken.reason == "expired" and self.sides.log_position == batch.broken.position:
                        log.error("ledger_range_expired", after=batch.broken.position, until=batch.positions[0])
                    raise EndOfSession(f"the position in the log is {batch.broken.reason}")
                self._take(batch)
                await self._room.wait()

    def _take(self, batch: LogBatch) -> None:
        before: dict[LogPosition, LogPosition] = {}
        previous = self.sides.log_position
        for position in batch.positions:
            before[position] = previous
            if not self.sides.read_log_to(position):
                raise EndOfSession("the log was cut while it was read again")
            previous = position
        for entry in batch.entries:
            # What this leader has published to the log has no lane.
            lane = entry.lane if entry.lane in set(Lane) else Lane.BACKGROUND.value
            for seen, _ in changes_in(entry.body):
                self.sides.from_log(seen.id, LogOnly(entry.position, before[entry.position], lane, seen.restaurantid))
        self._heartbeats = [*self._heartbeats, *batch.heartbeats][-_MAX_HEARTBEATS:]
        if len(batch.positions) < _AT_END_MESSAGES and sum(len(one.body) for one in batch.entries) < _AT_END_BYTES:
            self._at_end = time.monotonic()
        if batch.caught_up and self.sides.rereads:
            raise EndOfSession("the log ends before what was read of it")
        if len(self.sides.log) > MAX_IDS:
            self._room.clear()

    # -- a round ---------------------------------------------------------------------------------------------------

    async def round(self) -> None:
        """Reads the feed to its end, repairs what is overdue, and writes a checkpoint if it is time. Raises
        EndOfSession, PositionLost, ForeignDatabase or an error of PostgreSQL."""
        await self._read_feed()
        await self._look_up()
        await self._republish()
        if len(self.sides.log) <= MAX_IDS:
            self._room.set()
        now = time.monotonic()
        if now >= self._checkpoint_at and not self.sides.rereads:
            self._checkpoint_at = now + _CHECKPOINT_SECONDS
            await self._write_checkpoint()
        if now >= self._prune_at:
            self._prune_at = now + _PRUNE_SECONDS
            await prune_checkpoints(self._connection, days=_CHECKPOINT_DAYS)

    async def _read_feed(self) -> None:
        for _ in range(_MAX_PAGES_PER_ROUND):
            if len(self.sides.feed) > MAX_IDS:
                return
            page = await read_page(self._connection, self._feed, limit=_FEED_PAGE)
            if page.restarted:
                raise EndOfSession("PostgreSQL has lost commits that were read")
            now = time.monotonic()
            for change in page.changes:
                self.sides.from_feed(change.change_id, FeedOnly(change.xid, change.seq, change.restaurant_id, now))
            self._feed = page.position
            self.sides.feed_position = (page.position.xid, page.position.seq)
            if len(page.changes) < _FEED_PAGE:
                return

    async def _look_up(self) -> None:
        """Looks up the changes that only the log has although they must have left their lane."""
        await self._note_came_through()
        now = time.monotonic()
        left = {
            lane: max((one.offset for one in came if one.at <= now - self._patience.look_up), default=-1)
            for lane, came in self._came.items()
        }
        due: dict[str, LogOnly] = {}
        for change_id, found in self.sides.log.items():
            sent = self._sent.get(change_id)
            if found.at.offset < left.get(found.lane, -1) and (sent is None or sent.next_at <= now):
                due[change_id] = found
                if len(due) >= _MAX_REPAIRS_PER_ROUND:
                    break
        if not due:
            return
        keys = [(found.restaurant_id, change_id) for change_id, found in due.items()]
        done = await store.synced(self._connection, keys)
        done |= (await store.dead(self._connection, list(due))).keys()
        for change_id in done:
            self._forget(change_id)
        retrying = await store.retrying(self._connection, keys)
        for change_id in retrying:
            self._sent[change_id] = _Sent(self._sent[change_id].times if change_id in self._sent else 0, now + 30.0)
        lost = {change_id: found for change_id, found in due.items() if change_id not in done | retrying}
        if lost:
            await self._resend(lost, now)

    async def _resend(self, lost: dict[str, LogOnly], now: float) -> None:
        wanted = {}
        for change_id, found in lost.items():
            if change_id in self._sent and self._sent[change_id].times >= _MAX_RESENDS:
                self._sent[change_id].next_at = now + self._patience.resend
                if change_id not in self._totals.unexplained:
                    self._totals.unexplained.add(change_id)
                    log.error("change_unexplained", change_id=change_id, restaurant_id=found.restaurant_id)
            else:
                wanted[change_id] = found
        if not wanted:
            return
        sent = await self._repairs.resend(wanted)
        for change_id in sent:
            times = self._sent[change_id].times + 1 if change_id in self._sent else 1
            self._sent[change_id] = _Sent(times, now + self._patience.resend)
        self._totals.resent += len(sent)
        log.error("changes_sent_again", changes=len(sent), missing=len(wanted), examples=sent[:5])

    def _forget(self, change_id: str) -> None:
        self.sides.log.pop(change_id, None)
        self._sent.pop(change_id, None)
        self._totals.unexplained.discard(change_id)

    async def _note_came_through(self) -> None:
        if not self._heartbeats:
            return
        rows = await self._connection.fetch(_CAME_THROUGH, [one.id for one in self._heartbeats])
        came, now = {row[0] for row in rows}, time.monotonic()
        for one in self._heartbeats:
            if one.id in came:
                # The newest ones, and one that is old enough for `look_up`.
                known = self._came.setdefault(one.lane, [])
                old = [other for other in known if other.at <= now - self._patience.look_up]
                self._came[one.lane] = [*old[-1:], *known[len(old) :], _Came(one.offset, now)]
        self._heartbeats = [one for one in self._heartbeats if one.id not in came]

    async def _republish(self) -> None:
        """Publishes what the log lacks. The log was read to its end meanwhile, or it may still come."""
        overdue = self.sides.overdue(min(time.monotonic(), self._at_end) - self._patience.missing_in_log)
        wanted = [(found.restaurant_id, change_id) for change_id, found in overdue][:_MAX_REPAIRS_PER_ROUND]
        if not wanted:
            return
        done = await self._repairs.republish(self._connection, wanted)
        now = time.monotonic()
        for restaurant_id, change_id in wanted:  # they leave this side when the log reader meets them
            if (found := self.sides.feed.get(change_id)) is not None:
                self.sides.feed[change_id] = FeedOnly(found.xid, found.seq, restaurant_id, now)
        self._totals.republished += done
        log.error("changes_published_again", changes=done, missing=len(wanted), examples=[one[1] for one in wanted[:5]])

    async def _write_checkpoint(self) -> None:
        sides = self.sides
        written = await append_checkpoint(
            self._connection,
            self._last,
            log_low=sides.log_low,
            log_at=sides.log_at,
            feed=sides.feed_low,
            counts={"only_in_log": len(sides.log), "only_in_postgres": len(sides.feed)},
        )
        if written is None:
            raise EndOfSession("the last checkpoint is not the one of this leader")
        self._last = written
