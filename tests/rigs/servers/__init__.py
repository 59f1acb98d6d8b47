"""The servers of a test run: RabbitMQ, PostgreSQL and Redis. They start once, and their data is removed after the run.

One interface for two kinds of servers, chosen by TICKETRAIL_TEST_SERVERS: `containers` or `processes`. The default is
containers if a Docker engine answers, else processes (missing packages are installed). For both, `kill` is kill -9,
`freeze` stops every process without closing a connection, and a restarted server keeps its address and its data.

Every call but `Redis.command` blocks until it is done. An async test calls
`await asyncio.to_thread(servers.postgres.stop)`, so that its event loop continues.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import quote

import redis.asyncio

from deploy.local import database
from deploy.local.servers import PASSWORD
from shared.messaging.management import ask


class Lifecycle(Protocol):
    """The operations of a server of either kind. `start` returns when the server answers."""

    def start(self) -> None: ...
    def stop(self) -> object: ...
    def kill(self) -> object: ...
    def freeze(self) -> object: ...
    def thaw(self) -> object: ...
    def discard(self) -> None:
        """Ends the server and removes its data, as fast as possible."""


class Server:
    def __init__(self, lifecycle: Lifecycle) -> None:
        self.start = lifecycle.start
        self.stop = lifecycle.stop
        self.kill = lifecycle.kill
        self.freeze = lifecycle.freeze
        self.thaw = lifecycle.thaw
        self.discard = lifecycle.discard


class RabbitMQ(Server):
    def __init__(self, lifecycle: Lifecycle, port: int, management_port: int) -> None:
        super().__init__(lifecycle)
        self.port = port
        self.management_url = f"http://ticketrail:{PASSWORD}@127.0.0.1:{management_port}"
        self.url = self.vhost_url("/")

    def vhost_url(self, name: str) -> str:
        path = "" if name == "/" else quote(name, safe="")
        return f"amqp://ticketrail:{PASSWORD}@127.0.0.1:{self.port}/{path}"

    def make_vhost(self, name: str) -> str:
        """Makes an empty vhost; returns its URL."""
        ask(self.management_url, "PUT", f"/api/vhosts/{quote(name, safe='')}", {})
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        ask(self.management_url, "PUT", f"/api/permissions/{quote(name, safe='')}/ticketrail", everything)
        return self.vhost_url(name)

    def delete_vhost(self, name: str) -> None:
        ask(self.management_url, "DELETE", f"/api/vhosts/{quote(name, safe='')}", timeout=60)


class PostgreSQL(Server):
    def __init__(self, lifecycle: Lifecycle, port: int) -> None:
        super().__init__(lifecycle)
        self.port = port
        self.superuser_url = f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres"

    def url(self, role: str = "ticketrail_owner", database: str = "ticketrail") -> str:
        return f"postgresql://{role}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def make_database(self, name: str, template: str | None = None) -> str:
        """Makes a database of ticketrail_owner, empty or as a copy of `template` (which must have no connections);
        returns the owner's URL."""
        copy = f' template "{template}"' if template else ""
        database.run_sql(self.superuser_url, f'create database "{name}" owner ticketrail_owner{copy}')
        return self.url(database=name)

    def drop_database(self, name: str) -> None:
        """Drops a database and closes the connections to it."""
        database.run_sql(self.superuser_url, f'drop database if exists "{name}" with (force)')


class Redis(Server):
    def __init__(self, lifecycle: Lifecycle, port: int) -> None:
        super().__init__(lifecycle)
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"

    async def command(self, *command: str | bytes | float) -> Any:
        """Sends one command on a connection of its own. Returns the reply as redis-py decodes it."""
        async with redis.asyncio.from_url(self.url) as client:
            return await client.execute_command(*command)


class Servers:
    def __init__(
        self,
        rabbitmq: RabbitMQ,
        postgres: PostgreSQL,
        redis: Redis,
        *,
        another_redis: Callable[[], Redis],
        clean: Callable[[], None],
    ) -> None:
        self.rabbitmq = rabbitmq
        self.postgres = postgres
        self.redis = redis
        self._another_redis = another_redis
        self._clean = clean
        self._extra: list[Server] = []

    @property
    def _all(self) -> list[Server]:
        return [self.rabbitmq, self.postgres, self.redis, *self._extra]

    def start_all(self) -> None:
        """Starts all servers concurrently. If one fails, ends the others and raises the first error."""
        with ThreadPoolExecutor() as threads:
            started = [threads.submit(server.start) for server in self._all]
        errors = [error for each in started if (error := each.exception())]
        if errors:
            self.stop_all()
            raise errors[0]

    def stop_all(self) -> None:
        """Ends all servers and removes their data. It may be called twice, or without a start."""
        with ThreadPoolExecutor() as threads:
            ended = [threads.submit(server.discard) for server in self._all]
        self._extra.clear()
        self._clean()
        for each in ended:
            each.result()

    def extra_redis(self) -> Redis:
        """Starts another Redis for a test that kills or wipes it; `discard` it, or leave that to `stop_all`."""
        redis = self._another_redis()
        self._extra.append(redis)
        redis.start()
        return redis


def prepare_servers() -> Servers:
    """Returns the servers of this run, which are not started yet."""
    from tests.rigs.servers import containers, processes

    way = os.environ.get("TICKETRAIL_TEST_SERVERS") or ("containers" if containers.engine_answers() else "processes")
    ways = {"containers": containers.prepare, "processes": processes.prepare}
    if way not in ways:
        raise ValueError(f"TICKETRAIL_TEST_SERVERS must be containers or processes, not {way}")
    return ways[way]()
