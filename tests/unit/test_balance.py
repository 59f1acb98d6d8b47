"""The ledger classifies missing changes, and its balance adds up."""

from collections import Counter
from datetime import timedelta

import pytest

from services.sync.ledger.balance import AcceptedChange, Placement, classify_missing, counted, is_id
from tests.rigs.builders import CREATED_AT, RESTAURANT, new_id


def suspect(age: int = 0, lane: str = "critical") -> AcceptedChange:
    return AcceptedChange(
        change_id=new_id(),
        restaurant_id=RESTAURANT,
        subject="order/1",
        version=1,
        lane=lane,
        accepted_at=CREATED_AT - timedelta(seconds=age),
        trace_id=None,
        seen_in="log",
    )


def verdicts(
    suspects: list[AcceptedChange],
    *,
    waiting: dict[tuple[str, str], int] | None = None,
    missing_for: float = 10.0,
    cleared: bool = True,
) -> tuple[list[str], int]:
    """Returns the place of each suspect, and the number of suspects that could not be classified yet."""
    placement = Placement(suspects=suspects)
    ids = [one.change_id for one in suspects]
    unclassified = classify_missing(
        placement, waiting or {}, dict.fromkeys(ids, missing_for), ids if cleared else (), 5.0
    )
    places = {one.change_id: place for place, entries in placement.places.items() for one in entries}
    return [places[id_] for id_ in ids], unclassified


def test_a_change_that_is_missing_long_enough_is_unexplained() -> None:
    assert verdicts([suspect()]) == (["unexplained"], 0)


def test_a_change_that_is_missing_for_a_moment_counts_as_queued_and_is_checked_again() -> None:
    assert verdicts([suspect()], missing_for=4.9) == (["queued"], 1)


def test_a_missing_change_that_its_lane_may_still_hold_counts_as_queued() -> None:
    assert verdicts([suspect()], cleared=False) == (["queued"], 0)


def test_messages_of_unknown_id_explain_the_newest_missing_changes_of_their_lane() -> None:
    old, new, other = suspect(60), suspect(1), suspect(lane="normal")
    assert verdicts([old, new, other], waiting={("retrying", "critical"): 1}) == (
        ["unexplained", "retrying", "unexplained"],
        0,
    )
    assert verdicts([old, new], waiting={("retrying", "critical"): 1, ("dead", "critical"): 1})[0] == [
        "dead",
        "retrying",
    ]


def test_the_balance_adds_up_in_total_and_for_each_restaurant() -> None:
    other = new_id()
    total, each = counted(Counter({RESTAURANT: 3, other: 1}), {"queued": [suspect(), suspect()]}, {other: "the-other"})
    assert (total.accepted, total.synced, total.queued) == (6, 4, 2)
    assert [(one.slug, one.restaurant_id, one.accepted) for one in each] == [
        ("", RESTAURANT, 5),
        ("the-other", other, 1),
    ]


@pytest.mark.parametrize("value", [None, 7, "", "x" * 36, RESTAURANT.upper()[:35] + "G", f"{RESTAURANT}\n"])
def test_only_uuids_count_as_ids(value: object) -> None:
    assert not is_id(value)
    assert is_id(new_id())
