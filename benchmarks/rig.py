"""Runs private servers and services with 50 restaurants, in a folder that is removed at the end.

The services have the settings of `make run`, with 10 % of the traces kept, but without rate limits. Each peer gets its
own database on the same PostgreSQL server, and a JSON file with the restaurants.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aio_pika
import asyncpg
import psutil

from benchmarks.restaurants import SeededRestaurant, seed
from deploy.local import packages, servers
from deploy.local.child import Child
from deploy.local.port_check import find_free
from shared.entities.contract import Lane
from shared.messaging.management import ask
from shared.messaging.topology import lane_queue

ROOT = Path(__file__).resolve().parents[1]
SECRET = "a-secret-for-benchmarks-that-is-long-enough"  # noqa: S105  (servers on 127.0.0.1 that live for minutes)
SERVICES = {
    "orders": ("services.orders",),
    "worker": ("services.sync", "worker"),
    "sync": ("services.sync", "api"),
    "notifier": ("services.notifier",),
}
WITHOUT_RATE_LIMITS = {"restaurant_requests_per_second": 0, "address_requests_per_second": 0}
"""Settings of every system under load. The readers of one restaurant exceed the default limit of 5,000 requests per
second, and a reply with 429 measures nothing."""
_POLL_INTERVAL_SECONDS = 0.1
_READY_TIMEOUT_SECONDS = 60.0
_STOP_TIMEOUT_SECONDS = 15.0
_HTTP_TIMEOUT_SECONDS = 2.0
_MAX_IDLE_CPU_PERCENT = 8
T = TypeVar("T")


class NotReady(RuntimeError):
    """A program ended, or did not become ready in time. The message contains the end of its log."""


class RunningProgram:
    """A service or a peer under load, and its URL."""

    def __init__(self, child: Child, url: str) -> None:
        self.child = child
        self.url = url
        self.pid = child.pid

    def stop(self) -> None:
        self.child.terminate(_STOP_TIMEOUT_SECONDS)

    def kill(self) -> None:
        self.child.kill()

    def freeze(self) -> None:
        for process in _tree(self.pid):
            process.suspend()

    def thaw(self) -> None:
        for process in _tree(self.pid):
            process.resume()


class BenchmarkRig:
    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ticketrail-bench-"))
        self.folder.chmod(0o755)  # if root runs the benchmark, PostgreSQL runs as another user
        programs = packages.ensure()
        amqp, management, epmd, distribution, postgres, redis = find_free(6)
        logs = self.folder / "logs"
        self.rabbitmq = servers.RabbitMQ(
            self.folder / "rabbitmq",
            logs / "rabbitmq.log",
            programs,
            port=amqp,
            management_port=management,
            epmd_port=epmd,
            distribution_port=distribution,
        )
        self.postgres = servers.PostgreSQL(self.folder / "postgres", logs / "postgres.log", programs, port=postgres)
        self.redis = servers.Redis(self.folder / "redis", logs / "redis.log", programs, port=redis)
        self.rabbitmq_url = f"amqp://ticketrail:{servers.PASSWORD}@127.0.0.1:{amqp}/"
        self.management_url = f"http://ticketrail:{servers.PASSWORD}@127.0.0.1:{management}"
        self.redis_url = self.redis.url
        self.restaurants: list[SeededRestaurant] = []
        self.restaurants_file = self.folder / "restaurants.json"
        self._running: list[RunningProgram] = []

    # -- start and stop -----------------------------------------------------------------------------------------

    def start(self) -> None:
        for server in (self.postgres, self.redis, self.rabbitmq):
            server.start()
        self.cli("migrate")
        self.restaurants, described = run(seed(self.database_url("writer"), SECRET))
        self.restaurants_file.write_bytes(described)

    def stop(self) -> None:
        for one in self._running:
            if one.child.returncode is None:
                one.kill()
        self.rabbitmq.kill()
        self.redis.kill()
        self.postgres.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def database_url(self, role: str, name: str = "ticketrail") -> str:
        return f"postgresql://ticketrail_{role}:{servers.PASSWORD}@127.0.0.1:{self.postgres.port}/{name}"

    def environment(self, **settings: object) -> dict[str, str]:
        """Returns the environment of a service. `settings` are fields of shared/settings.py."""
        chosen: dict[str, object] = {
            "home": self.folder / "home",
            "rabbitmq_url": self.rabbitmq_url,
            "rabbitmq_management_url": self.management_url,
            "redis_url": self.redis_url,
            "database_url": self.database_url("owner"),
            "database_writer_url": self.database_url("writer"),
            "database_api_url": self.database_url("api"),
            "database_ops_url": self.database_url("ops"),
            "jwt_secret": SECRET,
            "heartbeat_interval_seconds": 1.0,
            "trace_sample": 0.1,  # the share in production; in development every trace is kept, which costs CPU time
            **WITHOUT_RATE_LIMITS,
            **settings,
        }
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")},
            **{f"TICKETRAIL_{name.upper()}": str(value) for name, value in chosen.items()},
        }

    def cli(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "services.sync.cli", *arguments],
            check=True,
            env=self.environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )

    def service(self, name: str, *, wait: bool = True, **settings: object) -> RunningProgram:
        """Starts a service and, unless `wait` is False, waits until it is ready.

        Each service gets its own port and instance number.
        """
        (port,) = find_free(1)
        key = "worker_port" if name == "worker" else f"{name}_port"
        chosen = {key: port, "instance": 1 + sum(one.child.log.name.startswith(name) for one in self._running)}
        return self.program(
            [sys.executable, "-m", *SERVICES[name]],
            self.environment(**{**chosen, **settings}),
            port,
            name=name,
            ready="/health/ready" if wait else "",
        )

    def program(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str],
        port: int,
        *,
        name: str,
        ready: str = "/health/ready",
        cwd: Path = ROOT,
    ) -> RunningProgram:
        """Starts a program. If `ready` is not empty, waits until that path answers 200. Raises NotReady."""
        log = self.folder / "logs" / f"{name}-{len(self._running)}.log"
        running = RunningProgram(Child.spawn(command, log=log, env=env, cwd=cwd), f"http://127.0.0.1:{port}")
        self._running.append(running)
        deadline = time.monotonic() + _READY_TIMEOUT_SECONDS
        while ready and not _answers(running.url + ready):
            if running.child.returncode is not None or time.monotonic() > deadline:
                raise NotReady(f"{name} does not become ready:\n{running.child.tail(30)}")
            time.sleep(_POLL_INTERVAL_SECONDS)
        return running

    def warm(self, worker: RunningProgram) -> None:
        """Waits until the mirror takes claims."""
        self.until(lambda: b'"mirror":"warm"' in _body(f"{worker.url}/health/ready"), "a warm mirror")

    def until(self, condition: Callable[[], object], what: str, timeout_seconds: float = 120.0) -> None:
        """Waits until `condition` is true. Raises RuntimeError, which names `what`, after the time limit."""
        if not self.reached(condition, timeout_seconds):
            raise RuntimeError(f"waited {timeout_seconds:.0f} s for {what}")

    def reached(self, condition: Callable[[], object], timeout_seconds: float) -> bool:
        """Returns whether `condition` became true within the time limit."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_INTERVAL_SECONDS)
        return True

    @contextlib.contextmanager
    def rail(self, **settings: object) -> Iterator[tuple[RunningProgram, RunningProgram]]:
        """Runs the rail, with a warm mirror and all menus loaded. Yields (orders, worker) and stops both."""
        worker = self.service("worker")
        orders = self.service("orders", wait=True, **settings)
        try:
            self.warm(worker)
            yield orders, worker
        finally:
            for one in (orders, worker):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.thaw()
                one.stop()

    # -- data --------------------------------------------------------------------------------------------------

    def make_database(self, name: str) -> str:
        """Creates a database for a peer and returns its URL, with the owner's role."""
        run(_execute(self.postgres.superuser_url, f"create database {name} owner ticketrail_owner"))
        return self.database_url("owner", name)

    def depth(self, lane: Lane = Lane.CRITICAL) -> int:
        """Returns the number of messages in the queue of a lane.

        It asks the queue itself, because the management API is seconds behind.
        """

        async def ask_the_queue() -> int:
            async with await aio_pika.connect(self.rabbitmq_url) as connection:
                queue = await (await connection.channel()).declare_queue(lane_queue(lane), passive=True)
                return queue.declaration_result.message_count or 0

        return run(ask_the_queue())

    def drain(self, worker: RunningProgram) -> None:
        """Lets a frozen worker write what is in the lanes, because the changes of one burst would cost the next one
        memory and disk. Then freezes it again. To purge the lanes would not do: the ledger sends again what only the
        log has."""
        worker.thaw()
        self.until(lambda: self.depth() == 0, "an empty lane")
        worker.freeze()

    def purge(self) -> None:
        """Empties the lanes of the messages of an earlier run."""
        for lane in Lane:
            ask(self.management_url, "DELETE", f"/api/queues/%2F/{lane_queue(lane)}/contents")

    def wait_until_idle(self, timeout_seconds: float = 6.0) -> None:
        """Waits until the machine is idle or the time is over.

        After a question the servers still write checkpoints, log segments and compacted files, which would slow down
        the next question.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and psutil.cpu_percent(interval=0.5) > _MAX_IDLE_CPU_PERCENT:
            pass

    def count_orders(self) -> int:
        return int(run(fetch_value(self.database_url("writer"), "select count(*) from orders")))


def run(work: Awaitable[T]) -> T:
    async def whole() -> T:
        return await work

    return asyncio.run(whole())


def cpu_seconds(pid: int | None) -> float:
    """Returns the CPU seconds, user and system, that a process and its children have used so far."""
    total = 0.0
    for process in _tree(pid or 0):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_SECONDS) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _body(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_SECONDS) as reply:  # noqa: S310
            return bytes(reply.read())
    except urllib.error.HTTPError as error:
        return error.read()
    except OSError:
        return b""


def execute(url: str, statement: str) -> None:
    run(_execute(url, statement))


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def fetch_value(url: str, query: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()
