"""The servers as local processes on free ports, in a temporary folder that is removed after the run."""

import shutil
import tempfile
from pathlib import Path

from deploy.local import packages, servers
from deploy.local.port_check import find_free
from tests.rigs.servers import PostgreSQL, RabbitMQ, Redis, Server, Servers


class LocalProcess:
    def __init__(self, server: servers.Server) -> None:
        self.server = server
        self.start = server.start
        self.stop = server.stop
        self.kill = server.kill
        self.freeze = server.freeze
        self.thaw = server.thaw

    def discard(self) -> None:
        # Without a graceful stop, the shared memory of PostgreSQL stays allocated. A kill ends other servers faster.
        if isinstance(self.server, servers.PostgreSQL):
            self.server.stop()
        else:
            self.server.kill()


def local_server(server: Server) -> servers.Server:
    """Returns the local process behind a server. Raises TypeError if it runs in a container."""
    lifecycle = getattr(server.kill, "__self__", None)
    if not isinstance(lifecycle, servers.Server):
        raise TypeError(f"{server} is not a local process")
    return lifecycle


def folder_of(server: Server) -> Path:
    """Returns the folder with the data of a local process."""
    return local_server(server).directory.resolve()


def local_redis(folder: Path, *arguments: str) -> Redis:
    """Returns a Redis that is a local process even if the run uses containers, because tests copy and restore its
    files, or start it with more `arguments`."""
    (port,) = find_free(1)
    own = servers.Redis(
        folder / f"redis-{port}",
        folder / f"redis-{port}.log",
        packages.ensure(),
        port=port,
        arguments=arguments,
    )
    return Redis(LocalProcess(own), port)


def with_own_redis(shared: Servers, folder: Path) -> Servers:
    """Returns the servers of the run, with another Redis in place of the shared one. That Redis is not started."""
    return Servers(
        shared.rabbitmq,
        shared.postgres,
        local_redis(folder),
        another_redis=lambda: local_redis(folder),
        clean=lambda: None,
    )


def prepare() -> Servers:
    programs = packages.ensure()
    folder = Path(tempfile.mkdtemp(prefix="ticketrail-test-"))
    folder.chmod(0o755)  # root starts PostgreSQL as another user, which must be able to enter the folder
    logs = folder / "logs"
    amqp, management, epmd, distribution, postgres_port, *redis_ports = find_free(16)
    rabbitmq = servers.RabbitMQ(
        folder / "rabbitmq",
        logs / "rabbitmq.log",
        programs,
        port=amqp,
        management_port=management,
        epmd_port=epmd,
        distribution_port=distribution,
    )
    postgres = servers.PostgreSQL(folder / "postgres", logs / "postgres.log", programs, port=postgres_port)

    def redis() -> Redis:
        port = redis_ports.pop() if redis_ports else find_free(1)[0]
        server = servers.Redis(folder / f"redis-{port}", logs / f"redis-{port}.log", programs, port=port)
        return Redis(LocalProcess(server), port)

    return Servers(
        RabbitMQ(LocalProcess(rabbitmq), amqp, management),
        PostgreSQL(LocalProcess(postgres), postgres_port),
        redis(),
        another_redis=redis,
        clean=lambda: shutil.rmtree(folder, ignore_errors=True),
    )
