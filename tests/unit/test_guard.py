"""The guard: between two states of an entity the larger (version, change id) wins, in any order of arrival."""

import functools
from random import Random
from uuid import UUID

import hypothesis.strategies as st
from hypothesis import given

from shared.entities.contract import Head
from shared.entities.registry import ENTITIES

# There are few versions and few ids, so that equal versions and repeated changes are frequent.
change_ids = st.sampled_from([str(UUID(int=n << 96)) for n in (1, 2, 9, 10, 15, 16, 2**32 - 1)])
heads = st.builds(Head, st.integers(1, 4), change_ids)


def applied(arrivals: list[Head]) -> Head:
    return functools.reduce(lambda head, one: one if one > head else head, arrivals)


@given(st.lists(heads, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_any_order_and_repetition_of_changes_gives_the_same_state(arrivals: list[Head], random: Random) -> None:
    again = arrivals + random.choices(arrivals, k=len(arrivals))
    random.shuffle(again)
    assert (
        applied(again) == applied(arrivals) == max(arrivals, key=lambda one: (one.version, UUID(one.change_id).bytes))
    )


@given(heads, heads)
def test_exactly_one_of_two_different_changes_wins(one: Head, other: Head) -> None:
    assert (one > other) + (other > one) == (one != other)


@given(heads, heads)
def test_a_higher_version_wins_whatever_its_change_id(one: Head, other: Head) -> None:
    if one.version != other.version:
        assert (one > other) == (one.version > other.version)


@given(st.uuids(), st.uuids())
def test_ids_sort_the_same_as_text_and_as_bytes_so_that_every_store_agrees(one: UUID, other: UUID) -> None:
    assert (Head(1, str(one)) > Head(1, str(other))) == (one.bytes > other.bytes)


def test_every_entity_is_registered_under_its_name_and_has_a_lane() -> None:
    assert all(name == entity.name and entity.lane for name, entity in ENTITIES.items())
