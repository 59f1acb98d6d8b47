"""The entries of the log and of the feed that the ledger keeps, and the place where it begins again."""

import pytest

from services.sync.ledger.log_changes import LogChange, changes_in
from services.sync.ledger.sides import FeedOnly, LogOnly, Sides
from shared.entities.contract import encode, encode_batch
from shared.messaging.position import LogPosition
from shared.postgres.checkpoints import BEFORE_LOG
from shared.postgres.feed import FeedChange
from tests.rigs.builders import change, order


def at(offset: int) -> LogPosition:
    return LogPosition(offset, offset)


def logs(sides: Sides, change_id: str, offset: int) -> None:
    assert sides.read_log_to(at(offset))
    sides.from_log(change_id, LogOnly(at(offset), at(offset - 1), "critical", LogChange()))


def commits(sides: Sides, change_id: str, xid: int) -> None:
    sides.from_feed(FeedOnly(FeedChange(xid, 1, "", "order", "", 1, change_id), 0.0))
    sides.feed_position = (xid, 1)


def test_change_that_both_sides_have_leaves_both() -> None:
    sides = Sides(BEFORE_LOG, BEFORE_LOG, (0, 0))
    logs(sides, "a", 0)
    commits(sides, "a", 5)
    commits(sides, "b", 6)
    logs(sides, "b", 1)
    assert (sides.log, sides.feed, sides.committed) == ({}, {}, 2)
    assert (sides.log_low, sides.feed_low) == (at(1), (6, 1))


def test_next_beginning_is_before_every_change_that_one_side_alone_has() -> None:
    sides = Sides(BEFORE_LOG, BEFORE_LOG, (0, 0))
    logs(sides, "a", 0)
    commits(sides, "a", 5)
    logs(sides, "only in the log", 1)
    logs(sides, "b", 2)
    commits(sides, "only in the feed", 6)
    assert (sides.log_low, sides.feed_low) == (at(0), (6, 0))


def test_log_is_read_again_from_before_every_change_that_the_feed_repeats() -> None:
    """Without this, a restart would read "b" in the feed alone, and publish it again."""
    sides = Sides(BEFORE_LOG, BEFORE_LOG, (0, 0))
    logs(sides, "a", 0)
    logs(sides, "b", 1)
    commits(sides, "a", 5)
    commits(sides, "late in the log", 6)
    commits(sides, "b", 7)
    assert (sides.log_low, sides.feed_low) == (at(0), (6, 0))
    again = Sides(sides.log_low, sides.log_at, sides.feed_low)
    logs(again, "b", 1)
    logs(again, "late in the log", 2)
    commits(again, "late in the log", 6)
    commits(again, "b", 7)
    assert not again.feed
    logs(sides, "late in the log", 2)
    assert (sides.log_low, sides.feed_low) == (at(2), (7, 1))


def test_change_that_was_looked_up_is_not_missing_in_the_log_when_the_feed_delivers_it() -> None:
    sides = Sides(BEFORE_LOG, BEFORE_LOG, (0, 0))
    logs(sides, "held back", 0)
    logs(sides, "dead", 1)
    sides.found("held back", (9, 1))
    sides.found("dead", None)
    assert (sides.early, sides.log) == (1, {})
    assert sides.log_low == BEFORE_LOG or sides.log_low == at(-1), "a restart must read the change again"
    commits(sides, "held back", 9)
    commits(sides, "dead", 10)  # an operator has replayed it
    assert (sides.early, sides.feed, sides.committed) == (0, {}, 2)


def test_second_copy_in_the_log_does_not_hide_a_change_from_the_feed() -> None:
    sides = Sides(BEFORE_LOG, BEFORE_LOG, (0, 0))
    logs(sides, "a", 0)
    commits(sides, "a", 5)
    logs(sides, "a", 1)
    sides.found("a", (5, 1))
    assert (sides.early, sides.log, sides.committed) == (0, {}, 1)


def test_log_that_was_cut_while_it_is_read_again_is_noticed() -> None:
    sides = Sides(at(3), at(5), (0, 0))
    assert sides.read_log_to(at(4))
    assert sides.rereads
    assert not sides.read_log_to(LogPosition(5, 99)), "another message stands where `log_at` was"
    sides = Sides(at(3), at(5), (0, 0))
    assert not sides.read_log_to(at(6)), "the message of `log_at` is gone"
    assert Sides(at(3), at(5), (0, 0)).read_log_to(at(5))


@pytest.mark.parametrize("first", [5, 9])
def test_position_moves_over_entries_that_have_expired(first: int) -> None:
    sides = Sides(at(3), at(7), (0, 0))
    sides.log_position = at(first - 1)
    assert sides.read_log_to(at(first))
    assert sides.log_position == at(first)
    assert sides.rereads == (first < 7)


def test_every_event_with_a_change_id_is_compared_also_a_broken_one() -> None:
    good = change(order())
    events = [encode(good), b'{"id": "%s", "restaurantid": 3}' % good.id.encode(), b'{"id": "no id"}', b"[]", b"7"]
    found, unreadable = changes_in(encode_batch(events))
    assert [(one.id, one.restaurant_id) for one, _ in found] == [(good.id, good.restaurantid), (good.id, "")]
    assert unreadable == 3
    assert changes_in(b"{") == ([], 1)
