"""The servers of one test run: RabbitMQ, PostgreSQL and Redis, started once, with data that ends with the run.

One interface over two ways, chosen by TICKETRAIL_TEST_SERVERS: `containers` or `processes`; by default containers where
a Docker engine answers, else processes (whose packages are installed when missing). On both ways `kill` is kill -9,
`freeze` stops every process without closing a connection, and a server started again has its address and its data.

All calls block until done; in an async test, `await asyncio.to_thread(servers.postgres.stop)` keeps the loop turning.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol
from urllib.parse import quote

from deploy.local import database
from deploy.local.servers import PASSWORD
from shared.messaging.management import ask


class Lifecycle(Protocol):
    """What a way of running servers offers for each. `start` returns when the server answers."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def discard(self) -> None:
        """End it with its data, as fast as possible."""


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
        """A vhost with nothing declared in it; returns its URL."""
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
        """A database of ticketrail_owner, empty or a copy of `template` (to which nobody may be connected); returns
        the owner's URL."""
        copy = f' template "{template}"' if template else ""
        database.run_sql(self.superuser_url, f'create database "{name}" owner ticketrail_owner{copy}')
        return self.url(database=name)

    def drop_database(self, name: str) -> None:
        """Whoever is still connected is thrown out."""
        database.run_sql(self.superuser_url, f'drop database if exists "{name}" with (force)')


class Redis(Server):
    def __init__(self, lifecycle: Lifecycle, port: int) -> None:
        super().__init__(lifecycle)
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"


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
        """All at once. When one fails, the others are ended again and the first error is raised."""
        with ThreadPoolExecutor() as threads:
            started = [threads.submit(server.start) for server in self._all]
        errors = [error for each in started if (error := each.exception())]
        if errors:
            self.stop_all()
            raise errors[0]

    def stop_all(self) -> None:
        """End them with their data. May be called twice, or without a start."""
        with ThreadPoolExecutor() as threads:
            ended = [threads.submit(server.discard) for server in self._all]
        self._extra.clear()
        self._clean()
        for each in ended:
            each.result()

    def extra_redis(self) -> Redis:
        """One more Redis, started, for a test that kills or wipes it; `discard` it, or leave that to stop_all."""
        redis = self._another_redis()
        self._extra.append(redis)
        redis.start()
        return redis


def prepare_servers() -> Servers:
    """The servers of this run, not yet started."""
    from tests.rigs.servers import containers, processes

    way = os.environ.get("TICKETRAIL_TEST_SERVERS") or ("containers" if containers.engine_answers() else "processes")
    ways = {"containers": containers.prepare, "processes": processes.prepare}
    if way not in ways:
        raise ValueError(f"TICKETRAIL_TEST_SERVERS={way}: it is containers or processes")
    return ways[way]()
