"""How often the reconciler looks; what it does is tested on real servers (tests/faults, tests/model)."""

from typing import cast

import pytest

from services.sync.maintenance import reconciler
from services.sync.maintenance.reconciler import Reconciler
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.rail.commit import Rail
from shared.settings import Settings


class Clock:
    """In place of the module `time`: it goes on only when told so."""

    def __init__(self) -> None:
        self.at = 100.0

    def monotonic(self) -> float:
        return self.at


class SlowMirror:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.looks = 0
        self.takes = 0.5

    async def restaurant_ids(self) -> list[str]:
        self.looks += 1
        self.clock.at += self.takes
        return []


async def test_a_long_look_for_what_is_pending_is_followed_by_a_longer_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    mirror = SlowMirror(clock)
    monkeypatch.setattr(reconciler, "time", clock)
    made = Reconciler(Settings(), cast(Postgres, None), cast(Mirror, mirror), cast(Rail, None))
    for _ in range(3):
        await made._sync_states_at_times()
    assert mirror.looks == 1
    clock.at += 4.4  # of nine times as long
    await made._sync_states_at_times()
    assert mirror.looks == 1
    clock.at += 0.2
    mirror.takes = 0.001
    await made._sync_states_at_times()
    clock.at += 0.01
    await made._sync_states_at_times()
    assert mirror.looks == 3, "a short one is repeated at the next round"
