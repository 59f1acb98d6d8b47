"""Power cuts: the files of the streams, and of Redis, are put back to an earlier state, as a disk has them that did not
get the last writes. Quorum queues and PostgreSQL flush before they confirm, so their files stay."""

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deploy.local import packages
from deploy.local import servers as local
from deploy.local.port_check import find_free
from tests.rigs.servers import RabbitMQ, Server, Servers
from tests.rigs.servers.processes import LocalProcess, folder_of
from tests.rigs.system import eventually


class OwnBroker(Servers):
    """The servers of the run, but with a local RabbitMQ process that a test may restart, even in a run that uses
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

    async def copy_streams(self) -> None:
        """Copies what the disk has of all streams now."""
        await asyncio.to_thread(_copy_tree, _streams(self.folder), self.folder.parent / "streams")

    async def cut_power(self) -> None:
        """Kills RabbitMQ, puts the copied files of the streams back, and starts it again."""
        await asyncio.to_thread(self.rabbitmq.kill)
        await asyncio.to_thread(_put_back, self.folder.parent / "streams", _streams(self.folder))
        await asyncio.to_thread(self.rabbitmq.start)


class PowerCut:
    """Cuts the power of the machine on which all servers run, as local processes."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        """`folder`: keeps the copies."""
        self._servers = servers
        self._folder = folder

    def copy(self) -> None:
        """Copies what the disk has of the streams and of Redis now."""
        _copy_tree(_streams(folder_of(self._servers.rabbitmq)), self._folder / "streams")
        _copy_tree(folder_of(self._servers.redis), self._folder / "redis")

    @property
    def _every(self) -> tuple[Server, ...]:
        return self._servers.rabbitmq, self._servers.redis, self._servers.postgres

    def cut(self) -> None:
        """Kills all servers and puts the copied files back."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda server: server.kill(), self._every))
        _put_back(self._folder / "streams", _streams(folder_of(self._servers.rabbitmq)))
        _put_back(self._folder / "redis", folder_of(self._servers.redis))

    def return_power(self) -> None:
        """Starts all servers again."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda server: server.start(), self._every))


def _streams(folder: Path) -> Path:
    (found,) = (path for path in folder.rglob("stream") if path.is_dir())
    return found


def _copy_tree(source: Path, copy: Path) -> None:
    """Copies a folder whose files a server may remove meanwhile: then the copy is made again."""
    while True:
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(source, copy)
        except (FileNotFoundError, shutil.Error):
            continue
        return


def _put_back(copy: Path, place: Path) -> None:
    shutil.rmtree(place)
    shutil.move(copy, place)
