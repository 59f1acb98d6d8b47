"""How often the reconciler looks; what it does is tested on real servers (tests/faults, tests/model)."""

import asyncio
from typing import cast

from services.sync.reconciler import Reconciler
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.rail.commit import Rail
from shared.settings import Settings


class SlowMirror:
    def __init__(self) -> None:
        self.looks = 0
        self.takes = 0.5

    async def restaurant_ids(self) -> list[str]:
        self.looks += 1
        await asyncio.sleep(self.takes)
        return []


async def test_a_long_look_for_what_is_pending_is_followed_by_a_longer_rest() -> None:
    mirror = SlowMirror()
    made = Reconciler(Settings(), cast(Postgres, None), cast(Mirror, mirror), cast(Rail, None))
    for _ in range(3):
        await made._settle_sometimes()
    assert mirror.looks == 1
    made._settle_again_at = 0.0  # the rest is over
    mirror.takes = 0.0
    await made._settle_sometimes()
    await asyncio.sleep(0.01)
    await made._settle_sometimes()
    assert mirror.looks == 3, "a short one is repeated at the next round"
