"""A mirror writer in this process, beside the parts of a sync worker."""

from collections.abc import Sequence
from typing import Any

import pytest

from services.sync.mirror.mirror_writer import MirrorWriter
from shared.entities.contract import Change
from shared.messaging import declare, topology
from shared.mirror.mirror import Apply, Document
from shared.observability.metrics import Metrics, WriterMetrics
from tests.rigs.postgres_writer import Rig
from tests.rigs.rail.changes import applied
from tests.rigs.system import eventually


class MirrorRig:
    def __init__(self, rig: Rig, **options: Any) -> None:
        """`options`: of `MirrorWriter`."""
        self.rig = rig
        self.mirror = rig.mirror
        self.writer = MirrorWriter(
            rig.settings,
            rig.postgres,
            rig.mirror,
            rig.publisher,
            rig.watch,
            rig.tracer,
            WriterMetrics(Metrics()),
            **options,
        )

    async def warm(self) -> None:
        async def look() -> bool:
            return self.writer.warm

        await eventually(look, what="a warm mirror")

    async def cold(self) -> None:
        """Waits until the writer has noticed that the mirror is lost."""

        async def look() -> bool:
            return not self.writer.warm

        await eventually(look, what="a mirror writer that has noticed the loss")

    async def document(self, made: Change) -> Document | None:
        _, [found] = await self.mirror.read(made.restaurantid, made.entity, [made.entity_id])
        return found

    async def shown(self, made: Change) -> None:
        await eventually(
            lambda: self.document(made),
            what="the change in the mirror",
            until=lambda found: found is not None and found.head == made.head,
        )

    async def reveal(self, made: Change) -> None:
        """Writes the state to the mirror as a commit does."""
        await self.mirror.apply([applied(made)])

    def watch_applied(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Returns a list that receives the change id of each state that is sent to the mirror from now on."""
        sent: list[str] = []
        apply = self.mirror.apply

        async def noted(states: Sequence[Apply], **more: Any) -> list[int] | None:
            sent.extend(one.head.change_id for one in states)
            return await apply(states, **more)

        monkeypatch.setattr(self.mirror, "apply", noted)
        return sent


async def replace_log(rig: Rig, *changes: Change) -> None:
    """Makes the change log again with other entries: the given changes, each in a message of its own."""
    async with await declare.connect(rig.settings.rabbitmq_url) as connection:
        await (await connection.channel()).queue_delete(topology.LOG)
        await declare.declare_logs(connection, rig.settings)
    for made in changes:
        await rig.publish(made)
