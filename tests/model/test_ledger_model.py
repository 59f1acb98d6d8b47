"""The ledger, simulated: whatever log and PostgreSQL lose, both hold the same changes in the end, and none that was
left.

Real: the sides and the rules of a session. Ours: the log, which loses its end; the lanes; PostgreSQL with its
transaction ids, which loses its last commits and then gives the same ids again; and the order of steps, which a seed
chooses."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from services.sync.ledger.log_changes import LogChange
from services.sync.ledger.sides import FeedOnly, LogOnly, Sides
from shared.messaging.position import LogPosition
from shared.postgres.checkpoints import BEFORE_LOG
from shared.postgres.feed import FeedChange

RUNS = 400


class Commit(NamedTuple):
    change: str
    xid: int


class Written(NamedTuple):
    """A checkpoint in the write-ahead log."""

    number: int
    log_low: LogPosition
    log_at: LogPosition
    feed: tuple[int, int]


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.made = self.checkpoints = 0
        self.log: list[tuple[str, int]] = []
        self.lane: list[str] = []
        self.wal: list[Commit | Written] = []
        self.running: dict[int, str] = {}
        self.next_xid = 1
        self.begin_session()

    # -- the stores --------------------------------------------------------------------------------------------

    def rows(self) -> dict[int, str]:
        return {one.xid: one.change for one in self.wal if isinstance(one, Commit)}

    def written(self) -> list[Written]:
        return [one for one in self.wal if isinstance(one, Written)]

    def publish(self, change: str) -> None:
        self.log.append((change, self.random.getrandbits(32)))

    def new(self) -> str:
        self.made += 1
        return str(self.made)

    def records(self) -> None:
        change = self.new()
        self.lane.append(change)
        self.publish(change)

    def reaches_the_lane_alone(self) -> None:
        self.lane.append(self.new())

    def reaches_the_log_alone(self) -> None:
        self.publish(self.new())

    def begins(self) -> None:
        if self.lane:
            self.running[self.next_xid] = self.lane.pop(self.random.randrange(min(3, len(self.lane))))
            self.next_xid += 1

    def commits(self) -> None:
        if self.running:
            xid = self.random.choice(list(self.running))
            change = self.running.pop(xid)
            if change not in self.rows().values():
                self.wal.append(Commit(change, xid))

    def log_loses_its_end(self) -> None:
        self.log = self.log[: self.random.randrange(len(self.log) + 1)]

    def postgres_loses_its_end(self) -> None:
        self.wal = self.wal[: self.random.randrange(max(0, len(self.wal) - 8), len(self.wal) + 1)]
        self.lane = [*self.running.values(), *self.lane]
        self.running = {}
        self.next_xid = max([one.xid for one in self.wal if isinstance(one, Commit)], default=0) + 1
        self.begin_session()  # the leader has lost its connection

    # -- the leader --------------------------------------------------------------------------------------------

    def at(self, offset: int) -> LogPosition:
        return LogPosition(offset, self.log[offset][1])

    def proves(self, position: LogPosition) -> bool:
        return position == BEFORE_LOG or (position.offset < len(self.log) and self.at(position.offset) == position)

    def begin_session(self) -> None:
        written = self.written()
        self.last = written[-1].number if written else None
        chosen = next((one for one in reversed(written) if self.proves(one.log_at)), None)
        low, at, feed = (chosen.log_low, chosen.log_at, chosen.feed) if chosen else (BEFORE_LOG, BEFORE_LOG, (0, 0))
        self.sides = Sides(low, at, feed)
        self.row = self.rows().get(feed[0])

    def proves_the_feed(self) -> bool:
        xid = self.sides.feed_position[0]
        return xid == 0 or self.rows().get(xid) == self.row

    def check(self) -> None:
        if not self.proves_the_feed() or not self.proves(self.sides.log_position):
            self.begin_session()

    def reads_the_log(self, count: int | None = None) -> None:
        self.check()
        for _ in range(self.random.randrange(1, 6) if count is None else count):
            offset = self.sides.log_position.offset + 1
            if offset >= len(self.log):
                if self.sides.rereads:
                    self.begin_session()
                return
            before = self.sides.log_position
            if not self.sides.read_log_to(self.at(offset)):
                self.begin_session()
                return
            self.sides.from_log(self.log[offset][0], LogOnly(self.at(offset), before, "critical", LogChange()))

    def reads_the_feed(self) -> None:
        self.check()
        xmin = min([*self.running, self.next_xid])
        rows = sorted((xid, change) for xid, change in self.rows().items())
        for xid, change in [one for one in rows if self.sides.feed_position < (one[0], 1) and one[0] < xmin][:6]:
            self.sides.from_feed(FeedOnly(FeedChange(xid, 1, "", "", "", 1, change), 0.0))
            self.sides.feed_position, self.row = (xid, 1), change

    def writes_a_checkpoint(self) -> None:
        self.check()
        written = self.written()
        if (written[-1].number if written else None) != self.last:
            self.begin_session()
        if self.sides.rereads:
            return
        self.checkpoints += 1
        self.last = self.checkpoints
        self.wal.append(Written(self.checkpoints, self.sides.log_low, self.sides.log_at, self.sides.feed_low))

    def repairs(self) -> None:
        self.check()
        busy, rows = {*self.lane, *self.running.values()}, {change: xid for xid, change in self.rows().items()}
        for change in list(self.sides.log):
            if change in rows:
                self.sides.found(change, (rows[change], 1))
            elif change not in busy:
                self.lane.append(change)
        if self.sides.log_position.offset == len(self.log) - 1:
            for change in self.sides.feed:
                self.publish(change)

    # -- a run -------------------------------------------------------------------------------------------------

    def run(self) -> tuple[set[str], set[str], set[str]]:
        """Returns (changes that some store had after the last loss, changes in the log, changes in PostgreSQL)."""
        steps = [self.records] * 8 + [self.begins, self.commits] * 6 + [self.reads_the_log, self.reads_the_feed] * 5
        steps += [self.writes_a_checkpoint] * 3 + [self.repairs] * 2 + [self.begin_session]
        steps += [self.reaches_the_lane_alone, self.reaches_the_log_alone]
        steps += [self.log_loses_its_end, self.postgres_loses_its_end]
        for _ in range(self.random.randrange(20, 140)):
            self.random.choice(steps)()
        alive = {*_changes(self.log), *self.rows().values(), *self.lane, *self.running.values()}
        for _ in range(12):
            while self.lane or self.running:
                self.begins()
                self.commits()
            for _ in range(25):
                self.reads_the_log()
                self.reads_the_feed()
            self.writes_a_checkpoint()
            self.repairs()
        return alive, _changes(self.log), set(self.rows().values())


def _changes(log: Sequence[tuple[str, int]]) -> set[str]:
    return {change for change, _ in log}


@pytest.mark.parametrize("block", range(4))
def test_log_and_postgres_agree_in_the_end_whatever_they_lose(block: int) -> None:
    for seed in range(block * RUNS, (block + 1) * RUNS):
        alive, log, rows = World(seed).run()
        assert log == rows, f"seed {seed}"
        assert alive <= log, f"seed {seed}"
