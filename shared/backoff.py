"""The wait before the next try (exponential backoff with jitter)."""

import random

_FIRST_SECONDS, _MAX_SECONDS = 0.1, 2.0


def backoff(attempt: int) -> float:
    """Returns the seconds to wait after `attempt` failures in a row. The wait doubles with each failure, up to two
    seconds. The jitter spreads the retries of clients that lost a backend at the same moment."""
    return min(_FIRST_SECONDS * (1 << min(attempt, 6)), _MAX_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311  (jitter)
