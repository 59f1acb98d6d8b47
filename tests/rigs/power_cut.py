"""A RabbitMQ of its own for a test that cuts the power: the files of its streams are put back to an earlier state, as a
disk has them that did not get the last writes. Quorum queues are flushed before a confirm, so their files stay."""

import asyncio
import shutil
from pathlib import Path

from deploy.local import packages
from deploy.local import servers as local
from deploy.local.port_check import find_free
from tests.rigs.servers import RabbitMQ, Servers
from tests.rigs.servers.processes import LocalProcess
from tests.rigs.system import eventually


class OwnBroker(Servers):
    """The servers of the run, but with a local RabbitMQ process that a test may restart, also in a run that uses
    containers."""

    def __init__(self, shared: Servers, folder: Path) -> None:
        amqp, management, epmd, distribution = find_free(4)
        self.folder = folder / "rabbitmq"
        own = local.RabbitMQ(
            self.folder,
            folder / "rabbitmq.log",
            packages.ensure(),
            port=amqp,
            management_port=management,
            epmd_port=epmd,
            distribution_port=distribution,
        )
        super().__init__(
            RabbitMQ(LocalProcess(own), amqp, management),
            shared.postgres,
            shared.redis,
            another_redis=shared.extra_redis,
            clean=lambda: None,
        )

    async def streams_on_disk(self) -> None:
        """Waits until the node has written the name of its stream coordinator, within a second of the first stream.

        If RabbitMQ is killed earlier, it forgets the coordinator, and its streams stay down (docs/operations.md).
        """

        def written() -> bool:
            files = self.folder.rglob("coordination/*/names.dets")
            return any(b"rabbit_stream_coordinator" in file.read_bytes() for file in files)

        await eventually(lambda: asyncio.to_thread(written), what="the stream coordinator on disk")

    def _streams(self) -> Path:
        (found,) = (path for path in self.folder.rglob("stream") if path.is_dir())
        return found

    async def copy_streams(self) -> None:
        """Copies what the disk has of all streams now."""
        await asyncio.to_thread(shutil.copytree, self._streams(), self.folder.parent / "streams")

    async def cut_power(self) -> None:
        """Kills RabbitMQ, puts the copied files of the streams back, and starts it again."""
        await asyncio.to_thread(self.rabbitmq.kill)
        streams = self._streams()
        await asyncio.to_thread(shutil.rmtree, streams)
        await asyncio.to_thread(shutil.move, self.folder.parent / "streams", streams)
        await asyncio.to_thread(self.rabbitmq.start)
