"""The number of messages that a consumer of a lane takes."""

import pytest

from services.sync.writer.prefetch import FIRST_PREFETCH, MANY_DELIVERIES, MAX_HELD_BYTES, LanePrefetch

MIB = 1 << 20


class Watch:
    def __init__(self) -> None:
        self.at = 1_000.0

    def __call__(self) -> float:
        return self.at


class HoldingConsumer:
    def __init__(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self.reduced = 0

    def reduce(self) -> None:
        self.reduced += 1


@pytest.mark.parametrize(("body", "expected"), [(1_000, 100), (300 << 10, 100), (MIB, 25), (8 * MIB, 4), (40 * MIB, 1)])
def test_after_its_first_message_a_consumer_takes_as_many_such_messages_as_it_may_hold(
    body: int, expected: int
) -> None:
    lane = LanePrefetch(100, Watch())
    lane.first(body)
    assert lane.present == expected
    assert expected == 1 or lane.present * body <= MAX_HELD_BYTES


def test_a_consumer_that_holds_too_much_reduces_all_consumers_of_its_lane_for_a_minute() -> None:
    watch = Watch()
    lane, first, second = LanePrefetch(100, watch), HoldingConsumer(100), HoldingConsumer(100)
    lane.add(first)
    lane.add(second)
    assert not lane.holds(MAX_HELD_BYTES, MIB)
    assert (lane.present, first.reduced) == (100, 0)
    assert lane.holds(MAX_HELD_BYTES + 1, MIB)
    assert (lane.present, first.reduced, second.reduced) == (25, 1, 1)
    assert not lane.settled
    first.prefetch, second.prefetch = 0, 25
    assert lane.settled
    watch.at += 59
    assert not lane.holds(MAX_HELD_BYTES // 2, MIB)  # large messages still arrive, which begins another minute
    watch.at += 59
    assert lane.present == 25
    watch.at += 2
    assert lane.present == 100


def test_a_consumer_takes_one_at_a_time_for_a_minute_after_a_message_with_many_deliveries() -> None:
    watch = Watch()
    lane = LanePrefetch(100, watch)
    lane.delivered(MANY_DELIVERIES - 1)
    assert lane.present == 100
    lane.delivered(MANY_DELIVERIES)
    assert lane.present == FIRST_PREFETCH
    watch.at += 61
    assert lane.present == 100
