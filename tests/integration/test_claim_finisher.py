"""The claim finisher passes over claims that it cannot finish, and tries them again after a growing pause."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.entities.contract import Change
from shared.messaging.publisher import InDoubt
from shared.mirror.claim_replies import Claimed
from shared.mirror.mirror import Mirror
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.rail.broker import MemoryBroker
from tests.rigs.rail.changes import changes_in
from tests.rigs.rail.clock import Clock
from tests.rigs.rail.instance import RailRig
from tests.rigs.rail.mirror_server import MirrorServer
from tests.rigs.servers import Redis, Servers


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because the finisher finishes the claims of all tenants."""
    return servers.extra_redis()


class RefusingBroker(MemoryBroker):
    """Does not confirm messages with a change in `refused`, as RabbitMQ with a message that is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()
        self.attempts: list[str] = []

    async def publish(self, routing_key: str, body: bytes) -> None:
        ids = {change.id for change in changes_in(body)}
        self.attempts += ids
        if ids & self.refused:
            raise InDoubt("not confirmed")
        await super().publish(routing_key, body)


class FinisherRig(RailRig):
    def __init__(self, redis: Redis) -> None:
        self.broker, self.clock = RefusingBroker(), Clock(builders.CREATED_AT)
        settings = Settings(_env_file=None, redis_url=redis.url)
        super().__init__(
            settings,
            MirrorServer(redis.url),
            mirror=Mirror(redis.url, timeout=5.0, stale_seconds=0.0),
            broker=self.broker,
            clock=self.clock.monotonic,
            sleep=self.clock.sleep,
        )

    async def leave_claim(self, **fields: Any) -> Change:
        """Claims a creation whose owner dies."""
        change, reply = await self.claim(self.creation(**fields))
        assert isinstance(reply, Claimed)
        return change

    async def finish_all(self) -> int:
        return await self.rail.claim_finisher.finish_all()


@pytest.fixture
async def rig(redis: Redis) -> AsyncIterator[FinisherRig]:
    await redis.command("FLUSHALL")
    rig = FinisherRig(redis)
    await rig.server.warm()
    yield rig
    await rig.down()


async def test_claim_that_cannot_be_recorded_does_not_hold_back_the_others(rig: FinisherRig) -> None:
    stuck, *others = [await rig.leave_claim() for _ in range(4)]
    rig.broker.refused = {stuck.id}
    assert await rig.finish_all() == 3
    assert rig.broker.recorded().keys() == {one.id for one in others}
    assert len(await rig.server.claims()) == 1
    assert rig.rail.claim_finisher.unfinished == 1


async def test_claim_that_cannot_be_recorded_is_tried_again_after_a_growing_pause(rig: FinisherRig) -> None:
    stuck = await rig.leave_claim()
    rig.broker.refused = {stuck.id}
    for tried, pause in enumerate((0, 5, 10, 20, 40, 60, 60)):
        if pause:
            rig.clock.move(seconds=pause - 0.1)
            await rig.finish_all()
            assert rig.broker.attempts == [stuck.id] * tried, "it was tried again too early"
            rig.clock.move(seconds=0.1)
        assert await rig.finish_all() == 0
        assert rig.broker.attempts == [stuck.id] * (tried + 1)
    rig.broker.refused.clear()
    later = await rig.leave_claim()
    assert await rig.finish_all() == 1, "a claim waited for the pause of another one"
    rig.clock.move(seconds=60)
    assert await rig.finish_all() == 1
    assert rig.broker.recorded().keys() == {stuck.id, later.id}
    assert (rig.rail.claim_finisher.unfinished, await rig.server.claims()) == (0, [])


async def test_more_unrecordable_claims_than_a_round_lists_do_not_hide_the_others(rig: FinisherRig) -> None:
    stuck = [await rig.leave_claim() for _ in range(130)]
    rig.broker.refused = {one.id for one in stuck}
    good = await rig.leave_claim()
    for _ in range(2):
        await rig.finish_all()
    assert rig.broker.recorded().keys() == {good.id}
    assert rig.rail.claim_finisher.unfinished == len(stuck)


async def test_claim_that_another_instance_finished_is_no_longer_counted(rig: FinisherRig) -> None:
    stuck = await rig.leave_claim()
    rig.broker.refused = {stuck.id}
    await rig.finish_all()
    await rig.reveal(stuck)  # the mirror writer has read the change from the log
    assert await rig.finish_all() == 0
    assert rig.rail.claim_finisher.unfinished == 0
