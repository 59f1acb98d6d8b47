"""The feed: reads `changes` in the order in which PostgreSQL can promise it, by (xid, seq).

Guarantee: a reader that continues from its last position, page after page, receives every committed change at least
once. It must store the position together with the results of the changes.

Order: by transaction id, then by sequence number. A transaction with a small id may commit late, so a position never
passes the oldest transaction that still runs (`pg_snapshot_xmin`). Such a transaction, also one of another database of
the server, therefore stalls `read_page`. `VisibleFeed` reads what is visible beyond it as well, and only its position
waits.

A position names the row that stands there, and every read proves it. It is lost if the row is not there or if the
server has another timeline: after a failover that lost the last commits, or after a restore. The reader then begins
again at the checkpoint that its position names (`restarted` is set), and receives changes again that it has. If the
checkpoint is not there either, the read raises PositionLost, and the reader must load everything again, beginning at
`find_end`. The checkpoint of a position is at least 30 seconds old, so that a standby that lags has it.

The timeline includes the start of the server, because a restored snapshot of its disk has the same timeline, and may
have the row of the position although it lacks an earlier one. A server may hide the rest (managed servers do).
"""

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from shared.postgres.pool import Connection

if TYPE_CHECKING:
    import asyncpg

_PAGE_CHANGES = 500

_PROVE = """
select pg_current_snapshot() as snapshot, feed_timeline() as timeline,
    (select system_identifier from database_server) as system,
    case when $3::uuid is not null
        then exists(select from changes where xid = $1::text::xid8 and seq = $2 and change_id = $3::uuid)
        else $4::uuid is null or exists(select from checkpoints where id = $4::uuid) end as proved,
    (select xid from checkpoints where id = $4::uuid) as checkpoint_xid
"""
_COLUMNS = "xid, seq, restaurant_id::text, entity, entity_id::text, version, change_id::text"
_AFTER = f"select {_COLUMNS} from changes where (xid, seq) > ($1::text::xid8, $2) order by xid, seq"  # noqa: S608
_PAGE = f"""
select {_COLUMNS} from changes where (xid, seq) > ($1::text::xid8, $2) and xid < $3::text::xid8
order by xid, seq limit $4
"""  # noqa: S608  (the columns above)
# Rows that an earlier snapshot did not show: of transactions that ran then, and of later ones.
_NEWLY_VISIBLE = f"""
select {_COLUMNS} from changes where xid = any($1::text[]::xid8[])
union all
select {_COLUMNS} from changes where xid >= $2::text::xid8
order by xid, seq
"""  # noqa: S608  (the columns above)
_LAST = """
select xid, seq, change_id::text from changes where xid < $1::text::xid8 order by xid desc, seq desc limit 1
"""
_OLD_CHECKPOINT = """
select id::text from checkpoints where xid <= $1::text::xid8 and at <= now() - interval '30 seconds'
order by xid desc limit 1
"""


class PositionLost(Exception):
    """Neither the position nor its checkpoint is in this database: the reader must load everything again."""


class ForeignDatabase(Exception):
    """The database was restored from a dump into another server, and `ticketrail migrate` has not run since."""


class FeedPosition(Struct, frozen=True):
    """Everything before this position was read. Its text (`encode`) is opaque to others."""

    timeline: str = ""
    xid: int = 0
    seq: int = 0
    change_id: str = ""
    """The change at (xid, seq); empty at the beginning, and after a restart at a checkpoint."""
    checkpoint: str = ""
    """Id of a checkpoint of which everything before it was read; empty before the first one."""

    def encode(self) -> str:
        return f"{self.timeline}/{self.xid}/{self.seq}/{self.change_id}/{self.checkpoint}"

    @classmethod
    def decode(cls, text: str) -> "FeedPosition":
        """Raises ValueError if the text is not a position."""
        timeline, xid, seq, change_id, checkpoint = text.split("/")
        return cls(timeline, int(xid), int(seq), change_id, checkpoint)


BEGINNING = FeedPosition()


class FeedChange(Struct, frozen=True):
    """Identifies one change in the feed."""

    xid: int
    seq: int
    restaurant_id: str
    entity: str
    entity_id: str
    version: int
    change_id: str


class FeedPage(Struct, frozen=True):
    changes: list[FeedChange]
    position: FeedPosition
    """The position after these changes."""
    restarted: bool
    """True if the position was lost, so that the page begins at its checkpoint."""


class Snapshot(Struct, frozen=True):
    """A snapshot of PostgreSQL. Every transaction below `xmin` has ended, and none from `xmax` on is visible."""

    xmin: int
    xmax: int
    running: tuple[int, ...]
    """The transactions between both that had not ended."""


class _Proved(Struct, frozen=True):
    position: FeedPosition
    snapshot: Snapshot
    restarted: bool


async def find_end(connection: Connection) -> FeedPosition:
    """Returns the position at the end of the feed. A reader that loads the current states begins there. It must take
    the position before it loads. Raises ForeignDatabase."""
    proved = await _prove(connection, BEGINNING)
    return await _end(connection, proved)


async def read_page(connection: Connection, position: FeedPosition, *, limit: int) -> FeedPage:
    """Returns up to `limit` changes after `position`. Raises PositionLost, ForeignDatabase."""
    proved = await _prove(connection, position)
    begin = proved.position
    rows = await connection.fetch(_PAGE, str(begin.xid), begin.seq, str(proved.snapshot.xmin), limit)
    after = await _with_checkpoint(connection, _after(rows, begin))
    return FeedPage(_changes(rows), after, proved.restarted)


class VisibleFeed:
    """One reader of the feed that also gets the changes beyond the oldest running transaction, without waiting for it.

    `read` yields the changes that became visible since the last call. `position` then is the position to keep: it
    moves with every page, and never passes a running transaction."""

    def __init__(self, position: FeedPosition, *, page_changes: int = _PAGE_CHANGES) -> None:
        """`page_changes`: the maximum number of changes in a page."""
        self.position = position
        self._page_changes = page_changes
        self._seen: Snapshot | None = None
        self._stalled_since: float | None = None

    @property
    def seen(self) -> Snapshot | None:
        """The snapshot of the last complete read: everything visible in it was read."""
        return self._seen

    @property
    def stalled_seconds(self) -> float:
        """How long the oldest running transaction has held back the position; 0 if none does."""
        return 0.0 if self._stalled_since is None else time.monotonic() - self._stalled_since

    async def read(self, connection: Connection) -> AsyncGenerator[FeedPage, None]:
        """Yields at least one page. Each page may be empty, so that the reader keeps its position. If the reader does
        not take all pages, the next call yields the rest again. Raises PositionLost, ForeignDatabase."""
        proved = await _prove(connection, self.position)
        seen, snapshot = self._seen, proved.snapshot
        if proved.restarted:
            seen = self._seen = None
        self.position, restarted = proved.position, proved.restarted
        # The end is read before the changes, so that all changes before it are among them.
        end = await _end(connection, proved)
        async with connection.transaction(readonly=True):
            if seen is None:
                cursor = await connection.cursor(_AFTER, str(self.position.xid), self.position.seq)
            else:
                cursor = await connection.cursor(_NEWLY_VISIBLE, [str(one) for one in seen.running], str(seen.xmax))
            while rows := await cursor.fetch(self._page_changes):
                # Without an earlier snapshot, a read returns all changes in order, so the position may advance to each
                # change that no running transaction can precede. With one, a read returns only newly visible changes,
                # which may precede changes of earlier reads, so the position advances only at the end.
                passed = [row for row in rows if row["xid"] < snapshot.xmin] if seen is None else []
                moved = _after(passed, self.position)
                yield FeedPage(_changes(rows), moved, restarted)
                self.position, restarted = moved, False
        yield FeedPage([], end, restarted)
        if snapshot.xmin >= snapshot.xmax:
            self._stalled_since = None
        elif self._stalled_since is None or self._seen is None or self._seen.xmin != snapshot.xmin:
            self._stalled_since = time.monotonic()
        self.position, self._seen = end, snapshot


async def _prove(connection: Connection, position: FeedPosition) -> _Proved:
    """Returns the position, or the one at its checkpoint if it is lost."""
    row = await connection.fetchrow(
        _PROVE, str(position.xid), position.seq, position.change_id or None, position.checkpoint or None
    )
    assert row is not None
    timeline = row["timeline"]
    system = timeline.partition("-")[0]
    if system and row["system"] not in (None, "", system):
        raise ForeignDatabase("the database was restored into another server: run `ticketrail migrate`")
    snapshot = Snapshot(*row["snapshot"])
    same_timeline = not timeline or not position.timeline or timeline == position.timeline
    if same_timeline and row["proved"]:
        return _Proved(structs.replace(position, timeline=timeline), snapshot, False)
    if row["checkpoint_xid"] is None:
        raise PositionLost(position.encode())
    xid = min(position.xid, row["checkpoint_xid"])
    return _Proved(FeedPosition(timeline, xid, 0, "", position.checkpoint), snapshot, True)


async def _end(connection: Connection, proved: _Proved) -> FeedPosition:
    """Returns the position of the last change that no running transaction can precede."""
    row = await connection.fetchrow(_LAST, str(proved.snapshot.xmin))
    return await _with_checkpoint(connection, _after([row] if row else [], proved.position))


async def _with_checkpoint(connection: Connection, position: FeedPosition) -> FeedPosition:
    found = await connection.fetchval(_OLD_CHECKPOINT, str(position.xid))
    return structs.replace(position, checkpoint=found) if found else position


def _after(rows: "list[asyncpg.Record]", position: FeedPosition) -> FeedPosition:
    if not rows:
        return position
    last = rows[-1]
    return structs.replace(position, xid=last["xid"], seq=last["seq"], change_id=last["change_id"])


def _changes(rows: "list[asyncpg.Record]") -> list[FeedChange]:
    return [FeedChange(*row.values()) for row in rows]
