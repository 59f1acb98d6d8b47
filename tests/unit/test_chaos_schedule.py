"""The schedule of `make chaos`."""

import itertools

import pytest

from tests.chaos.schedule import RARE, SERVERS, SERVICES, Kind, schedule

SEEDS = range(60)


def test_each_seed_has_its_own_schedule() -> None:
    for seed in SEEDS:
        assert schedule(seed, 300.0) == schedule(seed, 300.0)
    assert len({str(schedule(seed, 60.0)) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("length", [20.0, 60.0, 300.0])
def test_faults_of_one_target_never_overlap_and_all_end_before_the_run_ends(length: float) -> None:
    for seed in SEEDS:
        faults = schedule(seed, length)
        assert faults == sorted(faults, key=lambda one: one.starts_at)
        assert all(one.starts_at > 0.0 and one.ends_at <= length for one in faults)
        for one, other in itertools.combinations(faults, 2):
            assert not {*one.targets} & {*other.targets} or one.ends_at < other.starts_at, (seed, one, other)


def test_faults_of_different_targets_sometimes_overlap() -> None:
    together = 0
    for seed in SEEDS:
        faults = schedule(seed, 60.0)
        together += any(other.starts_at < one.ends_at for one, other in itertools.pairwise(faults))
    assert together > len(SEEDS) / 4


def test_a_minute_has_at_least_five_faults_and_all_kinds_and_targets_occur() -> None:
    assert min(len(schedule(seed, 60.0)) for seed in SEEDS) >= 5
    every = [fault for seed in SEEDS for fault in schedule(seed, 60.0)]
    assert {one.kind for one in every} == set(Kind)
    assert {one.target for one in every if one.kind is Kind.KILL} == {*SERVICES, *SERVERS}


def test_faults_can_be_left_out() -> None:
    every = [fault for seed in SEEDS for fault in schedule(seed, 60.0, without=RARE)]
    assert {one.kind for one in every} == set(Kind) - RARE


def test_clocks_are_moved_both_ways() -> None:
    moved = [fault.hours for seed in SEEDS for fault in schedule(seed, 60.0) if fault.kind is Kind.CLOCK]
    assert min(moved) < 0 < max(moved)
    assert all(moved)


def test_a_long_run_has_one_connection_that_stalls_for_over_a_minute() -> None:
    for seed in SEEDS:
        long = [one for one in schedule(seed, 180.0) if one.kind is Kind.STALL and one.seconds > 60.0]
        assert len(long) == 1
        assert long[0].target in SERVERS
