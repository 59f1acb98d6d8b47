"""One scenario for each mechanism that separates a mirror from the ones that were lost before it. The random steps of
test_rail_model.py find the same faults, but not in every run."""

from collections.abc import Callable

import pytest

from shared.errors import Unavailable
from tests.model.laws import ENTITIES
from tests.model.test_rail_model import RailMachine
from tests.model.world import World

FIRST = ENTITIES[0]


@pytest.fixture
def machine(world: World) -> RailMachine:
    found = RailMachine(world)
    found.choose_the_end(seed=2)  # no process crashes at the end
    return found


def finish(machine: RailMachine) -> None:
    machine.laws_hold()
    machine.teardown()


def refuse_a_change(machine: RailMachine) -> None:
    """Neither the broker nor the journal takes a change, so its claim is taken back and it is refused. A snapshot of
    the mirror has the claim."""
    machine.commits_undisturbed(at=0, kind="create", id_=FIRST)
    machine.commits_without_a_broker(at=0, kind="update", id_=FIRST, journal="broken", outcomes=[0])
    machine.laws_hold()
    assert isinstance(machine.world.attempts[-1].error, Unavailable)


def lose_in_a_failback(machine: RailMachine) -> None:
    machine.world.lose_mirror(machine.world.snapshot or ())


def restore_into_the_running_server(machine: RailMachine) -> None:
    machine.world.run(machine.world.follow(1))
    assert machine.world.restore_snapshot()


@pytest.mark.parametrize("lose", [lose_in_a_failback, restore_into_the_running_server])
@pytest.mark.parametrize("warm", [True, False], ids=["warm again", "still cold"])
def test_claim_that_an_older_copy_restores_is_not_finished(
    machine: RailMachine, lose: Callable[[RailMachine], None], warm: bool
) -> None:
    refuse_a_change(machine)
    lose(machine)
    if warm:
        machine.mirror_becomes_warm(leave=False)
    machine.reconciles(at=1, nth=0, outcomes=[0, 0, 0])
    finish(machine)


@pytest.mark.parametrize("lose", [World.lose_mirror, World.flush_mirror], ids=["failover", "flush"])
def test_number_that_only_a_journal_holds_is_not_given_by_the_next_mirrors(
    machine: RailMachine, lose: Callable[[World], None]
) -> None:
    for id_ in ENTITIES[:3]:
        machine.commits_without_a_broker(at=0, kind="create", id_=id_, journal="done", outcomes=[])
        machine.laws_hold()
        lose(machine.world)
        machine.mirror_becomes_warm(leave=False)
    finish(machine)


@pytest.mark.parametrize("hours", [-2, 2], ids=["back", "ahead"])
def test_claim_whose_owner_died_is_finished_although_the_clock_has_jumped(machine: RailMachine, hours: int) -> None:
    machine.begin(0, "create", FIRST)
    machine.goes_on(nth=0, outcomes=[0], patient=True)  # the claim
    machine.crashes(nth=0, done=False)
    machine.clock_of_the_mirror_jumps(hours=hours)
    finish(machine)
    assert len(machine.world.broker.recorded()) == 1


def test_change_that_log_and_mirror_lost_in_a_power_cut_keeps_its_version(machine: RailMachine) -> None:
    machine.commits_undisturbed(at=0, kind="create", id_=FIRST)
    machine.world.run(machine.world.follow(1))
    machine.world.take_snapshot()
    machine.commits_undisturbed(at=0, kind="update", id_=FIRST)
    machine.commits_undisturbed(at=1, kind="create", id_=ENTITIES[1])
    machine.laws_hold()
    machine.world.cut_power(2)
    machine.mirror_becomes_warm(leave=False)
    machine.commits_undisturbed(at=1, kind="update", id_=FIRST)
    machine.commits_undisturbed(at=0, kind="create", id_=ENTITIES[2])
    found = machine.world.run(machine.world.present(FIRST))
    assert found is not None and found[0].version == 3
    finish(machine)
