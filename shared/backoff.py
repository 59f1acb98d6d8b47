"""The wait before the next try (exponential backoff with jitter)."""

import random

_FIRST_SECONDS, _MAX_SECONDS = 0.1, 2.0


def backoff(attempt: int) -> float:
    """Returns the seconds to wait after `attempt` failures in a row. The wait doubles with each failure, up to two
    seconds. The jitter spreads the retries of clients that lost a backend at the same moment."""
    return min(_FIRST_SECONDS * (1 << min(attempt, 6)), _MAX_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311  (jitter)


def jittered(seconds: float) -> float:
    """Returns `seconds`, up to half as much more or less. Use it for `Retry-After`, so that clients that were refused
    at the same moment do not come back at the same moment."""
    return seconds * random.uniform(0.5, 1.5)  # noqa: S311  (jitter)
