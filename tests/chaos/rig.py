"""The system under test: its own local servers behind proxies, two instances of the orders service, and a file system
for its journals, logs and traces that a fault can fill. `begin` starts a fault and `end` ends it."""

import asyncio
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis.asyncio

from deploy.local.child import Child
from deploy.local.port_check import find_free
from tests.chaos.schedule import SERVERS, WITH_CLOCK, Fault, Kind
from tests.rigs.database_failover import DatabaseFailover
from tests.rigs.fake_clock import FakeClock
from tests.rigs.http_client import http_client
from tests.rigs.mirror_pair import MirrorPair
from tests.rigs.power_cut import PowerCut
from tests.rigs.previous_release import NoHistory, write_previous_release
from tests.rigs.proxy import FOUR_MBIT, Mode, Proxy
from tests.rigs.servers import Server, Servers
from tests.rigs.servers.processes import folder_of
from tests.rigs.system import System, eventually

_DISK_SIZE = "128m"
_COPY_INTERVAL_SECONDS = 2.5
COPY_AGE_SECONDS = 10.0
_UNREPLICATED_SECONDS = 1.0


class ChaosRig:
    def __init__(self, servers: Servers, folder: Path, **settings: Any) -> None:
        self.servers = servers
        self.folder = folder
        # The tokens of the load must not expire on a host whose clock is hours ahead.
        self._settings = {"access_token_ttl_seconds": 86_400, **settings}
        self.proxies: dict[str, Proxy] = {}
        self.system: System
        self.mirror: MirrorPair
        self._standby: DatabaseFailover
        self._power_cut: PowerCut
        self.other_restaurant: dict[str, Any] = {}
        """A second restaurant: `id`, `token`, `dish`."""
        self._more: dict[str, dict[str, object]] = {}
        self._copies: list[tuple[float, Path]] = []
        # Threads make, use and remove copies. Without the lock, a rollback could use a copy that is half made or
        # removed.
        self._copies_lock = threading.Lock()
        self._copying: asyncio.Task[None] | None = None
        self.restarted: Counter[str] = Counter()
        """Service -> how often it was restarted because it ended by itself."""
        self._clocks: dict[str, FakeClock] = {}
        self.disk: Path | None = None
        """The file system of the services; None if this user may not mount one."""
        self.previous: Path | None = None
        """The tree of the previous release; None if the history lacks it. Then the fault restarts a service only."""

    # -- start and stop ----------------------------------------------------------------------------------------

    async def up(self) -> None:
        ports = {
            "postgres": self.servers.postgres.port,
            "rabbitmq": self.servers.rabbitmq.port,
        }
        for name, port in ports.items():
            self.proxies[name] = Proxy(port)
            await self.proxies[name].start()
        self._standby = DatabaseFailover(self.servers, self.proxies["postgres"])
        self._power_cut = PowerCut(self.servers, self._new_folder("power-cut"))
        self.mirror = MirrorPair(self.servers, self.proxies)
        await self.mirror.start()
        try:
            self.previous = await asyncio.to_thread(write_previous_release, self._new_folder("previous-release"))
        except NoHistory as error:
            print(f"no previous release: {error}", flush=True)
        home = self.folder / "home"
        self._mount(home)
        plain = System(self.servers, home, **self._settings)
        databases = {
            name: self._through_proxy("postgres", plain.database_url(role))
            for name, role in (
                ("database_url", "ticketrail_owner"),
                ("database_writer_url", "ticketrail_writer"),
                ("database_api_url", "ticketrail_api"),
                ("database_ops_url", "ticketrail_ops"),
            )
        }
        proxied = {
            **databases,
            "redis_url": self.mirror.through_proxies(),
            "rabbitmq_url": self._through_proxy("rabbitmq", plain.rabbitmq_url),
        }
        self.system = plain
        plain.env |= {f"TICKETRAIL_{name.upper()}": url for name, url in proxied.items()}
        for name in WITH_CLOCK:
            self._clocks[name] = FakeClock(self.folder / f"clock-of-{name}")
            plain.environments[name] = self._clocks[name].environment
        await plain.up()
        await self.add("second-orders", 2)
        await self._register_other_restaurant()
        self._copying = asyncio.create_task(self._copy_periodically())

    async def add(self, name: str, instance: int) -> None:
        """Starts another instance of a service, such as `third-worker`, and waits until it is ready."""
        (port,) = find_free(1)
        self.system.urls[name] = f"http://127.0.0.1:{port}"
        self._more[name] = {"instance": instance, f"{name.rpartition('-')[2]}_port": port}
        self._start(name)
        await self.system.ready(name)

    async def down(self) -> None:
        if self._copying is not None:
            self._copying.cancel()
            await asyncio.gather(self._copying, return_exceptions=True)
        for child in self.system.children.values():
            child.thaw()
        await asyncio.gather(*(self.system.stop(name) for name in list(self.system.children)))
        for proxy in self.proxies.values():
            await proxy.stop()
        await self.mirror.stop()
        if self.disk is not None:
            await asyncio.to_thread(self._unmount, self.disk)

    def _new_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    def _mount(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={_DISK_SIZE}", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        self.disk = folder if mounted.returncode == 0 else None

    def _unmount(self, disk: Path) -> None:
        """Keeps the logs, which people read after a run."""
        for log in disk.glob("*.log"):
            shutil.copy(log, self.folder)
        subprocess.run(["umount", "-l", str(disk)], check=False)

    def _through_proxy(self, name: str, url: str) -> str:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        address = f"{host.partition(':')[0]}:{self.proxies[name].port}"
        return urlunsplit(parts._replace(netloc=f"{user}@{address}" if user else address))

    async def _register_other_restaurant(self) -> None:
        async with http_client(base_url=self.system.urls["orders"], timeout=10) as client:
            made = await client.post(
                "/api/auth/register-restaurant",
                json={
                    "name": "Beside",
                    "slug": f"beside-{self.system.name}",
                    "email": f"{self.system.name}@beside.example",
                    "password": "a long password that is hard to guess",
                },
            )
            data = made.json()["data"]
            token = data["session"]["access_token"]
            dish = await client.post(
                "/api/menu",
                json={"name": "Soup", "price": 500, "category": "Mains"},
                headers={"Authorization": f"Bearer {token}"},
            )
        self.other_restaurant = {
            "id": data["restaurant"]["id"],
            "token": token,
            "dish": dish.json()["data"]["id"],
        }

    # -- faults ------------------------------------------------------------------------------------------------

    async def begin(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL if fault.target in SERVERS:
                await asyncio.to_thread(self._server(fault.target).kill)
            case Kind.KILL:
                await asyncio.to_thread(self.system.children[fault.target].kill)
            case Kind.FREEZE:
                await asyncio.to_thread(self._target(fault.target).freeze)
            case Kind.SLOW:
                self.proxies[fault.target].set(Mode.FORWARD, delay=0.05)
            case Kind.NARROW:
                self.proxies[fault.target].set(Mode.FORWARD, bandwidth=FOUR_MBIT)
            case Kind.STALL:
                self.proxies[fault.target].set(Mode.STALL)
            case Kind.LOSE:
                self.proxies[fault.target].set(Mode.LOSE)
            case Kind.WIPE:
                await self._wipe()
            case Kind.ROLL_BACK:
                await asyncio.to_thread(self._with_copies_locked, self._roll_back)
            case Kind.MIRROR_FAILOVER:
                self.mirror.stall()
            case Kind.DATABASE_FAILOVER:
                await self._standby.begin()
            case Kind.POWER_CUT:
                await asyncio.to_thread(self._with_copies_locked, self._power_cut.copy)
            case Kind.MIRROR_FAILBACK:
                await self.mirror.switch_over(lost_seconds=_UNREPLICATED_SECONDS)
            case Kind.DISK_FULL:
                self._fill_disk(fault)
                self.proxies["rabbitmq"].set(Mode.REFUSE)
            case Kind.HOST_FULL:
                self._fill_disk(fault)
            case Kind.OLD_RELEASE:
                await self._replace(fault.target, self.previous)
            case Kind.CLOCK:
                self._clocks[fault.target].set_ahead(fault.hours * 3600)

    async def end(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL if fault.target in SERVERS:
                await asyncio.to_thread(self._server(fault.target).start)
            case Kind.KILL:
                self._start(fault.target)
            case Kind.FREEZE:
                await asyncio.to_thread(self._target(fault.target).thaw)
            case Kind.SLOW | Kind.NARROW | Kind.STALL | Kind.LOSE:
                self.proxies[fault.target].set(Mode.FORWARD)
            case Kind.ROLL_BACK:
                await asyncio.to_thread(self._server("redis").start)
            case Kind.MIRROR_FAILOVER:
                await self.mirror.fail_over()
                await asyncio.to_thread(self.mirror.replica.start)
                await self.mirror.replicate()
            case Kind.MIRROR_FAILBACK:
                await self.mirror.switch_over(lost_seconds=_UNREPLICATED_SECONDS)
            case Kind.DATABASE_FAILOVER:
                await self._standby.fail_over()
            case Kind.POWER_CUT:
                await asyncio.to_thread(self._with_copies_locked, self._power_cut.cut)
                await asyncio.to_thread(self._power_cut.return_power)
            case Kind.DISK_FULL:
                self._filler(fault).unlink(missing_ok=True)
                self.proxies["rabbitmq"].set(Mode.FORWARD)
            case Kind.HOST_FULL:
                self._filler(fault).unlink(missing_ok=True)
            case Kind.OLD_RELEASE:
                await self._replace(fault.target, None)
            case Kind.CLOCK:
                self._clocks[fault.target].set_ahead(0)
            case Kind.WIPE:
                pass

    def restart_ended(self, *, except_for: Container[str] = ()) -> None:
        """Restarts services that ended by themselves, like a supervisor. Leaves those in `except_for` down: a fault
        stopped them."""
        for name, child in list(self.system.children.items()):
            if name not in except_for and child.returncode is not None:  # the fault's thread waits for the others
                self.restarted[name] += 1
                self._start(name)

    async def all_ready(self) -> None:
        for name in self.system.children:
            await self.system.ready(name, within=90.0)
        await eventually(self.system.warm, within=60.0, what="a warm mirror", until=lambda state: state == "warm")

    async def _replace(self, name: str, root: Path | None) -> None:
        """Stops a service and starts it from another tree, or from this one."""
        await self.system.stop(name)
        self.system.roots[name] = root or self.system.root
        self._start(name)

    def _start(self, name: str) -> None:
        self.system.start(name.rpartition("-")[2], alias=name, **self._more.get(name, {}))

    def _server(self, name: str) -> Server:
        found: Server = getattr(self.servers, name)
        return found

    def _target(self, name: str) -> Server | Child:
        return self._server(name) if name in SERVERS else self.system.children[name]

    # -- wiping and rolling back the mirror ---------------------------------------------------------------------

    async def _wipe(self) -> None:
        async with redis.asyncio.from_url(self.servers.redis.url, socket_timeout=5) as mirror:
            await mirror.flushall()

    async def _copy_periodically(self) -> None:
        while True:
            await asyncio.to_thread(self._with_copies_locked, self._copy)
            await asyncio.sleep(_COPY_INTERVAL_SECONDS)

    def _with_copies_locked(self, work: Callable[[], None]) -> None:
        with self._copies_lock:
            work()

    def _copy(self) -> None:
        copy = self.folder / f"redis-{time.monotonic():.2f}"
        try:
            shutil.copytree(folder_of(self.servers.redis), copy)
        except (OSError, shutil.Error):  # Redis rewrote a file during the copy; the next copy succeeds
            shutil.rmtree(copy, ignore_errors=True)
            return
        self._copies.append((time.monotonic(), copy))
        while len(self._copies) > 2 and self._copies[1][0] < time.monotonic() - COPY_AGE_SECONDS:
            shutil.rmtree(self._copies.pop(0)[1], ignore_errors=True)

    def _roll_back(self) -> None:
        """Replaces the data of Redis by a copy that is about ten seconds old."""
        self.servers.redis.kill()
        _, copy = self._copies[0]
        shutil.rmtree(folder_of(self.servers.redis))
        shutil.copytree(copy, folder_of(self.servers.redis))

    def _filler(self, fault: Fault) -> Path:
        return (self.disk or self.folder) / f"filler-{fault.kind.name.lower()}"

    def _fill_disk(self, fault: Fault) -> None:
        if self.disk is None:
            return
        with self._filler(fault).open("wb", buffering=0) as filler:
            for block in (b"\0" * (1 << 20), b"\0" * 4096):
                try:
                    while True:
                        filler.write(block)
                except OSError:
                    pass  # the disk has no room for another block
