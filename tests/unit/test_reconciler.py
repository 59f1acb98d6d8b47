"""How often the reconciler searches. Its repairs are tested on real servers (tests/faults, tests/model)."""

from typing import cast

import pytest

from services.sync.maintenance import reconciler
from services.sync.maintenance.reconciler import Reconciler
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.rail.commit import Rail
from shared.settings import Settings


class Clock:
    """Replaces the module `time`; the test moves it on."""

    def __init__(self) -> None:
        self.at = 100.0

    def monotonic(self) -> float:
        return self.at


class SlowMirror:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.searches = 0
        self.seconds = 0.5

    async def restaurant_ids(self) -> list[str]:
        self.searches += 1
        self.clock.at += self.seconds
        return []


async def test_a_long_search_for_pending_changes_is_followed_by_a_longer_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    mirror = SlowMirror(clock)
    monkeypatch.setattr(reconciler, "time", clock)
    made = Reconciler(Settings(), cast(Postgres, None), cast(Mirror, mirror), cast(Rail, None))
    for _ in range(3):
        await made._sync_states_at_times()
    assert mirror.searches == 1
    clock.at += 4.4  # of a pause nine times as long as the search
    await made._sync_states_at_times()
    assert mirror.searches == 1
    clock.at += 0.2
    mirror.seconds = 0.001
    await made._sync_states_at_times()
    clock.at += 0.01
    await made._sync_states_at_times()
    assert mirror.searches == 3, "a short search is repeated in the next round"
