"""A cluster of three RabbitMQ nodes, always as local processes on one machine.

The nodes share a port mapper and a cookie. They notice a silent node within seconds instead of a minute. A node that
loses contact with the others pauses (`pause_minority`). On RabbitMQ 3.10 a thawed node may stay separate from the
others with any setting; a restart repairs it.
"""

import base64
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deploy.local import packages, servers
from deploy.local.child import Child
from deploy.local.packages import Programs
from deploy.local.port_check import HOST, find_free
from shared.messaging.management import ask
from tests.rigs.servers import RabbitMQ
from tests.rigs.servers.processes import LocalProcess

SIZE = 3
_TICK_SECONDS = 8  # a node that is silent for this long counts as down


class Node(servers.RabbitMQ):
    def __init__(self, directory: Path, programs: Programs, *, epmd_port: int, ports: list[int], first: str) -> None:
        """`first` is the node that this one joins; empty for the first node."""
        port, management, distribution = ports
        super().__init__(
            directory,
            directory.with_suffix(".log"),
            programs,
            port=port,
            management_port=management,
            epmd_port=epmd_port,
            distribution_port=distribution,
        )
        self._ports = {name: port for name, port in self._ports.items() if name != "TICKETRAIL_EPMD_PORT"}
        self._first = first
        self.node = f"ticketrail-{port}@localhost"

    def _prepare(self) -> None:
        super()._prepare()
        (self.directory / "conf.d" / "10-cluster.conf").write_text(
            f"""\
cluster_formation.peer_discovery_backend = classic_config
cluster_formation.classic_config.nodes.1 = {self._first or self.node}
cluster_formation.discovery_retry_limit = 60
cluster_partition_handling = pause_minority
net_ticktime = {_TICK_SECONDS}
"""
        )

    def _launch(self) -> None:
        self._children = [
            Child.spawn([self._programs.rabbitmq_server], log=self.log, env=self.environment, cwd=self.directory)
        ]


class Cluster:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._programs = packages.ensure()
        self._epmd, *ports = find_free(1 + 3 * SIZE)
        cookie = base64.b32encode(os.urandom(20)).decode()
        self.locals: list[Node] = []
        for number in range(SIZE):
            directory = self._folder / f"node-{number}"
            directory.mkdir()
            (directory / ".erlang.cookie").write_text(cookie)
            (directory / ".erlang.cookie").chmod(0o400)
            first = self.locals[0].node if self.locals else ""
            mine = ports[3 * number : 3 * number + 3]
            self.locals.append(Node(directory, self._programs, epmd_port=self._epmd, ports=mine, first=first))
        self.nodes = [RabbitMQ(LocalProcess(one), one.port, one.management_port) for one in self.locals]
        self._mapper: Child | None = None

    def start(self) -> None:
        """Returns when all nodes form one cluster."""
        env = self.locals[0].environment
        command = [str(self._programs.epmd), "-port", str(self._epmd), "-address", HOST]
        self._mapper = Child.spawn(command, log=self._folder / "epmd.log", env=env, cwd=self._folder)
        self.locals[0].start()
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda one: one.start(), self.locals[1:]))
        running = self.running(0)
        if running != SIZE:
            raise servers.ServerFailed(f"{running} of {SIZE} nodes are one cluster")

    def running(self, at: int) -> int:
        """Returns the number of running nodes that the node `at` sees, including itself. Raises OSError."""
        found: Any = ask(self.nodes[at].management_url, "GET", "/api/nodes", timeout=5)
        return sum(bool(one.get("running")) for one in found)

    def members(self, vhost: str, queue: str) -> list[str]:
        """Returns the nodes with a replica of the queue; none for some seconds, until the management API knows the
        queue."""
        found: Any = ask(self.nodes[0].management_url, "GET", f"/api/queues/{vhost}/{queue}", timeout=5)
        return list(found.get("members", []))

    def discard(self) -> None:
        for one in self.locals:
            one.thaw()
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda one: one.kill(), self.locals))
        if self._mapper is not None:
            self._mapper.kill()
