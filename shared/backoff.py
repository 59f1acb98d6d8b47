"""How long to wait before trying again."""

import random

_FIRST, _LONGEST = 0.1, 2.0  # seconds


def backoff(attempt: int) -> float:
    """Seconds after so many failures in a row: doubling up to two, jittered, so that those who lost a backend at the
    same moment do not come back at the same moment."""
    return min(_FIRST * (1 << min(attempt, 6)), _LONGEST) * random.uniform(0.5, 1.0)  # noqa: S311  (jitter)
