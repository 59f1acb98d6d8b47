"""A whole system for tests: a database and a vhost on the servers of the run, and real service processes. A test can
start, stop, kill and freeze each process."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen
from uuid import uuid4

import asyncpg
import httpx

from deploy.local.child import Child
from deploy.local.port_check import find_free
from shared.messaging.management import ask
from shared.messaging.publisher import Publisher
from shared.rail.assemble import publisher_of
from shared.settings import Settings
from tests.rigs import zygote
from tests.rigs.http_client import http_client
from tests.rigs.servers import Redis, Servers

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {
    "orders": ["services.orders"],
    "worker": ["services.sync", "worker"],
    "sync": ["services.sync", "api"],
    "notifier": ["services.notifier"],
}
# Settings for tests that stop no server. With the default settings, a machine that stalls for a second leads to another
# outcome that is correct but not expected, such as a 504 or an order number of the instance's own series.
PATIENT = {
    "heartbeat_interval_seconds": 1.0,  # a log reader tests its connection after three intervals without a message
    "redis_timeout_seconds": 3.0,
    "claim_timeout_seconds": 5.0,
    "reveal_timeout_seconds": 5.0,
    "publish_timeout_seconds": 5.0,
    "database_timeout_seconds": 15.0,
}
T = TypeVar("T")


# A short wait ends without delay. A long one asks less often, because every look costs the servers time too.
_FIRST_LOOK_PAUSE_SECONDS = 0.01
_MAX_LOOK_PAUSE_SECONDS = 0.1


async def eventually(
    look: Callable[[], Awaitable[T]], *, within: float = 60.0, what: str = "", until: Callable[[T], bool] = bool
) -> T:
    """Calls `look` until `until` accepts its result, and returns the result. After `within` seconds it raises an
    AssertionError with the last result. The time is far more than a good run needs, because a machine that stalls must
    not look like a defect."""
    deadline = time.monotonic() + within
    pause = _FIRST_LOOK_PAUSE_SECONDS
    while True:
        # The time is read before the call, so that the last call starts after the deadline.
        late = time.monotonic() > deadline
        seen: object
        try:
            found = seen = await look()
            if until(found):
                return found
        except (httpx.HTTPError, asyncpg.PostgresError, OSError, AssertionError) as error:
            seen = error
        if late:
            raise AssertionError(f"not within {within} s: {what or look}; last seen: {seen!r}")
        await asyncio.sleep(pause)
        pause = min(pause * 1.3, _MAX_LOOK_PAUSE_SECONDS)


class System:
    def __init__(self, servers: Servers, directory: Path, *, redis: Redis | None = None, **settings: object) -> None:
        """`settings` are TICKETRAIL_* settings in lower case. A test that stops Redis passes a server of its own as
        `redis`."""
        self.servers = servers
        self.directory = directory
        self.redis = redis or servers.redis
        self.root = ROOT
        """The folder whose code runs; a test may set a copy of the repository."""
        self.roots: dict[str, Path] = {}
        """Service or alias -> the folder whose code it runs, if it is not `root`."""
        self.environments: dict[str, dict[str, str]] = {}
        """Service or alias -> more variables of its environment."""
        self.name = f"t{uuid4().hex[:10]}"
        ports = find_free(4)
        self.ports = dict(zip(SERVICES, ports, strict=True))
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        self.rabbitmq_url = servers.rabbitmq.make_vhost(self.name)
        servers.postgres.make_database(self.name)
        chosen = {
            "home": directory,
            "orders_port": self.ports["orders"],
            "worker_port": self.ports["worker"],
            "sync_port": self.ports["sync"],
            "notifier_port": self.ports["notifier"],
            "rabbitmq_url": self.rabbitmq_url,
            "rabbitmq_management_url": servers.rabbitmq.management_url,
            "rabbitmq_watcher_url": servers.rabbitmq.management_url.replace("ticketrail:", "ticketrail_watcher:", 1),
            "redis_url": self.redis.url,
            "database_url": self.database_url("ticketrail_owner"),
            "database_writer_url": self.database_url("ticketrail_writer"),
            "database_api_url": self.database_url("ticketrail_api"),
            "database_ops_url": self.database_url("ticketrail_ops"),
            "jwt_secret": "a-secret-for-tests-that-is-long-enough",
            # All tests come from one address, so the limits of an address must not apply.
            "sign_in_failures_per_address": 100_000,
            "account_changes_per_address": 100_000,
            "api_key_failures_per_prefix_and_address": 100_000,
            "api_key_failures_per_address": 100_000,
            # Tests of other things place all orders of guests in one session.
            "guest_orders_per_minute": 100_000,
            "heartbeat_interval_seconds": 0.3,
            "retry_steps_ms": "[50,100,200]",
            "mirror_settle_seconds": 1.0,
            "change_log_segment_bytes": 1_000_000,
            "trace_sample": 0.1,  # the default of production; keeping every trace would slow load tests
            **settings,
        }
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("TICKETRAIL_")},
            **{f"TICKETRAIL_{key.upper()}": str(value) for key, value in chosen.items()},
        }
        self.children: dict[str, Child] = {}
        self.demo: dict[str, Any] = {}

    def database_url(self, role: str) -> str:
        return self.servers.postgres.url(role, self.name)

    # -- start and stop
    # --------------------------------------------------------------------------------------------------

    async def up(self, *names: str) -> None:
        """Migrates and calls `start_and_seed`."""
        await self.cli("migrate")
        await self.start_and_seed(*names)

    async def start_and_seed(self, *names: str) -> None:
        """Starts the services (all by default) and seeds. Waits until all services are ready and the mirror is warm."""
        for name in names or SERVICES:
            self.start(name)
        for name in names or SERVICES:
            await self.ready(name)
        self.demo = json.loads(await self.cli("seed", "--json"))
        if "worker" in self.children and "orders" in self.children:
            await eventually(self.warm, what="a warm mirror", until=lambda state: state == "warm")
        if "orders" in self.children:
            await eventually(self.can_price, what="an orders service that knows the menu")

    async def can_price(self) -> bool:
        """Returns True if the orders service knows the dish. The menu arrives by events. The service checks the
        discount of an order only if it knows the dish."""
        async with self.client() as client:
            answer = await client.post(
                "/api/orders",
                json={"items": [{"menu_item_id": self.dish(-1), "quantity": 1}], "discount_amount": 10**10},
            )
        return bool(answer.json()["error"]["code"] == "discount_above_subtotal")

    def start(self, name: str, *, alias: str | None = None, **settings: object) -> None:
        """Starts a service. A second instance needs an `alias` and `settings` of its own."""
        env = {**self.env, **{f"TICKETRAIL_{key.upper()}": str(value) for key, value in settings.items()}}
        known_as = alias or name
        env |= self.environments.get(known_as, {})
        log = self.directory / f"{known_as}.log"
        self.children[known_as] = zygote.spawn(
            SERVICES[name], log=log, env=env, cwd=self.roots.get(known_as, self.root)
        )

    @asynccontextmanager
    async def another_orders(self, alias: str, **settings: object) -> AsyncIterator[str]:
        """Starts another orders instance with `settings`, which trusts a local proxy, for the block; yields its URL."""
        (port,) = find_free(1)
        self.urls[alias] = f"http://127.0.0.1:{port}"
        proxies = {"trusted_proxies": "127.0.0.1"}
        self.start("orders", alias=alias, instance="auto", orders_port=port, **{**proxies, **settings})
        try:
            await self.ready(alias)
            yield self.urls[alias]
        finally:
            await self.stop(alias)

    async def ready(self, name: str, *, within: float = 120.0) -> None:
        async def look() -> int:
            async with http_client() as client:
                return (await client.get(f"{self.urls[name]}/health/ready")).status_code

        try:
            await eventually(look, within=within, what=f"{name} ready", until=lambda status: status == 200)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.children[name].tail(30)}") from None

    def health(self, name: str) -> dict[str, Any]:
        """Returns the details of a service's readiness reply, even if it is not ready."""
        try:
            reply = urlopen(f"{self.urls[name]}/health/ready", timeout=10)
        except HTTPError as error:
            reply = error
        with reply:
            found: dict[str, Any] = json.load(reply)
        return found

    async def warm(self) -> str:
        async with http_client() as client:
            details = (await client.get(f"{self.urls['worker']}/health/ready")).json()
        return str(details.get("mirror"))

    @asynccontextmanager
    async def frozen(self, name: str) -> AsyncIterator[None]:
        """Freezes a service for the block."""
        child = self.children[name]
        await asyncio.to_thread(child.freeze)
        try:
            yield
        finally:
            await asyncio.to_thread(child.thaw)

    def kill(self, name: str) -> None:
        self.children.pop(name).kill()

    async def stop(self, name: str, *, within: float = 12.0) -> bool:
        """Sends SIGTERM; returns True if the service ended within `within` seconds."""
        return await asyncio.to_thread(self.children.pop(name).terminate, within)

    async def down(self) -> None:
        await asyncio.gather(*(self.stop(name) for name in list(self.children)))
        await asyncio.to_thread(self.servers.rabbitmq.delete_vhost, self.name)
        await asyncio.to_thread(self.servers.postgres.drop_database, self.name)

    async def cli(self, *arguments: str, check: bool = True) -> str:
        code, out, err = await self.command(*arguments)
        assert not check or code == 0, err
        return out

    async def command(self, *arguments: str) -> tuple[int, str, str]:
        """Runs `ticketrail ARGUMENTS`; returns (exit code, stdout, stderr)."""
        command = ["services.sync.cli", *arguments]
        return await asyncio.to_thread(zygote.run, command, env=self.env, cwd=self.root)

    # -- use ---------------------------------------------------------------------------------------------------

    def token(self, role: str = "staff") -> str:
        return str(self.demo["tokens"][role])

    def dish(self, place: int = 0) -> str:
        return str(self.demo["menu_item_ids"][place])

    @property
    def restaurant_id(self) -> str:
        return str(self.demo["restaurant_id"])

    def client(self, role: str = "staff", *, service: str = "orders", token: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {token or self.token(role)}"}
        return http_client(base_url=self.urls[service], headers=headers, timeout=10.0)

    def order_body(self, **fields: Any) -> dict[str, Any]:
        return {"items": [{"menu_item_id": self.dish(), "quantity": 2}], **fields}

    @asynccontextmanager
    async def database(self, role: str = "ticketrail_writer") -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
        connection = await asyncpg.connect(self.database_url(role))
        try:
            yield connection
        finally:
            await connection.close()

    async def stored_orders(self) -> dict[str, int]:
        """Returns the version of each order in PostgreSQL, by order id."""
        async with self.database() as connection:
            return {row["id"]: row["version"] for row in await connection.fetch("select id::text, version from orders")}

    def depths(self) -> dict[str, int]:
        """Returns the number of messages in each queue. The management API is seconds behind."""
        queues: Any = ask(self.servers.rabbitmq.management_url, "GET", f"/api/queues/{self.name}?columns=name,messages")
        return {queue["name"]: queue.get("messages", 0) for queue in queues}


def settings_of(system: System, **fields: Any) -> Settings:
    """Returns the settings of the system's processes; `fields` override them."""
    chosen = {
        name.removeprefix("TICKETRAIL_").lower(): text for name, text in system.env.items() if "TICKETRAIL" in name
    }
    chosen["retry_steps_ms"] = json.loads(chosen["retry_steps_ms"])
    return Settings(_env_file=None, **{**chosen, **fields})


@asynccontextmanager
async def publisher_to(system: System, *, timeout_seconds: float = 5.0) -> AsyncIterator[Publisher]:
    """Publishes to the system's broker, as another instance would."""
    publisher = publisher_of(settings_of(system, publish_timeout_seconds=timeout_seconds))
    await publisher.start(wait=10)
    try:
        yield publisher
    finally:
        await publisher.stop()
