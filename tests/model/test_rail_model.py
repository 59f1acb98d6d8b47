"""The commit, model-checked: promises 1 to 5 of the design as laws over every order of steps that hypothesis can find.

law 1  a commit that returned is in the broker's log or in a journal
law 2  after it, a reader of that mirror sees it, unless it said `visible: false` or that mirror was lost
law 3  no reader ever sees a commit that raised ClaimLost or Unavailable, also not after all claims are finished
law 4  in one life of a mirror a version is recorded by one change; a fork needs a lost mirror (or a creation made
       without one) whose change was not in the log when the next mirror became warm. No number is given twice
law 5  whatever the order and repetition, PostgreSQL and the mirror end with the same states, made of exactly the
       recorded changes; one change id has one content
"""

import asyncio
import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import redis
import structlog
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec import structs

from shared.entities.contract import Change, Head, encode
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import Order
from shared.errors import OutcomeUnknown, TicketrailError, Unavailable
from shared.messaging.publisher import InDoubt, NotSent
from shared.mirror.mirror import Mirror
from shared.rail import commit
from shared.rail.commit import ClaimLost, Committed
from shared.rail.draft import Draft, change_of
from shared.rail.drain import Drainer
from shared.rail.journal import JournalBroken
from tests.model.world import GAP, OUTCOMES, Attempt, Clock, Harness, Instance, World, applies
from tests.rigs import builders
from tests.rigs.servers import Servers

ENTITIES = [f"{n}0000000-0000-4000-8000-000000000000" for n in (1, 2, 3, 4)]
BLANK = builders.order(items=0, order_number="")

instances = st.integers(0, 1)
entities = st.sampled_from(ENTITIES)
kinds = st.sampled_from(["create", "update", "update", "update of what was"])
nths = st.integers(0, 5)
outcomes = st.lists(st.integers(0, 8), max_size=6)


class RailMachine(RuleBasedStateMachine):
    def __init__(self, harness: Harness) -> None:
        super().__init__()
        self.harness = harness
        self.world = World(harness)
        self.bases: dict[str, list[tuple[Head, Order]]] = {id_: [] for id_ in ENTITIES}

    @initialize(seed=st.integers(0, 2**16))
    def choose_the_end(self, seed: int) -> None:
        self.random = random.Random(seed)

    # -- commits -----------------------------------------------------------------------------------------------

    def begin(self, at: int, kind: str, id_: str) -> Attempt | None:
        draft = self.draft(kind, id_)
        return None if draft is None else self.commit(self.world.instances[at], draft)

    def draft(self, kind: str, id_: str) -> Draft | None:
        tag = f"change {len(self.world.attempts)}"
        moment = builders.CREATED_AT + timedelta(seconds=len(self.world.attempts))
        if kind == "create":
            state = structs.replace(BLANK, id=id_, notes=tag, updated_at=moment)
            return self.drafted("created", state, None, None, moment)
        present = self.world.run(self.world.present(id_))
        if present is not None and present not in self.bases[id_]:
            self.bases[id_].append(present)
        if not self.bases[id_]:
            return None
        base, before = (present or self.bases[id_][-1]) if kind == "update" else self.bases[id_][0]
        state = structs.replace(before, notes=tag, updated_at=moment)
        return self.drafted("updated", state, base, before, moment)

    def drafted(self, event: str, state: Order, base: Head | None, before: Order | None, at: Any) -> Draft:
        return Draft(
            entity=ORDER,
            event=event,
            state=state,
            base=base,
            before=before,
            at=at,
            source="orders",
        )

    def commit(self, owner: Instance, draft: Draft) -> Attempt:
        look = partial(self.world.ask, owner, "look", lambda _: self.world.present(draft.state.id))
        change_id = change_of(draft).id
        task = self.world.start(owner, owner.rail.commit(structs.replace(draft, existing=look)))
        attempt = Attempt(draft.state.notes, draft, change_id, task, owner)
        self.world.attempts.append(attempt)
        return attempt

    @rule(at=instances, kind=kinds, id_=entities, outcomes=outcomes, patient=st.booleans())
    def begins(self, at: int, kind: str, id_: str, outcomes: list[int], patient: bool) -> None:
        if attempt := self.begin(at, kind, id_):
            self.step(attempt.owner, outcomes, patient)

    @rule(at=instances, kind=kinds, id_=entities)
    def commits_undisturbed(self, at: int, kind: str, id_: str) -> None:
        if attempt := self.begin(at, kind, id_):
            self.world.go_on(attempt.owner, attempt.task)

    @rule(at=instances, kind=kinds, id_=entities, journal=st.sampled_from(["done", "broken"]), outcomes=outcomes)
    def commits_without_a_broker(self, at: int, kind: str, id_: str, journal: str, outcomes: list[int]) -> None:
        """To the journal; without that to where the claim is taken back, and on from there. A replica of the mirror
        may stay behind at that point."""
        if attempt := self.begin(at, kind, id_):
            happens = {"claim": "done", "look": "done", "publish": "not sent", "append": journal, "apply": "done"}
            while mine := [step for step in self.world.steps if step.owner is attempt.owner]:
                if mine[-1].kind not in happens:
                    self.world.take_snapshot()
                    break
                self.world.run(self.world.happen(mine[-1], happens[mine[-1].kind], True))
            self.step(attempt.owner, outcomes, True)

    def refused(self) -> list[Attempt]:
        """Refused attempts that may be repeated; only their own living process has the draft."""
        last = {one.tag: one for one in self.world.attempts}
        return [one for one in last.values() if one.told and absent(one) and not one.owner.dead]

    @precondition(lambda self: self.refused())
    @rule(nth=nths)
    def repeats_what_was_refused(self, nth: int) -> None:
        refused = self.refused()
        again = refused[nth % len(refused)]
        self.commit(again.owner, again.draft)

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self, owner: Instance, outcomes: list[int], patient: bool) -> None:
        """Lets the newest step of an owner happen, then its next step, and so on, one for each outcome."""
        for outcome in outcomes:
            if mine := [step for step in self.world.steps if step.owner is owner]:
                possible = OUTCOMES[mine[-1].kind]
                self.world.run(self.world.happen(mine[-1], possible[outcome % len(possible)], patient))

    @precondition(lambda self: self.world.steps)
    @rule(nth=nths, outcomes=outcomes, patient=st.booleans())
    def goes_on(self, nth: int, outcomes: list[int], patient: bool) -> None:
        step = self.world.steps.pop(nth % len(self.world.steps))
        self.world.steps.append(step)
        self.step(step.owner, outcomes, patient)

    @precondition(lambda self: self.world.steps)
    @rule(nth=nths, done=st.booleans(), patient=st.booleans())
    def crashes(self, nth: int, done: bool, patient: bool) -> None:
        """Crashes the owner of a step right before the step happens, or right after it."""
        step = self.world.steps[nth % len(self.world.steps)]
        if done:
            with contextlib.suppress(JournalBroken):
                self.world.run(step.do(patient))
        self.world.crash(step.owner)

    @precondition(lambda self: any(one.journal.depth for one in self.world.instances))
    @rule(at=instances, outcomes=outcomes)
    def drains(self, at: int, outcomes: list[int]) -> None:
        owner = self.world.instances[at]
        if owner.journal.depth and (owner.draining is None or owner.draining.done()):
            owner.draining = self.world.start(owner, drained(owner.drainer))
            self.step(owner, outcomes, True)

    @rule(at=instances, nth=nths, outcomes=outcomes)
    def reconciles(self, at: int, nth: int, outcomes: list[int]) -> None:
        left = self.world.run(self.world.left_behind(nth))
        if left is not None:
            owner = self.world.instances[at]
            self.world.start(owner, finished(owner, left))
            self.step(owner, outcomes, True)

    # -- stores ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.late_messages or self.world.late_scripts)
    @rule(script=st.booleans())
    def what_was_late_arrives(self, script: bool) -> None:
        if script and self.world.late_scripts:
            self.world.run(self.world.late_scripts.pop(0)())
        elif self.world.late_messages:
            self.world.log.append(self.world.late_messages.pop(0))

    @precondition(lambda self: self.world.log)
    @rule(sink=st.sampled_from(["mirror writer", "mirror, again", "postgres"]), nth=nths)
    def a_sink_takes_messages(self, sink: str, nth: int) -> None:
        message = self.world.log[nth % len(self.world.log)]
        if sink == "mirror writer":
            self.world.run(self.world.follow(nth + 1))
        elif sink == "postgres":
            self.world.postgres.take(message)
        else:
            self.world.run(self.world.patient.apply(applies(message)))

    @rule(how=st.sampled_from(["copied", "wiped", "wiped", "as it is", "stale", "stale"]))
    def mirror_is_lost(self, how: str) -> None:
        if how == "wiped":
            self.world.wipe()
        elif how == "as it is":
            self.world.roll_back(self.world.copy())
        elif how == "stale" and self.world.snapshot is not None:
            self.world.roll_back(self.world.snapshot)
        else:
            self.world.take_snapshot()

    @precondition(lambda self: not self.world.warm)
    @rule(leave=st.sampled_from([False, False, True]))
    def mirror_becomes_warm(self, leave: bool) -> None:
        """After the settle period. Steps under way have ended, except those of owners that stall."""
        if not leave:
            self.everything_ends()
        self.world.run(self.world.stamp())

    def everything_ends(self) -> None:
        while self.world.steps:
            self.world.run(self.world.happen(self.world.steps[0], "done", True))
        self.hear()

    # -- laws --------------------------------------------------------------------------------------------------

    @invariant()
    def laws_hold(self) -> None:
        self.hear()
        if not self.world.attempts:
            return
        sent = self.world.recorded().keys() | self.world.run(self.world.journaled())
        documents = self.world.run(self.world.documents(ENTITIES))
        for attempt in self.world.attempts:
            if returned := result(attempt):
                assert returned.head.change_id in sent, (
                    f"law 1: {attempt.tag} was acknowledged and is neither in the log nor in a journal"
                )
        for id_, head in self.world.shown.items():
            assert id_ in documents, f"law 2: {id_} was acknowledged as visible and is not there"
            assert documents[id_][0] >= head, f"law 2: {id_} was shown at {head}, is at {documents[id_][0]}"
        absent = self.absent()
        for _, order in documents.values():
            assert order.notes not in absent, f"law 3: {order.notes} was refused and a reader sees it"

    def hear(self) -> None:
        """Checks and counts the results of commits that have ended since the last call."""
        for attempt in self.world.attempts:
            if attempt.told or attempt.crashed or not attempt.task.done():
                continue
            attempt.told = True
            error = attempt.task.exception()
            self.world.seen[f"commit: {type(error).__name__ if error else outcome_of(attempt.task.result())}"] += 1
            if error is not None:
                assert isinstance(error, (ClaimLost, Unavailable, OutcomeUnknown)), f"{attempt.tag} raised {error!r}"
            elif (returned := attempt.task.result()).visible:
                known = self.world.shown.get(returned.state.id)
                self.world.shown[returned.state.id] = max(known, returned.head) if known else returned.head

    def absent(self) -> set[str]:
        """Tags of changes that no reader may ever see, because every attempt at them was refused."""
        refused = {one.tag for one in self.world.attempts if absent(one) and not self.may_exist(one)}
        return refused - {one.tag for one in self.world.attempts if not absent(one)}

    def may_exist(self, attempt: Attempt) -> bool:
        """A creation whose id already has a head is answered with that head, like a repeat: the order exists. After a
        claim in doubt, the head may be its own change, which another process has finished."""
        error = attempt.task.exception()
        exists = isinstance(error, ClaimLost) and error.head is not None
        return exists and attempt.draft.base is None and attempt.change_id in self.world.doubted

    def check_forks(self, recorded: dict[str, Change]) -> None:
        by_version: dict[tuple[str, int], list[Change]] = {}
        for change in recorded.values():
            by_version.setdefault((change.entity_id, change.entityversion), []).append(change)
            if not self.world.claimed_in[change.id]:
                number = ORDER.decode_state(bytes(change.data.after)).order_number
                unclaimed = change.basechangeid is None and number.startswith("J")
                assert unclaimed, f"law 4: {change.id} was recorded and never claimed"
        for (id_, version), forked in by_version.items():
            self.world.seen["fork"] += len(forked) > 1
            for one in forked:
                for other in forked:
                    if one.id == other.id:
                        continue
                    lives, others = self.world.claimed_in[one.id], self.world.claimed_in[other.id]
                    assert not lives & others, f"law 4: {id_} version {version} twice in life {lives & others}"
                    for life in others:
                        known = self.world.in_log_when_warm.get(life, set())
                        assert one.id not in known, f"law 4: {id_} version {version} given again in life {life}"

    def check_numbers(self, recorded: dict[str, Change]) -> None:
        given: dict[str, Change] = {}
        for change in recorded.values():
            number = ORDER.decode_state(bytes(change.data.after)).order_number
            assert number, f"law 4: {change.subject} has no number"
            if change.basechangeid is None:
                other = given.setdefault(number, change)
                twice = other.entity_id != change.entity_id and not self.lost_with_a_gap(number, change, other)
                assert not twice, f"law 4: number {number} twice"

    def lost_with_a_gap(self, number: str, one: Change, other: Change) -> bool:
        """The number gap covers one lost mirror. A number above a gap may be given again if only a journal holds it
        while the next mirror is lost too: no remaining store knows it."""
        lives, others = self.world.claimed_in[one.id], self.world.claimed_in[other.id]
        if number.startswith("J") or int(number) <= GAP or lives & others:
            return False
        first, later = (one, others) if min(lives) < min(others) else (other, lives)
        return all(first.id not in self.world.in_log_when_warm[life] for life in later if life > 1)

    # -- the end -----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if hasattr(self, "random"):
                self.end()
        finally:
            self.world.close()

    def end(self) -> None:
        world = self.world
        if self.random.random() < 0.5:
            world.crash(self.random.choice(world.instances))
        self.everything_ends()
        for script in world.late_scripts:
            if self.random.random() < 0.5:
                world.run(script())
        if not world.warm:
            world.run(world.stamp())
        rounds = 0
        while world.run(world.impatient.stale_claims()):
            rounds += 1
            assert rounds < 100, "a stale claim cannot be finished"
            if (left := world.run(world.left_behind(0))) is not None:  # None: the claim needed no finishing and is gone
                world.go_on(world.instances[0], world.start(world.instances[0], finished(world.instances[0], left)))
        assert not world.redis.keys("*claim*"), "law 5: an unfinished claim is left"
        for owner in world.instances:
            while owner.journal.depth > 0:
                world.go_on(owner, world.start(owner, drained(owner.drainer)))
        world.log += [message for message in world.late_messages if self.random.random() < 0.5]
        self.laws_hold()
        self.deliver_everything_somehow()

        recorded = world.recorded()
        for change in recorded.values():
            notes = ORDER.decode_state(bytes(change.data.after)).notes
            assert notes not in self.absent(), f"law 3: {notes} was refused and is recorded"
        self.check_forks(recorded)
        self.check_numbers(recorded)
        self.check_stores(recorded)

    def deliver_everything_somehow(self) -> None:
        messages = self.world.log + self.random.sample(self.world.log, len(self.world.log) // 2)
        self.random.shuffle(messages)
        for message in messages:
            self.world.postgres.take(message)
        self.random.shuffle(messages)
        for message in messages:
            self.world.run(self.world.patient.apply(applies(message)))

    def check_stores(self, recorded: dict[str, Change]) -> None:
        contents: dict[str, bytes] = {}
        for body in self.world.log:
            for one in applies(body):
                known = contents.setdefault(one.head.change_id, one.encoded)
                assert known == one.encoded, f"law 5: {one.head.change_id} has two contents"
        for attempt in self.world.attempts:
            if returned := result(attempt):
                assert contents[returned.head.change_id] == encode(returned.state), "law 5: the reply had another state"
        assert self.world.postgres.changes.keys() == recorded.keys(), (
            "law 5: PostgreSQL lacks a change or has an extra one"
        )
        documents = self.world.run(self.world.documents(ENTITIES))
        heads = {id_: (change.head, bytes(change.data.after)) for id_, change in self.world.postgres.heads.items()}
        found = {id_: (at, encode(order)) for id_, (at, order) in documents.items()}
        assert found == heads, "law 5: the mirror and PostgreSQL disagree"


def result(attempt: Attempt) -> Committed | None:
    if attempt.crashed or not attempt.task.done() or attempt.task.exception() is not None:
        return None
    returned: Committed = attempt.task.result()
    return returned


def outcome_of(committed: Committed) -> str:
    return f"{committed.durability}, {'visible' if committed.visible else 'not visible'}"


def absent(attempt: Attempt) -> bool:
    """Whether the attempt was refused, so that its change must not appear."""
    return (
        not attempt.crashed and attempt.task.done() and isinstance(attempt.task.exception(), (ClaimLost, Unavailable))
    )


async def drained(drainer: Drainer) -> None:
    with contextlib.suppress(NotSent, InDoubt, JournalBroken):  # as its loop does: it tries again
        await drainer.drain_some()


async def finished(owner: Instance, left: Any) -> None:
    with contextlib.suppress(TicketrailError):  # as the reconciler does: it tries again at its next round
        await owner.rail.finish(left)


@pytest.fixture
def harness(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    server = servers.extra_redis()
    loop, clock = asyncio.new_event_loop(), Clock()
    monkeypatch.setattr(commit, "time", clock)
    monkeypatch.setattr(commit, "_RETRY_PAUSE_SECONDS", 0)
    logging = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    patient = Mirror(server.url, timeout=5.0, stale_seconds=3600.0)
    impatient = Mirror(server.url, timeout=5.0, stale_seconds=0.0)
    client = redis.Redis.from_url(server.url)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Harness(loop, client, patient, impatient, Path(folder), clock)
    loop.run_until_complete(patient.close())
    loop.run_until_complete(impatient.close())
    loop.close()
    structlog.configure(**logging)
    client.close()
    server.discard()


@pytest.mark.timeout(600)  # shrinking a failing example takes minutes
def test_promises_1_to_5_hold_for_any_order_of_steps_crashes_and_lost_mirrors(harness: Harness) -> None:
    run_state_machine_as_test(
        lambda: RailMachine(harness),  # type: ignore[arg-type]
        settings=settings(
            max_examples=700,
            stateful_step_count=30,
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert_reached(harness.seen)


def assert_reached(seen: Counter[str]) -> None:
    """A model that no longer reaches the dangerous outcomes would check nothing."""
    required = {f"{kind}: {outcome}" for kind, outcomes in OUTCOMES.items() for outcome in outcomes}
    required |= {"commit: broker, visible", "commit: broker, not visible", "commit: journal, visible"}
    required |= {"commit: ClaimLost", "commit: Unavailable", "commit: OutcomeUnknown", "crash", "fork"}
    required |= {f"claim: {reply}" for reply in ("Claimed", "Cold", "Busy", "Stale", "HeadMoved")}
    assert not (missing := required - {name for name, count in seen.items() if count}), f"never happened: {missing}"
