"""Starts the peers of the accept benchmark, each with its own database."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from uuid import uuid4

import aio_pika
from redis import Redis

from benchmarks.load import ProgramMissing, peer_path
from benchmarks.peers import dual_write
from benchmarks.peers.node import install_packages
from benchmarks.peers.transaction import SCHEMA
from benchmarks.rig import ROOT, BenchmarkRig, NotReady, RunningProgram, execute, fetch_value, run
from deploy.local.child import Child
from deploy.local.port_check import find_free
from shared.messaging import declare
from shared.messaging.management import ask
from shared.messaging.topology import CHANGES
from shared.settings import Settings

_DATABASE = "bench_dual_write"
_VHOST = "bench_dual_write"
_REDIS_DATABASE = 1
"""Database 0 is the mirror of the rail."""
_STOP_TIMEOUT_SECONDS = 5.0


class PushScreen:
    """A process that subscribes to the event stream of every restaurant and counts the orders it sees."""

    def __init__(self, rig: BenchmarkRig, notifier: RunningProgram) -> None:
        """Starts the process and waits until it is connected."""
        name = f"screen-{uuid4().hex[:8]}"
        self._count_file = rig.folder / name
        tokens = rig.folder / "tokens.json"
        tokens.write_text(json.dumps([one.token for one in rig.restaurants]))
        self._child = Child.spawn(
            [sys.executable, "-m", "benchmarks.screen", notifier.url, tokens, self._count_file],
            log=rig.folder / "logs" / f"{name}.log",
            env=dict(os.environ),
            cwd=ROOT,
        )
        self.last_count = 0
        """The number that `seen` returned last."""
        rig.until(self._count_file.exists, "the screen to be connected")

    def seen(self) -> int:
        if self._child.returncode is not None:
            raise RuntimeError(f"the screen process ended:\n{self._child.tail()}")
        self.last_count = int(self._count_file.read_text() or 0)
        return self.last_count

    def close(self) -> None:
        self._child.terminate(_STOP_TIMEOUT_SECONDS)


class DualWrite:
    """Runs the dual write (peers/dual_write.py).

    Its exchange and its stream are in a separate virtual host, so that the rail's worker never reads its orders.
    """

    label = "dual write"

    def __init__(self, rig: BenchmarkRig) -> None:
        self._rig = rig
        self._redis_url = f"{rig.redis_url.rpartition('/')[0]}/{_REDIS_DATABASE}"
        self._rabbitmq_url = f"{rig.rabbitmq_url}{_VHOST}"
        self._make_stream()
        (port,) = find_free(1)
        env = {
            **_environment(rig, port, rig.make_database(_DATABASE)),
            "BENCH_REDIS_URL": self._redis_url,
            "BENCH_RABBITMQ_URL": self._rabbitmq_url,
        }
        self.program = rig.program([sys.executable, "-m", "benchmarks.peers.dual_write"], env, port, name="dual_write")

    def _make_stream(self) -> None:
        management = self._rig.management_url
        ask(management, "PUT", f"/api/vhosts/{_VHOST}")
        all_permissions = {"configure": ".*", "write": ".*", "read": ".*"}
        ask(management, "PUT", f"/api/permissions/{_VHOST}/ticketrail", all_permissions)
        run(declare_stream(self._rabbitmq_url))

    @contextlib.contextmanager
    def open_screen(self) -> Iterator[PushScreen]:
        """Runs a notifier that follows the stream of the dual write, and yields a screen that subscribes to it."""
        notifier = self._rig.service("notifier", rabbitmq_url=self._rabbitmq_url)
        screen = PushScreen(self._rig, notifier)
        try:
            yield screen
        finally:
            screen.close()
            notifier.stop()

    def count_orders(self) -> int:
        return int(run(fetch_value(self._rig.database_url("owner", _DATABASE), "select count(*) from orders")))

    def count_in_mirror(self) -> int:
        """Returns the number of orders in the lists of live orders that the dual write keeps in Redis."""
        with Redis.from_url(self._redis_url) as redis:
            return sum(int(redis.zcard(dual_write.live_key(one.id))) for one in self._rig.restaurants)

    def stop(self) -> None:
        """Stops the program and removes its data from Redis and RabbitMQ, which the next questions use too."""
        self.program.stop()
        with Redis.from_url(self._redis_url) as redis:
            redis.flushdb()
        ask(self._rig.management_url, "DELETE", f"/api/vhosts/{_VHOST}")


async def declare_stream(rabbitmq_url: str) -> None:
    """Declares the exchange of the changes and the change log in a virtual host without lanes."""
    async with await declare.connect(rabbitmq_url) as connection:
        async with connection.channel() as channel:
            await channel.declare_exchange(CHANGES, aio_pika.ExchangeType.DIRECT, durable=True)
        await declare.declare_logs(connection, Settings(_env_file=None))


def direct_peer(rig: BenchmarkRig) -> RunningProgram:
    (port,) = find_free(1)
    env = _environment(rig, port, rig.make_database("bench_direct"))
    return rig.program([sys.executable, "-m", "benchmarks.peers.direct"], env, port, name="direct")


def express_peer(rig: BenchmarkRig) -> RunningProgram:
    """Starts Express with the tables of the direct peer in a separate database. Raises ProgramMissing without Node."""
    folder = peer_path("express")
    node = install_packages(folder)
    (port,) = find_free(1)
    url = rig.make_database("bench_express")
    execute(url, SCHEMA)
    env = {**_environment(rig, port, url), "NODE_ENV": "production"}
    try:
        return rig.program([node, "server.js"], env, port, name="express", cwd=folder)
    except NotReady as error:
        raise ProgramMissing(f"Express does not start: {error}") from error


def _environment(rig: BenchmarkRig, port: int, database_url: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")},
        "BENCH_PORT": str(port),
        "BENCH_DATABASE_URL": database_url,
        "BENCH_RESTAURANTS": str(rig.restaurants_file),
    }
