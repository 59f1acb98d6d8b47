"""The commit, model-checked: the laws hold for every order of steps that hypothesis can find."""

import asyncio
import contextlib
import random
from collections import Counter
from datetime import timedelta
from typing import Any

import hypothesis.strategies as st
import pytest
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

from shared.entities.order import ENTITY as ORDER
from shared.errors import TicketrailError
from shared.messaging.publisher import InDoubt, NotSent
from shared.mirror.claim_replies import Stale
from shared.rail.draft import Draft
from shared.rail.journal import JournalBroken
from tests.model.laws import ENTITIES, check_always, check_at_the_end, hear
from tests.model.world import Attempt, World
from tests.rigs import builders
from tests.rigs.rail.changes import State, changes_in, draft
from tests.rigs.rail.gate import OUTCOMES
from tests.rigs.rail.instance import RailRig

BLANK = builders.order(items=0, order_number="")

instances = st.integers(0, 1)
entities = st.sampled_from(ENTITIES)
kinds = st.sampled_from(["create", "update", "update", "update of what was"])
nths = st.integers(0, 5)
outcomes = st.lists(st.integers(0, 8), max_size=6)


class RailMachine(RuleBasedStateMachine):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        world.start_over()
        self.bases: dict[str, list[State]] = {id_: [] for id_ in ENTITIES}
        self.draining: dict[RailRig, asyncio.Task[Any]] = {}

    @initialize(seed=st.integers(0, 2**16))
    def choose_the_end(self, seed: int) -> None:
        self.random = random.Random(seed)

    # -- commits -----------------------------------------------------------------------------------------------

    def begin(self, at: int, kind: str, id_: str) -> Attempt | None:
        new = self.draft(kind, id_)
        return None if new is None else self.world.commit(self.world.instances[at], new)

    def draft(self, kind: str, id_: str) -> Draft | None:
        count = len(self.world.attempts)
        fields = {"notes": f"change {count}", "updated_at": builders.CREATED_AT + timedelta(seconds=count)}
        if kind == "create":
            return draft(ORDER, structs.replace(BLANK, id=id_, **fields))
        present = self.world.run(self.world.present(id_))
        if present is not None and present not in self.bases[id_]:
            self.bases[id_].append(present)
        if not self.bases[id_]:
            return None
        base = (present or self.bases[id_][-1]) if kind == "update" else self.bases[id_][0]
        return draft(ORDER, structs.replace(base[1], **fields), base)

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
        """The draft goes to the journal. Without a journal its claim is taken back, and the test continues there. A
        replica of the mirror may stay behind at that point."""
        if attempt := self.begin(at, kind, id_):
            happens = {"claim": "done", "earlier": "done", "publish": "not sent", "append": journal, "apply": "done"}
            while mine := self.world.gate.of(attempt.owner):
                if mine[-1].kind not in happens:
                    self.world.take_snapshot()
                    break
                self.world.happen(mine[-1], happens[mine[-1].kind])
            self.step(attempt.owner, outcomes, True)

    def refused(self) -> list[Attempt]:
        """Refused attempts that may be repeated; only their own living process has the draft."""
        last = {one.tag: one for one in self.world.attempts}
        return [one for one in last.values() if one.heard and one.refused and one.owner in self.world.instances]

    @precondition(lambda self: self.refused())
    @rule(nth=nths)
    def repeats_what_was_refused(self, nth: int) -> None:
        refused = self.refused()
        again = refused[nth % len(refused)]
        self.world.commit(again.owner, again.draft)

    def creations(self) -> list[Attempt]:
        """Creations whose request may be repeated with its key: also those that got an order or no answer."""
        return [one for one in self.world.attempts if one.draft.base is None]

    @precondition(lambda self: self.creations())
    @rule(nth=nths, at=instances, outcomes=outcomes, patient=st.booleans())
    def repeats_a_creation_with_its_key(self, nth: int, at: int, outcomes: list[int], patient: bool) -> None:
        """The client sends its request again, to any instance, while the first one may be under way."""
        creations = self.creations()
        later = builders.CREATED_AT + timedelta(seconds=len(self.world.attempts))
        state = structs.replace(creations[nth % len(creations)].draft.state, updated_at=later)
        attempt = self.world.commit(self.world.instances[at], draft(ORDER, state))
        self.step(attempt.owner, outcomes, patient)

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self, owner: RailRig, outcomes: list[int], patient: bool) -> None:
        """Lets the newest step of an owner happen, then its next step, and so on, one for each outcome."""
        for outcome in outcomes:
            if mine := self.world.gate.of(owner):
                possible = OUTCOMES[mine[-1].kind]
                self.world.happen(mine[-1], possible[outcome % len(possible)], patient=patient)

    @precondition(lambda self: self.world.gate.steps)
    @rule(nth=nths, outcomes=outcomes, patient=st.booleans())
    def goes_on(self, nth: int, outcomes: list[int], patient: bool) -> None:
        steps = self.world.gate.steps
        steps.append(steps.pop(nth % len(steps)))
        self.step(steps[-1].owner, outcomes, patient)

    @precondition(lambda self: self.world.gate.steps)
    @rule(nth=nths, done=st.booleans())
    def crashes(self, nth: int, done: bool) -> None:
        """Crashes the owner of a step right before the step happens, or right after it."""
        step = self.world.gate.steps[nth % len(self.world.gate.steps)]
        if done:
            with contextlib.suppress(JournalBroken):
                self.world.run(step.do())
        self.world.crash(step.owner)

    @precondition(lambda self: any(one.journal_depth for one in self.world.instances))
    @rule(at=instances, outcomes=outcomes)
    def drains(self, at: int, outcomes: list[int]) -> None:
        owner = self.world.instances[at]
        if owner.journal_depth and (owner not in self.draining or self.draining[owner].done()):
            self.draining[owner] = self.world.start(drained(owner))
            self.step(owner, outcomes, True)

    @rule(at=instances, nth=nths, outcomes=outcomes)
    def reconciles(self, at: int, nth: int, outcomes: list[int]) -> None:
        left = self.world.run(self.world.mark_stale(nth))
        if left is not None:
            owner = self.world.instances[at]
            self.world.start(finished(owner, left))
            self.step(owner, outcomes, True)

    # -- stores ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.gate.late)
    @rule(nth=nths)
    def what_was_late_arrives(self, nth: int) -> None:
        late = self.world.gate.late
        self.world.run(late.pop(nth % len(late)).do())

    @precondition(lambda self: self.world.broker.lanes)
    @rule(sink=st.sampled_from(["mirror writer", "mirror, again", "postgres"]), nth=nths)
    def a_sink_takes_messages(self, sink: str, nth: int) -> None:
        changes = changes_in(self.world.broker.lanes[nth % len(self.world.broker.lanes)])
        if sink == "mirror writer":
            self.world.run(self.world.follow(nth + 1))
        elif sink == "postgres":
            self.world.postgres.take(changes)
        else:
            self.world.run(self.world.instances[0].reveal(*changes))

    @rule(
        how=st.sampled_from(["copied", "wiped", "flushed", "as it is", "stale", "stale", "restored", "power cut"]),
        messages=st.integers(1, 4),
    )
    def mirror_is_lost(self, how: str, messages: int) -> None:
        if how == "power cut":
            self.world.cut_power(messages)
        elif how == "wiped":
            self.world.lose_mirror()
        elif how == "flushed":
            self.world.flush_mirror()
        elif how == "as it is":
            self.world.lose_mirror(self.world.run(self.world.server.copy()))
        elif how == "stale" and self.world.snapshot is not None:
            self.world.lose_mirror(self.world.snapshot)
        elif how != "restored" or not self.world.restore_snapshot():
            self.world.take_snapshot()

    @rule(hours=st.sampled_from([-2, 2]))
    def clock_of_the_mirror_jumps(self, hours: int) -> None:
        """After a jump back every claim comes from the future. After a jump ahead every claim is old."""
        self.world.run(self.world.server.jump_clock(hours))
        self.world.seen[f"clock jumps by {hours} h"] += 1

    @precondition(lambda self: not self.world.warm)
    @rule(leave=st.sampled_from([False, False, True]))
    def mirror_becomes_warm(self, leave: bool) -> None:
        """The settle period is over, so steps under way have ended. With `leave`, the owners stall and their steps are
        open."""
        if not leave:
            self.everything_ends()
        self.world.run(self.world.stamp())

    def everything_ends(self) -> None:
        while self.world.gate.steps:
            self.world.happen(self.world.gate.steps[0])
        hear(self.world)

    @invariant()
    def laws_hold(self) -> None:
        check_always(self.world)

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
        late = [step for step in world.gate.late if step.kind != "publish"]
        self.some_arrive(late)
        if not world.warm:
            world.run(world.stamp())
        rounds = 0
        while world.run(world.server.claims()):
            rounds += 1
            assert rounds < 100, "a stale claim cannot be finished"
            # The result is None if the claim needed no finishing and is gone.
            if (left := world.run(world.mark_stale(0))) is not None:
                world.go_on(world.instances[0], world.start(finished(world.instances[0], left)))
        assert not world.run(world.server.call("KEYS", "*claim*")), "law 5: an unfinished claim is left"
        for owner in world.instances:
            while owner.journal_depth:
                world.go_on(owner, world.start(drained(owner)))
        self.some_arrive([step for step in world.gate.late if step.kind == "publish"])
        self.laws_hold()
        self.deliver_everything_somehow()
        check_at_the_end(world)

    def some_arrive(self, late: list[Any]) -> None:
        for step in late:
            if self.random.random() < 0.5:
                self.world.run(step.do())

    def deliver_everything_somehow(self) -> None:
        lanes = self.world.broker.lanes
        messages = lanes + self.random.sample(lanes, len(lanes) // 2)
        self.random.shuffle(messages)
        self.world.postgres.take(changes_in(*messages))
        self.random.shuffle(messages)
        for message in messages:
            self.world.run(self.world.instances[0].reveal(*changes_in(message)))


async def drained(owner: RailRig) -> None:
    assert owner.drainer is not None
    # Like the loop of the drainer, the model tries again after an error.
    with contextlib.suppress(NotSent, InDoubt, JournalBroken):
        await owner.drainer.drain_some()


async def finished(owner: RailRig, left: Stale) -> None:
    # Like the reconciler, the model tries again in its next round.
    with contextlib.suppress(TicketrailError):
        await owner.rail.claim_finisher.finish(left)


@pytest.mark.parametrize("examples", [150, pytest.param(700, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)  # shrinking a failing example takes minutes
def test_promises_1_to_5_hold_for_any_order_of_steps_crashes_and_lost_mirrors(world: World, examples: int) -> None:
    run_state_machine_as_test(
        lambda: RailMachine(world),  # type: ignore[arg-type]
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    if examples == 700:
        assert_reached(world.seen)


def assert_reached(seen: Counter[str]) -> None:
    """Asserts that the run reached every dangerous outcome, because a model that does not reach them checks nothing."""
    required = {f"{kind}: {outcome}" for kind, outcomes in OUTCOMES.items() for outcome in outcomes}
    required |= {"commit: broker, visible", "commit: broker, not visible", "commit: journal, visible"}
    required |= {"commit: replayed", "commit: exists", "commit: ClaimLost", "commit: Unavailable"}
    required |= {"commit: OutcomeUnknown", "crash", "fork", "clock jumps by -2 h", "clock jumps by 2 h", "restored"}
    required |= {"power cut", "broken position"}
    required |= {f"claim: {reply}" for reply in ("Claimed", "Cold", "Busy", "Stale", "HeadMoved")}
    assert not (missing := required - {name for name, count in seen.items() if count}), f"never happened: {missing}"
