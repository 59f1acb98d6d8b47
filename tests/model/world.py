"""The world around two rails: one broker and one mirror, which lose data, and PostgreSQL.

Real: the commit, its recorder, journal and drainer, the mirror writer, and every script on a real Redis. Ours: the
broker (a list of messages), PostgreSQL (a guard and a set of changes) and the clock. Every call of a rail waits at the
gate until a rule of the model chooses its outcome."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from msgspec import structs

from services.sync.mirror.mirror_writer import MirrorWriter
from shared.entities.contract import Change, Head, decode_change
from shared.entities.entity import Entity
from shared.errors import Unavailable
from shared.mirror.mirror import Claimed, ClaimReply, LogState, Mirror, Stale
from shared.rail.commit import ClaimLost, Committed
from shared.rail.draft import Draft, change_of
from shared.rail.journal import Journal
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.rail.broker import MemoryBroker
from tests.rigs.rail.changes import State
from tests.rigs.rail.clock import Clock
from tests.rigs.rail.gate import Gate, Step
from tests.rigs.rail.instance import RailRig
from tests.rigs.rail.mirror_server import Copy, MirrorServer
from tests.rigs.rail.sinks import PostgresModel, log_entries, mirror_writer

T = TypeVar("T")
GAP = 50
_SERIES = [(builders.RESTAURANT, "2026-03-14")]
_TURNS = 15
"""Turns of the event loop until every task of a rail has reached its next call."""


class TrackedMirror(Mirror):
    """Notes in which life of the mirror each change was claimed. While it is not `patient`, a claim is stale as soon as
    it exists."""

    def __init__(self, url: str, seen: Counter[str]) -> None:
        super().__init__(url, timeout=5.0, stale_seconds=3600.0)
        self._seen = seen
        self.impatient = Mirror(url, timeout=5.0, stale_seconds=0.0)
        self.start_over()

    def start_over(self) -> None:
        self.patient = True
        self.life = 1
        self.claimed_in: dict[str, set[int]] = defaultdict(set)

    async def claim(self, entity: Entity, change: Change, *rest: Any, within: float | None = None) -> ClaimReply:
        # `within` is not passed on: the model ignores the clocks of its servers.
        claim = super().claim if self.patient else self.impatient.claim
        reply = await claim(entity, change, *rest)
        if isinstance(reply, Claimed):
            self.claimed_in[change.id].add(self.life)
        self._seen[f"claim: {type(reply).__name__}"] += 1
        return reply

    async def take_back(self, change: Change) -> bool:
        taken = await super().take_back(change)
        if taken:  # its version is free again in this life of the mirror
            self.claimed_in[change.id].discard(self.life)
        return taken

    async def close(self) -> None:
        await self.impatient.close()
        await super().close()


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
    tag: str
    draft: Draft
    change_id: str
    task: "asyncio.Task[Any]"
    owner: RailRig
    crashed: bool = False
    heard: bool = False

    @property
    def refused(self) -> bool:
        """Whether its change must not appear."""
        return isinstance(self.error, (ClaimLost, Unavailable))

    @property
    def error(self) -> BaseException | None:
        return self.task.exception() if self.ended else None

    @property
    def committed(self) -> Committed | None:
        return self.task.result() if self.ended and self.error is None else None

    @property
    def ended(self) -> bool:
        return self.task.done() and not self.crashed


@dataclass
class Harness:
    """Shared by all examples of a run: the loop, the connections, and the outcomes that were reached."""

    loop: asyncio.AbstractEventLoop
    url: str
    folder: Path
    seen: Counter[str] = field(default_factory=Counter)
    examples: int = 0

    def __post_init__(self) -> None:
        self.settings = Settings(_env_file=None, publish_concurrency=1)
        self.server, self.mirror = MirrorServer(self.url), TrackedMirror(self.url, self.seen)
        self.writer: MirrorWriter = mirror_writer(self.settings, self.mirror, clock=lambda: builders.CREATED_AT)

    async def close(self) -> None:
        await self.server.close()
        await self.mirror.close()


class World:
    def __init__(self, harness: Harness) -> None:
        harness.examples += 1
        self._harness = harness
        self._folder = harness.folder / str(harness.examples)
        self._folder.mkdir()
        self.loop, self.server, self.mirror = harness.loop, harness.server, harness.mirror
        self.clock = Clock(builders.CREATED_AT)
        self.gate, self.seen = Gate(self.clock, harness.seen), harness.seen
        self.broker, self.postgres = MemoryBroker(), PostgresModel()
        self.attempts: list[Attempt] = []
        self.warm = False
        self.doubted: set[str] = set()
        """Changes with a claim in doubt."""
        self.in_log_when_warm: dict[int, set[str]] = {}
        """Life of the mirror -> the changes in the log when it became warm."""
        self.shown: dict[str, Head] = {}
        """The largest head of each entity that a commit called visible."""
        self.snapshot: Copy | None = None
        self.mirror.start_over()
        self.run(self.server.wipe())
        self.instances = [self._instance(0), self._instance(1)]
        self.run(self.stamp(gap=0))

    def _instance(self, at: int) -> RailRig:
        path = self._folder / f"{at + 1}.sqlite"
        journal = Journal(path, instance=at + 1, max_bytes=1 << 20, executor=InlineExecutor())
        self.run(journal.open())
        return RailRig(
            self._harness.settings,
            self.server,
            journal=journal,
            mirror=self.mirror,
            broker=self.broker,
            gate=self.gate,
            clock=self.clock.monotonic,
            sleep=self.clock.sleep,
        )

    def run(self, work: Awaitable[T]) -> T:
        """Runs `work`, and then every task of the rails until its next call."""

        async def settled() -> T:
            result = await work
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            return result

        return self.loop.run_until_complete(settled())

    # -- steps -------------------------------------------------------------------------------------------------

    def happen(self, step: Step, outcome: str = "done", *, patient: bool = True) -> None:
        if step.kind == "claim" and outcome in ("done, unheard", "never", "late"):
            self.doubted.add(step.arguments[1].id)
        self.mirror.patient = patient
        self.run(self.gate.happen(step, outcome))
        self.mirror.patient = True

    def start(self, work: Any) -> "asyncio.Task[Any]":
        task = self.loop.create_task(work)
        self.run(asyncio.sleep(0))
        return task

    def commit(self, owner: RailRig, draft: Draft) -> Attempt:
        look = partial(self.gate.ask, owner, "look", self.present, draft.state.id)
        task = self.start(owner.rail.commit(structs.replace(draft, existing=look)))
        attempt = Attempt(draft.state.notes, draft, change_of(draft).id, task, owner)
        self.attempts.append(attempt)
        return attempt

    def go_on(self, owner: RailRig, task: "asyncio.Task[Any]") -> None:
        """Lets all steps of one instance succeed until its task is done."""
        while not task.done() and (mine := self.gate.of(owner)):
            self.happen(mine[0])

    def crash(self, owner: RailRig) -> None:
        """kill -9; data on disk stays."""
        self.gate.crash(owner)
        for attempt in self.attempts:
            if attempt.owner is owner and not attempt.task.done():
                attempt.crashed = True
        at = self.instances.index(owner)
        self.run(self.journal(owner).close())
        self.instances[at] = self._instance(at)
        self.seen["crash"] += 1

    def journal(self, owner: RailRig) -> Journal:
        assert owner.journal is not None
        return owner.journal

    # -- the mirror and its writer -----------------------------------------------------------------------------

    def _lose_mirror(self) -> None:
        self.mirror.life += 1
        self.warm = False
        self.shown.clear()
        # The scripts were under way to the lost server.
        self.gate.late = [step for step in self.gate.late if step.kind == "publish"]

    def wipe(self) -> None:
        self.run(self.server.wipe())
        self._lose_mirror()

    def take_snapshot(self) -> None:
        self.snapshot = self.run(self.server.copy())

    def roll_back(self, copy: Copy) -> None:
        self.run(self.server.roll_back(copy))
        self._lose_mirror()

    async def follow(self, count: int) -> None:
        """The mirror writer: reads on from the mirror's offset; fills an empty mirror from PostgreSQL and the log."""
        state = await self.mirror.log_state() or await self.postgres.fill(self.mirror)
        for entry in log_entries(self.broker.log)[state.offset + 1 :][:count]:
            noted = LogState(state.epoch, entry.offset)
            await self._harness.writer.apply_entries([entry], state, noted)
            state = noted

    async def stamp(self, gap: int = GAP) -> None:
        """Reads the log to its end and makes the mirror warm."""
        await self.follow(len(self.broker.log))
        state = await self.mirror.log_state()
        assert state is not None
        await self.server.warm(state, _SERIES, gap)
        self.warm = True
        self.in_log_when_warm[self.mirror.life] = set(self.broker.recorded())

    async def stale_claims(self) -> list[str]:
        return sorted(await self.mirror.impatient.stale_claims())

    async def left_behind(self, nth: int) -> Stale | None:
        members = await self.stale_claims()
        return await self.mirror.impatient.mark(members[nth % len(members)]) if members else None

    # -- current state -----------------------------------------------------------------------------------------

    async def journaled(self) -> set[str]:
        entries = [entry for one in self.instances for entry in await self.journal(one).oldest(1_000)]
        return {decode_change(entry.event).id for entry in entries}

    async def present(self, id_: str) -> State | None:
        """The state that a reader gets: from the mirror, or else from PostgreSQL."""
        return await self.instances[0].read(id_) or self.postgres.find(id_)

    def close(self) -> None:
        for one in self.instances:
            self.gate.crash(one)
        left = [task for task in asyncio.all_tasks(self.loop) if task.get_name() != "mirror"]
        for task in left:
            task.cancel()
        self.run(asyncio.wait(left) if left else asyncio.sleep(0))
        for one in self.instances:
            self.run(self.journal(one).close())
