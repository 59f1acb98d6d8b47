"""The world around two rails: one broker and one mirror, which lose data, and PostgreSQL.

Real: the commit, its recorder, journal and drainer, the mirror writer, and every script on a real Redis. Ours: the
broker (a list of messages), PostgreSQL (a guard and a set of changes) and the clock. Every call of a rail waits at the
gate until a rule of the model chooses its outcome."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from msgspec import structs

from shared.entities.contract import Head, encode
from shared.entities.entity import Entity
from shared.errors import Unavailable
from shared.mirror.claim_replies import Claimed, Stale
from shared.mirror.identity import mirror_identity
from shared.mirror.mirror import NOTHING_APPLIED
from shared.rail.draft import Draft
from shared.rail.head import Standing
from shared.rail.idempotency import Creations
from shared.rail.journal import Journal
from shared.rail.outcomes import ClaimLost, Committed
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.rail.broker import MemoryBroker
from tests.rigs.rail.changes import State
from tests.rigs.rail.clock import Clock
from tests.rigs.rail.gate import Gate, Step
from tests.rigs.rail.instance import RailRig
from tests.rigs.rail.mirror_server import Copy, MirrorServer
from tests.rigs.rail.sinks import PostgresModel, mirror_writer, read_log

T = TypeVar("T")
_TURNS = 15
"""Turns of the event loop until every task of a rail has reached its next call."""


class InlineExecutor(Executor):
    """Runs work at once, so that a few turns of the event loop complete a call of the journal."""

    def submit(self, work: Callable[..., T], /, *arguments: Any, **named: Any) -> "Future[T]":
        done: Future[T] = Future()
        try:
            done.set_result(work(*arguments, **named))
        except Exception as error:
            done.set_exception(error)
        return done


@dataclass
class Attempt:
    draft: Draft
    owner: RailRig
    task: "asyncio.Task[Committed | Standing]"
    crashed: bool = False
    heard: bool = False

    @property
    def tag(self) -> str:
        return str(self.draft.state.notes)

    @property
    def ended(self) -> bool:
        return self.task.done() and not self.crashed

    @property
    def error(self) -> BaseException | None:
        return self.task.exception() if self.ended else None

    @property
    def refused(self) -> bool:
        """True if no reader may see the change of this attempt."""
        exists = self.standing is not None and self.standing.state.notes != self.tag
        return exists or isinstance(self.error, (ClaimLost, Unavailable))

    @property
    def committed(self) -> Committed | None:
        return done if isinstance(done := self._result, Committed) else None

    @property
    def standing(self) -> Standing | None:
        """The state that an earlier creation with this id has made."""
        return done if isinstance(done := self._result, Standing) else None

    @property
    def _result(self) -> Committed | Standing | None:
        return self.task.result() if self.ended and self.error is None else None


class _Stores:
    """Both stores, in which a creation without a claim looks for an earlier one."""

    def __init__(self, world: "World") -> None:
        self._world = world

    async def earlier(self, entity: Entity, restaurant: str, id_: str) -> Standing | None:
        found = await self._world.present(id_)
        return None if found is None else Standing(*found, encode(found[1]))


class World:
    """The world of one run. Call `start_over` before each example."""

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        self.loop = asyncio.new_event_loop()
        self.seen: Counter[str] = Counter()
        self.server = MirrorServer(url)
        self.mirror = self.server.mirror
        self._settings = Settings(_env_file=None)
        self._writer = mirror_writer(self._settings, self.mirror)

    def start_over(self) -> None:
        self.clock = Clock(builders.CREATED_AT)
        self.gate = Gate(self.clock, self.seen, self._note)
        self.broker, self.postgres = MemoryBroker(), PostgresModel()
        self.attempts: list[Attempt] = []
        self.doubted: set[str] = set()
        """Changes with a claim in doubt."""
        self.life, self.warm = 1, False
        self.claimed_in: dict[str, set[int]] = defaultdict(set)
        """Change -> the lives of the mirror in which it was claimed."""
        self.in_lanes_when_warm: dict[int, set[str]] = {}
        """Life of the mirror -> the changes in the lanes when it became warm."""
        self.shown: dict[str, Head] = {}
        """Entity -> the largest head that a commit called visible since the mirror was last lost."""
        self.snapshot: Copy | None = None
        self.snapshot_offset = -1
        self._creations: dict[RailRig, Creations] = {}
        self.run(self.server.wipe())
        for old in self._folder.iterdir():
            old.unlink()
        self.instances = [self._instance(0), self._instance(1)]
        self.run(self.stamp())

    def _instance(self, at: int) -> RailRig:
        path = self._folder / f"{at + 1}.sqlite"
        journal = Journal(path, instance=at + 1, max_bytes=1 << 20, executor=InlineExecutor())
        self.run(journal.open())
        rig = RailRig(
            self._settings,
            self.server,
            journal=journal,
            mirror=self.mirror,
            broker=self.broker,
            gate=self.gate,
            clock=self.clock.monotonic,
            sleep=self.clock.sleep,
        )
        patience = Clock(builders.CREATED_AT)  # two refusals reach the timeout of a repeat

        async def pause(_: float) -> None:
            patience.move(seconds=2.1)
            await asyncio.sleep(0)

        stores = self.gate.before(_Stores(self), rig)
        self._creations[rig] = Creations(rig.rail, stores, clock=patience.monotonic, sleep=pause)
        return rig

    def run(self, work: Awaitable[T]) -> T:
        """Runs `work`, and then every task of the rails until its next call."""

        async def settled() -> T:
            result = await work
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            return result

        return self.loop.run_until_complete(settled())

    def start(self, work: Any) -> "asyncio.Task[Any]":
        task = self.loop.create_task(work)
        self.run(asyncio.sleep(0))
        return task

    # -- steps -------------------------------------------------------------------------------------------------

    def happen(self, step: Step, outcome: str = "done", *, patient: bool = True) -> None:
        """Lets a step happen with this outcome. Without `patient`, a claim first makes all other claims stale."""
        if step.kind == "claim":
            if not patient:
                self.run(self.server.age_claims())
            if outcome in ("done, unheard", "never", "late"):
                self.doubted.add(step.arguments[1].id)
        self.run(self.gate.happen(step, outcome))

    def _note(self, step: Step, result: Any) -> None:
        """Notes the effect of a call, even if its caller never gets the reply."""
        if step.kind == "claim":
            self.seen[f"claim: {type(result).__name__}"] += 1
            if isinstance(result, Claimed):
                self.claimed_in[step.arguments[1].id].add(self.life)
        elif step.kind == "take_back" and result:
            # The version of the claim is free again until the mirror is lost.
            self.claimed_in[step.arguments[0].id].discard(self.life)

    def commit(self, owner: RailRig, draft: Draft) -> Attempt:
        own = structs.replace(draft, keyed=draft.base is None)
        task = self.start(owner.rail.commit(own) if draft.base else self._creations[owner].create(own))
        self.attempts.append(Attempt(draft, owner, task))
        return self.attempts[-1]

    def go_on(self, owner: RailRig, task: "asyncio.Task[Any]") -> None:
        """Lets all steps of one instance succeed until its task is done."""
        while not task.done() and (mine := self.gate.of(owner)):
            self.happen(mine[0])

    def crash(self, owner: RailRig) -> None:
        """Acts like kill -9: the data on disk stays, and a new process of the instance starts."""
        self.gate.crash(owner)
        for attempt in self.attempts:
            attempt.crashed |= attempt.owner is owner and not attempt.task.done()
        at = self.instances.index(owner)
        self.run(owner.close_journal())
        self.instances[at] = self._instance(at)
        self.seen["crash"] += 1

    def close(self) -> None:
        for one in self.instances:
            self.gate.crash(one)
        left = [task for task in asyncio.all_tasks(self.loop) if task.get_name() != "mirror"]
        for task in left:
            task.cancel()
        self.run(asyncio.wait(left) if left else asyncio.sleep(0))
        for one in self.instances:
            self.run(one.close_journal())

    # -- the mirror and its writer -----------------------------------------------------------------------------

    def lose_mirror(self, copy: Copy = ()) -> None:
        """Loses the mirror in a failover and a failback. It comes back with an older copy, or empty."""
        self.run(self.server.roll_back(copy))
        self._mirror_is_lost()
        # The scripts were under way to the lost server.
        self.gate.late = [step for step in self.gate.late if step.kind == "publish"]

    def flush_mirror(self) -> None:
        """Somebody empties the server, which runs on."""
        self.run(self.server.wipe())
        self._mirror_is_lost()

    def restore_snapshot(self) -> bool:
        """Somebody restores the snapshot into the server, and the mirror writer checks its position before anything
        else happens (until then, a fork is possible and detected). Returns False if the writer has applied nothing
        since the snapshot, because it cannot notice the restore then."""
        applied = self.run(self.mirror.log_position())
        if self.snapshot is None or applied is None or applied.offset <= self.snapshot_offset:
            return False
        self.run(self.server.restore(self.snapshot))
        self.run(self.mirror.apply([], at=applied))
        self.seen["restored"] += 1
        self._mirror_is_lost()
        return True

    def cut_power(self, messages: int) -> None:
        """The change log loses its last messages, and the mirror comes back with an older copy. The lanes lose
        nothing."""
        self.broker.lose_end(messages)
        self.lose_mirror(self.snapshot or ())
        self.seen["power cut"] += 1

    def _mirror_is_lost(self) -> None:
        self.life += 1
        self.warm = False
        self.shown.clear()

    def take_snapshot(self) -> None:
        self.snapshot = self.run(self.server.copy())
        position = self.run(self.mirror.log_position())
        self.snapshot_offset = position.offset if position is not None else -1

    async def follow(self, count: int) -> None:
        """Reads on from the mirror's position, as the mirror writer does. Fills the mirror from PostgreSQL first if it
        is empty, or if it is cold and the log does not prove its position."""
        at = await self.mirror.log_position()
        if at is not None and at != NOTHING_APPLIED and not self.broker.proves(at):
            self.seen["broken position"] += 1
            assert await self.mirror.go_back(at, NOTHING_APPLIED)
            at = NOTHING_APPLIED if self.warm else None
        await read_log(self._writer, self.broker.log, at or await self.postgres.fill(self.mirror), count)

    async def stamp(self) -> None:
        """Makes the mirror warm, by the steps of the warm-up: the log is read to its end, the lanes have delivered to
        PostgreSQL, and the mirror has what PostgreSQL has."""
        await self.follow(len(self.broker.log))
        self.postgres.take(self.broker.recorded().values())
        await self.postgres.tell(self.mirror)
        at = await self.mirror.log_position()
        assert at is not None
        await self.server.warm(at, mirror_identity(self.life, builders.CREATED_AT))
        self.warm = True
        self.in_lanes_when_warm[self.life] = set(self.broker.recorded())

    async def mark_stale(self, nth: int) -> Stale | None:
        await self.server.age_claims()
        members = sorted(await self.mirror.stale_claims())
        return await self.mirror.mark(members[nth % len(members)]) if members else None

    # -- current state -----------------------------------------------------------------------------------------

    async def journaled(self) -> set[str]:
        return {change.id for one in self.instances for change in await one.journaled()}

    async def present(self, id_: str) -> State | None:
        """The state that a reader gets: from the mirror, or else from PostgreSQL."""
        return await self.instances[0].read(id_) or self.postgres.find(id_)
