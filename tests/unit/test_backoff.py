"""The wait before the next try grows up to a bound, and its jitter spreads clients."""

import pytest

from shared.backoff import backoff


@pytest.mark.parametrize(
    ("failures", "seconds"), [(0, 0.1), (1, 0.2), (2, 0.4), (4, 1.6), (5, 2.0), (6, 2.0), (5_000, 2.0), (10**9, 2.0)]
)
def test_a_wait_doubles_up_to_two_seconds_after_any_number_of_failures(failures: int, seconds: float) -> None:
    waits = [backoff(failures) for _ in range(200)]
    assert all(seconds / 2 <= wait <= seconds for wait in waits)
    assert len(set(waits)) > 100, "the waits are too alike: clients would retry at the same moment"
