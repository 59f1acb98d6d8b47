"""The world around the rail, simulated by the model: silent brokers, mirrors that lose data, owners that stall.

Real: the commit, its recorder, journal and drainer, and every script on a real Redis. Ours: the broker (a list of
messages), PostgreSQL (a guard and a set of changes) and the clock. Every call of the rail to the world waits as a
`Step` until a rule of the model chooses its outcome, so that a crash or a stall can come before and after every step,
and any two steps can be interleaved.
"""

import asyncio
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import redis
from msgspec import structs

from shared.entities import registry
from shared.entities.contract import Change, Head, decode_change, split_batch
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import Order
from shared.errors import Unavailable
from shared.messaging.publisher import InDoubt, NotSent
from shared.mirror import keys
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Apply, Claimed, LogState, Mirror, Stale
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.drain import Drainer
from shared.rail.journal import Journal, JournalBroken
from shared.rail.record import Recorder
from tests.rigs import builders

T = TypeVar("T")
Copy = list[tuple[bytes, int, bytes]]
"""A copy of a mirror: key, time to live in ms, value in Redis's DUMP format."""

EPOCH = "model"
NOWHERE = -1
GAP = 50
DAY = "2026-03-14"
FORMER_SERVER = "0" * 40

# The possible outcomes of each step; the first is success. A `late` step happens when a rule chooses, or never.
OUTCOMES = {
    "claim": ("done", "done", "done", "done", "done, unheard", "done, unheard", "never", "late", "unavailable"),
    "apply": ("done", "done", "done", "done", "done, unheard", "never", "late", "unavailable"),
    "take back": ("done", "done", "done", "done, unheard", "never", "late", "unavailable"),
    "publish": ("done", "done", "done", "not sent", "not sent", "done, unheard", "late", "never"),
    "append": ("done", "done", "done", "broken", "broken"),
    "number": ("done", "done", "done", "broken"),
    "remove": ("done", "done", "broken"),
    "look": ("done", "done", "done", "no answer"),
}


class Clock:
    """Replaces `time` in shared.rail.commit. A missing answer takes 0.6 s, so that two reach the timeout."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@dataclass
class Step:
    """A call of the rail to the world; `do` executes it."""

    kind: str
    owner: "Instance"
    do: Callable[[bool], Awaitable[Any]]
    reply: "asyncio.Future[Any]"


@dataclass
class Attempt:
    tag: str
    draft: Draft
    change_id: str
    task: "asyncio.Task[Any]"
    owner: "Instance"
    crashed: bool = False
    told: bool = False


class InlineJournal(Journal):
    """The journal without its thread, so that one turn of the event loop completes a call."""

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (sqlite3.Error, OSError) as error:
            raise JournalBroken(str(error)) from error


class GatedJournal:
    def __init__(self, world: "World", owner: "Instance", journal: Journal) -> None:
        self._ask = partial(world.ask, owner)
        self._journal = journal
        self.oldest = journal.oldest

    @property
    def depth(self) -> int:
        return self._journal.depth

    async def append(self, entries: Any) -> None:
        await self._ask("append", lambda _: self._journal.append(entries))

    async def remove(self, entries: Any) -> None:
        await self._ask("remove", lambda _: self._journal.remove(entries))

    async def next_number(self, restaurant: str, day: str) -> str:
        return str(await self._ask("number", lambda _: self._journal.next_number(restaurant, day)))


class GatedPublisher:
    def __init__(self, world: "World", owner: "Instance") -> None:
        self._world = world
        self._owner = owner

    async def publish(self, routing_key: str, body: bytes) -> None:
        async def take(_: bool) -> None:
            self._world.log.append(body)

        await self._world.ask(self._owner, "publish", take)


class GatedMirror:
    down = False

    def __init__(self, world: "World", owner: "Instance") -> None:
        self._world = world
        self._ask = partial(world.ask, owner)

    async def claim(self, entity: Any, change: Change, *rest: Any, within: float) -> Any:
        # `within` is not passed on: the model ignores the clocks of its servers.
        async def claim(patient: bool) -> Any:
            reply = await self._world.mirror(patient).claim(entity, change, *rest)
            if isinstance(reply, Claimed):
                self._world.claimed_in[change.id].add(self._world.life)
            self._world.seen[f"claim: {type(reply).__name__}"] += 1
            return reply

        try:
            return await self._ask("claim", claim)
        except MirrorInDoubt:
            self._world.doubted.add(change.id)
            raise

    async def take_back(self, change: Change) -> Any:
        async def take_back(_: bool) -> bool:
            taken = await self._world.patient.take_back(change)
            if taken:  # its version is free again in this life of the mirror
                self._world.claimed_in[change.id].discard(self._world.life)
            return taken

        return await self._ask("take back", take_back)

    async def apply(self, states: Any) -> Any:
        return await self._ask("apply", lambda _: self._world.patient.apply(states))


class Instance:
    """One process with a rail, its journal and its drainer."""

    def __init__(self, world: "World", number: int, folder: Path) -> None:
        self.number = number
        self.dead = False
        self.draining: asyncio.Task[Any] | None = None
        self.journal = InlineJournal(folder / f"{number}.sqlite", instance=number, max_bytes=1 << 20)
        world.run(self.journal.open())
        journal: Any = GatedJournal(world, self, self.journal)
        publisher: Any = GatedPublisher(world, self)
        mirror: Any = GatedMirror(world, self)
        recorder = Recorder(publisher, journal, under_way=1)
        self.rail = Rail(mirror, recorder, journal, claim_timeout_seconds=1.0, reveal_timeout_seconds=1.0)
        self.drainer = Drainer(journal, publisher)


@dataclass
class PostgresModel:
    """Promise 5 in ten lines, written independently of the code that it checks."""

    changes: dict[str, Change] = field(default_factory=dict)
    heads: dict[str, Change] = field(default_factory=dict)

    def take(self, body: bytes) -> None:
        for event in split_batch(body):
            change = decode_change(event)
            self.changes.setdefault(change.id, change)
            known = self.heads.get(change.entity_id)
            if known is None or (change.entityversion, change.id) > (known.entityversion, known.id):
                self.heads[change.entity_id] = change


@dataclass
class Harness:
    """Shared by all examples of a run: the loop, the connections, the clock, and the outcomes that were reached."""

    loop: asyncio.AbstractEventLoop
    redis: redis.Redis
    patient: Mirror
    impatient: Mirror
    folder: Path
    clock: Clock
    seen: Counter[str] = field(default_factory=Counter)
    examples: int = 0


class World:
    def __init__(self, harness: Harness) -> None:
        self.loop, self.redis, self.clock, self.seen = harness.loop, harness.redis, harness.clock, harness.seen
        self.patient, self.impatient = harness.patient, harness.impatient
        harness.examples += 1
        self._folder = harness.folder / str(harness.examples)
        self._folder.mkdir()
        self.clock.now = 0.0
        self.steps: list[Step] = []
        self.log: list[bytes] = []
        self.late_messages: list[bytes] = []
        self.late_scripts: list[Callable[[], Awaitable[Any]]] = []
        self.postgres = PostgresModel()
        self.attempts: list[Attempt] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.life = 1
        self.warm = False
        self.claimed_in: dict[str, set[int]] = defaultdict(set)
        self.doubted: set[str] = set()
        self.in_log_when_warm: dict[int, set[str]] = {}
        self.shown: dict[str, Head] = {}
        self.snapshot: Copy | None = None
        self.redis.flushall()
        self.instances = [Instance(self, number, self._folder) for number in (1, 2)]
        self.run(self.follow(0))
        self.run(self.stamp(gap=0))

    def run(self, work: Awaitable[T]) -> T:
        """Runs `work`, and then every task of the rail until its next call to the world."""

        async def settled() -> T:
            result = await work
            for _ in range(15):
                await asyncio.sleep(0)
            return result

        return self.loop.run_until_complete(settled())

    def mirror(self, patient: bool) -> Mirror:
        """The patient mirror, or the impatient one, for which a claim is stale as soon as it exists."""
        return self.patient if patient else self.impatient

    # -- steps -------------------------------------------------------------------------------------------------

    async def ask(self, owner: Instance, kind: str, do: Callable[[bool], Awaitable[Any]]) -> Any:
        if owner.dead:
            raise asyncio.CancelledError
        step = Step(kind, owner, do, self.loop.create_future())
        self.steps.append(step)
        return await step.reply

    async def happen(self, step: Step, outcome: str, patient: bool) -> None:
        self.steps.remove(step)
        self.seen[f"{step.kind}: {outcome}"] += 1
        if outcome in ("done", "done, unheard"):
            result = await step.do(patient)
            if outcome == "done":
                step.reply.set_result(result)
                return
        elif outcome == "late" and step.kind == "publish":
            await step.do(patient)
            self.late_messages.append(self.log.pop())
        elif outcome == "late":
            self.late_scripts.append(partial(step.do, patient))
        self.clock.now += 0.6
        if outcome == "broken":
            error: Exception = JournalBroken("the model broke it")
        elif outcome == "no answer":
            error = Unavailable("neither store answers")
        elif step.kind == "publish":
            error = NotSent("no connection") if outcome == "not sent" else InDoubt("no confirm")
        else:
            error = MirrorUnavailable("unavailable") if outcome == "unavailable" else MirrorInDoubt("no answer")
        step.reply.set_exception(error)

    def go_on(self, owner: Instance, task: "asyncio.Task[Any]") -> None:
        """Lets all steps of one instance succeed until its task is done."""
        while not task.done() and (mine := [step for step in self.steps if step.owner is owner]):
            self.run(self.happen(mine[0], "done", True))

    def start(self, owner: Instance, work: Any) -> "asyncio.Task[Any]":
        task = self.loop.create_task(work)
        self.tasks.append(task)
        self.run(asyncio.sleep(0))
        return task

    def crash(self, owner: Instance) -> None:
        """kill -9: open steps never happen; data on disk stays."""
        owner.dead = True
        self.steps = [step for step in self.steps if step.owner is not owner]
        for attempt in self.attempts:
            if attempt.owner is owner and not attempt.task.done():
                attempt.crashed = True
        self.run(owner.journal.close())
        self.instances[owner.number - 1] = Instance(self, owner.number, self._folder)
        self.seen["crash"] += 1

    # -- the mirror and its writer -----------------------------------------------------------------------------

    def lose_mirror(self) -> None:
        self.life += 1
        self.warm = False
        self.shown.clear()
        self.late_scripts.clear()  # they were under way to the lost server

    def wipe(self) -> None:
        self.redis.flushall()
        self.lose_mirror()

    def take_snapshot(self) -> None:
        self.snapshot = self.copy()

    def copy(self) -> Copy:
        every = self.redis.keys("*")
        pipeline = self.redis.pipeline()
        for key in every:
            pipeline.pttl(key).dump(key)  # type: ignore[attr-defined]
        found = pipeline.execute()
        return [(key, max(found[2 * n], 0), found[2 * n + 1]) for n, key in enumerate(every)]  # type: ignore[misc]

    def roll_back(self, copy: Copy) -> None:
        """A failover to a replica that lagged: older data, with stamps of the former server."""
        self.redis.flushall()
        for key, ttl, value in copy:
            self.redis.restore(key, ttl, value)
        if self.redis.exists(keys.WARM):
            self.redis.set(keys.WARM, FORMER_SERVER)
        for member in self.redis.zrange(keys.CLAIMS, 0, -1):
            claim = keys.claim(*member.decode().split("|"))  # type: ignore[union-attr]
            if self.redis.hexists(claim, "server"):
                self.redis.hset(claim, "server", FORMER_SERVER)
        self.lose_mirror()

    async def follow(self, count: int) -> None:
        """The mirror writer: reads on from the mirror's offset; fills an empty mirror from PostgreSQL and the log."""
        state = await self.patient.log_state()
        if state is None:
            state = LogState(EPOCH, NOWHERE)
            await self.patient.begin_log(state)
            stored = [replace_how(one, "stored") for change in self.postgres.heads.values() for one in [apply(change)]]
            await self.patient.apply(stored, at=state)
        for offset in range(state.offset + 1, min(state.offset + 1 + count, len(self.log))):
            noted = LogState(EPOCH, offset)
            assert await self.patient.apply(applies(self.log[offset]), at=state, note=noted) is not None
            state = noted

    async def stamp(self, gap: int = GAP) -> None:
        """Reads the log to its end and makes the mirror warm."""
        await self.follow(len(self.log))
        state = await self.patient.log_state()
        assert state is not None
        assert await self.patient.warm(state, [(builders.RESTAURANT, DAY)], gap)
        self.warm = True
        self.in_log_when_warm[self.life] = set(self.recorded())

    async def left_behind(self, nth: int) -> Stale | None:
        members = sorted(await self.impatient.stale_claims())
        return await self.impatient.mark(members[nth % len(members)]) if members else None

    # -- current state -----------------------------------------------------------------------------------------

    def recorded(self) -> dict[str, Change]:
        return {change.id: change for body in self.log for change in changes(body)}

    async def journaled(self) -> set[str]:
        entries = [entry for one in self.instances for entry in await one.journal.oldest(1_000)]
        return {decode_change(entry.event).id for entry in entries}

    async def documents(self, ids: list[str]) -> dict[str, tuple[Head, Order]]:
        _, found = await self.patient.read(builders.RESTAURANT, ORDER.name, ids)
        pairs = zip(ids, found, strict=True)
        return {id_: (one.head, ORDER.decode_state(one.state)) for id_, one in pairs if one is not None}

    async def present(self, id_: str) -> tuple[Head, Order] | None:
        """The state that a reader gets: from the mirror, or else from PostgreSQL."""
        found = (await self.documents([id_])).get(id_)
        if found is None and (change := self.postgres.heads.get(id_)):
            return change.head, registry.read(change)[1]
        return found

    def close(self) -> None:
        for one in self.instances:
            one.dead = True
        left = [task for task in asyncio.all_tasks(self.loop) if task.get_name() != "mirror"]
        for task in left:
            task.cancel()
        self.run(asyncio.wait(left) if left else asyncio.sleep(0))
        for one in self.instances:
            self.run(one.journal.close())


def changes(body: bytes) -> list[Change]:
    return [decode_change(event) for event in split_batch(body)]


def apply(change: Change) -> Apply:
    entity, state = registry.read(change)
    return Apply(entity, state, change.head, bytes(change.data.after), change.time)


def replace_how(one: Apply, how: str) -> Apply:
    return structs.replace(one, how=how)


def applies(body: bytes) -> list[Apply]:
    return [apply(change) for change in changes(body)]
