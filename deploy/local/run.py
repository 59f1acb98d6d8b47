"""`make run`: runs a whole system on this machine, in the foreground, until Ctrl-C or SIGTERM.

- Each home (`.local`, or TICKETRAIL_HOME) has at most one run at a time. A run continues with the data of earlier runs.
- It exits with 0 after Ctrl-C or SIGTERM, and with 1 if something does not start. In both cases it stops everything
  that it started within 15 s: first the services, then the servers. If it is killed with -9, the kernel stops them.
- It restarts a service or server that dies, and writes the new pid to `demo.json`.
- It writes the settings and secrets of the services to `system.env` in the home, for the command line.
- With `--reload` (`make dev`) it restarts a service when one of its files changes.
"""

import asyncio
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx

from deploy.local import child, demo, layout, leftovers, reload
from deploy.local.local_settings import ROOT, LocalSettings, command_environment, service_environment
from deploy.local.packages import PackagesMissing, Programs, ensure
from deploy.local.port_check import PortTaken, require_free
from deploy.local.servers import PostgreSQL, RabbitMQ, Redis, ServerFailed
from deploy.local.supervisor import Service, Supervisor
from shared.errors import described
from shared.home import require_home
from shared.local_systems import BACKENDS, LOCK_FILE, LocalSystem, list_system, write_environment
from shared.messaging.recovery import until_ready
from shared.security.tokens import Tokens
from shared.setting_fields import variable
from shared.settings_loading import exit_on_bad_settings

READY_TIMEOUT_SECONDS = 60.0
MAX_RESTARTS_BEFORE_READY = 3
HEADLINE = "One order through the whole system, in milliseconds since it was sent:"
_HEALTH_INTERVAL_SECONDS = 0.05
_MAX_STOP_SECONDS = 20.0  # a run stops within 15 s
_STOPPING = "stopping\n"


class StartFailed(Exception):
    """The system did not start. The message says where to look."""


def say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:
        # The terminal is gone. The services and servers must still be stopped in order.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (it must stay open until the process ends)


class System:
    """The private servers and the services of one home."""

    def __init__(self, settings: LocalSettings, home: Path, programs: Programs) -> None:
        self.settings, self.home = settings, home
        self.env = service_environment(settings, home, os.environ)
        self.demo: demo.Demo | None = None
        logs = home / "logs"
        self.rabbitmq = RabbitMQ(
            home / "rabbitmq",
            logs / "rabbitmq.log",
            programs,
            port=settings.rabbitmq_port,
            management_port=settings.rabbitmq_management_port,
            epmd_port=settings.epmd_port,
            distribution_port=settings.rabbitmq_dist_port,
        )
        self.postgres = PostgreSQL(home / "postgres", logs / "postgres.log", programs, port=settings.postgres_port)
        self.redis = Redis(home / "redis", logs / "redis.log", programs, port=settings.redis_port)
        self.servers = Supervisor(
            [self.postgres, self.redis, self.rabbitmq], say=say, on_restart=self.note_pids, first_pause_seconds=1.0
        )
        commands = {
            "orders": ["services.orders"],
            "sync_worker": ["services.sync", "worker"],
            "sync_api": ["services.sync", "api"],
            "notifier": ["services.notifier"],
        }
        self.services = Supervisor(
            [
                Service(name, ["-m", *command], env=self.env, cwd=ROOT, log=logs / f"{name}.log")
                for name, command in commands.items()
            ],
            say=say,
            on_restart=self.note_pids,
        )

    @property
    def urls(self) -> dict[str, str]:
        ports = self.settings
        return {
            "orders": f"http://127.0.0.1:{ports.orders_port}",
            "sync_api": f"http://127.0.0.1:{ports.sync_port}",
            "notifier": f"http://127.0.0.1:{ports.notifier_port}",
            "sync_worker": f"http://127.0.0.1:{ports.worker_port}",
        }

    def note_pids(self) -> None:
        """Writes the pids to demo.json, and to run.pids, where the next run looks for leftover processes."""
        pids = self.services.pids | self.servers.pids
        leftovers.record(self.home / "run.pids", pids)
        if self.demo:
            self.demo.pids = pids
            write_private(self.home / "demo.json", json.dumps(dataclasses.asdict(self.demo), indent=2) + "\n")

    async def start(self) -> None:
        """Starts everything. Raises StartFailed, ServerFailed or PortTaken, after which the caller must call `stop`."""
        with self._layout_checked():
            layout.check_home(self.home)
        write_environment(self.home, command_environment(self.settings, self.env))
        with Step("PostgreSQL, Redis and RabbitMQ answer"):
            await self.servers.start()
            self.note_pids()
        with Step("schema and topology are up to date"):
            await self._check_layout()
            await self.cli("migrate")
        with Step("orders, sync worker, sync API and notifier are ready"):
            await self.services.start()
            self.note_pids()
            async with httpx.AsyncClient(timeout=2.0) as client:
                await asyncio.gather(*(self.ready(client, service) for service in self.services.programs))
        with Step("the demo restaurant exists"):
            seeded: dict[str, Any] = json.loads(await self.cli("seed", "--json"))
        known = {field.name for field in dataclasses.fields(demo.Demo)}
        self.demo = demo.Demo(
            **{name: value for name, value in seeded.items() if name in known},
            orders_url=self.urls["orders"],
            sync_url=self.urls["sync_api"],
            notifier_url=self.urls["notifier"],
            database_url=self.env["TICKETRAIL_DATABASE_WRITER_URL"],  # the owner sees no tenant, the writer sees all
            redis_url=self.env["TICKETRAIL_REDIS_URL"],
            rabbitmq_url=self.env["TICKETRAIL_RABBITMQ_URL"],
            rabbitmq_management_url=self.env["TICKETRAIL_RABBITMQ_MANAGEMENT_URL"],
        )
        self.note_pids()

    async def _check_layout(self) -> None:
        async def queues() -> None:
            await asyncio.to_thread(layout.check_queues, self.rabbitmq.management_url, self.rabbitmq.url, self.settings)

        with self._layout_checked():
            await layout.check_database(self.env["TICKETRAIL_DATABASE_URL"])
            await until_ready(queues, within=READY_TIMEOUT_SECONDS)

    @contextmanager
    def _layout_checked(self) -> Iterator[None]:
        """Replaces OtherLayout by StartFailed, whose message has the command that removes the data."""
        try:
            yield
        except layout.OtherLayout as error:
            reset = f"TICKETRAIL_HOME={self.home} make reset" if self.home != ROOT / ".local" else "make reset"
            raise StartFailed(
                f"the data in {self.home} has the layout of another version ({error}); `{reset}` removes it"
            ) from error

    async def reload(self) -> None:
        """Restarts services whose files change, until it is cancelled."""
        folders = {"orders": "services/orders", "notifier": "services/notifier"}
        folders |= {"sync_worker": "services/sync", "sync_api": "services/sync"}
        async for changed in reload.watch(ROOT, ("services", "shared")):
            if names := reload.affected_services(changed, folders):
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                say(f"{changed[0]}{more} changed: restarting {', '.join(names)}")
                await self.services.restart(names)

    async def stop(self) -> None:
        """Stops the services first, because they need the servers to settle the messages that they hold."""
        for supervisor in (self.services, self.servers):
            names = list(supervisor.pids)
            await supervisor.stop()
            if names:
                say(f"stopped {', '.join(names)}")
        (self.home / "run.pids").unlink(missing_ok=True)

    async def ready(self, client: httpx.AsyncClient, service: Any) -> None:
        """Waits until the service is ready. Raises StartFailed after 60 s or three restarts."""
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        answer = "no reply"
        while time.monotonic() < deadline and self.services.restarts[service.name] < MAX_RESTARTS_BEFORE_READY:
            try:
                reply = await client.get(f"{self.urls[service.name]}/health/ready")
                # The worker also fills the mirror. Until the mirror is warm, orders get numbers of another series.
                if reply.status_code == 200 and reply.json().get("mirror") != "cold":
                    return
                answer = f"{reply.status_code}: {reply.text[:500]}"
            except httpx.HTTPError as error:
                answer = type(error).__name__
            await asyncio.sleep(_HEALTH_INTERVAL_SECONDS)
        raise StartFailed(
            f"{service.name} is not ready (GET /health/ready: {answer}); {service.log} ends with:\n"
            + child.tail(service.log)
        )

    async def cli(self, *arguments: str) -> str:
        """Runs `ticketrail …`, prints its standard error and returns its standard output. Raises StartFailed."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.sync.cli",
            *arguments,
            cwd=ROOT,
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            output, errors = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode != 0:
            raise StartFailed(f"ticketrail {' '.join(arguments)} failed:\n{(output + errors).decode()[-4000:]}")
        for line in errors.decode().splitlines():
            say(f"    {line}")
        return output.decode()


class Step:
    """Prints one line when a step is done, with its duration in seconds."""

    def __init__(self, done: str) -> None:
        self._done = done

    def __enter__(self) -> None:
        self._started_at = time.monotonic()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            say(f"  {time.monotonic() - self._started_at:5.1f} s  {self._done}")


async def serve(settings: LocalSettings, home: Path, programs: Programs, *, reloads: bool = False) -> int:
    loop = asyncio.get_running_loop()
    stop_requested = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop_requested.set)
    began = time.monotonic()
    system = System(settings, home, programs)
    start = asyncio.create_task(_start_and_show(system, began))
    stop = asyncio.create_task(stop_requested.wait())
    reloading: asyncio.Task[None] | None = None
    try:
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            return 0
        await start
        if reloads:
            say("Services restart when a file in services/ or shared/ changes.")
            reloading = asyncio.create_task(system.reload())
        await asyncio.wait({stop, *([reloading] if reloading else [])}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done() and reloading:
            reloading.result()
        return 0
    except (StartFailed, ServerFailed, PortTaken, demo.DemoFailed) as error:
        say(f"ticketrail: {error}")
        return 1
    except Exception as error:  # noqa: BLE001  (report any error, stop everything and exit with 1)
        say(f"ticketrail: {described(error)}")
        return 1
    finally:
        note_stopping(home)
        say("stopping")
        began = time.monotonic()
        tasks = [task for task in (start, stop, reloading) if task]
        for task in tasks:
            task.cancel()
        await system.stop()
        await asyncio.gather(*tasks, return_exceptions=True)
        say(f"stopped everything after {time.monotonic() - began:.1f} s; the data stays in {home}")


async def _start_and_show(system: System, began: float) -> None:
    await system.start()
    if system.demo is None:
        raise AssertionError("the system was started without a demo restaurant")
    order_id, hops = await demo.send_order(system.demo, system.env["TICKETRAIL_DATABASE_WRITER_URL"])
    show(system, order_id, hops, time.monotonic() - began)


def show(system: System, order_id: str, hops: Sequence[demo.Hop], seconds: float) -> None:
    if system.demo is None:
        return
    say(f"\n{HEADLINE}")
    for hop in hops:
        say(f"  {hop.milliseconds:8.1f} ms  {hop.name:<9} {hop.detail}")
    say("\nURLs:")
    for name, url in system.urls.items():
        say(f"  {name:<12} {url}")
    say(f"  {'management':<12} {system.env['TICKETRAIL_RABBITMQ_MANAGEMENT_URL']}")
    say(f"  {'PostgreSQL':<12} {system.demo.database_url}")
    say(f"  {'Redis':<12} {system.env['TICKETRAIL_REDIS_URL']}")
    for description, line in system.demo.shell_lines(order_id):
        say(f"\n# {description}\n{line}")
    command = f".venv/bin/ticketrail {system_option(system.home, system.settings)}trace {order_id}"
    say(f"\n# show where the time of this order went\n{command}")
    file = system.home / "demo.json"
    say(f"\nReady after {seconds:.1f} s. Scripts find all of this in {file}. Ctrl-C stops the system.")


def system_option(home: Path, settings: LocalSettings) -> str:
    """Returns the option without which a command would not find this system: the home is not the default, or the
    environment or `.env` names other backends."""
    others = {variable(name) for name in settings.model_fields_set} & set(BACKENDS)
    return f"--system {shlex.quote(str(home))} " if others or home != ROOT / ".local" else ""


def write_private(path: Path, text: str) -> None:
    """Writes the file completely or not at all, readable only by its owner, because it contains tokens."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_text(text)
    draft.rename(path)


def lock(home: Path) -> IO[str] | None:
    """Takes the lock of a home. It is held as long as the returned file is open. Returns None if another run has it."""
    file = (home / LOCK_FILE).open("a+")
    for _ in range(3):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # a command that checks whether the system runs holds the lock for a moment
        else:
            file.truncate(0)  # an earlier run may have noted that it was stopping
            return file
    file.close()
    return None


def create_home(home: Path) -> None:
    """Creates the directory. Writes a `.gitignore` into an empty one, so that `git add .` does not add its secrets. The
    checkout ignores its `.local` already."""
    home.mkdir(parents=True, exist_ok=True)
    if home != ROOT / ".local" and not any(home.iterdir()):
        (home / ".gitignore").write_text("*\n")


def lock_after_stop(home: Path, within: float = _MAX_STOP_SECONDS) -> IO[str] | None:
    """Takes the lock like `lock`. If another run has it and is stopping, waits up to `within` seconds for its end. Does
    not wait for a run that is not stopping."""
    deadline, said = time.monotonic() + within, False
    while (file := lock(home)) is None and _is_stopping(home) and time.monotonic() < deadline:
        if not said:
            say("ticketrail: waiting for an earlier run to stop")
            said = True
    return file


def note_stopping(home: Path) -> None:
    """Writes into the lock file that its holder is stopping. This does not touch the lock."""
    with suppress(OSError):  # the system must stop, whatever the disk does
        (home / LOCK_FILE).write_text(_STOPPING)


def _is_stopping(home: Path) -> bool:
    with suppress(OSError):
        return (home / LOCK_FILE).read_text() == _STOPPING
    return False


def require_ports(ports: Mapping[str, tuple[int, str]]) -> None:
    """Raises PortTaken if a port is in use or if two settings name the same port."""
    seen: dict[int, str] = {}
    for setting, (port, what) in ports.items():
        if port in seen:
            raise PortTaken(
                f"port {port} is set for two servers, {seen[port]} and {what}: move one of them with {setting}, or all "
                "ports with TICKETRAIL_PORT_BASE"
            )
        seen[port] = what
        require_free(port, setting, what)


def main(arguments: Sequence[str]) -> int:
    reloads = "--reload" in arguments
    with exit_on_bad_settings():
        settings = LocalSettings.load()
        # The services check this too, but only after the servers have started.
        Tokens.of(settings).require_signing()
        home = settings.home_path
        require_home(settings, home)
    create_home(home)
    lock_file = lock_after_stop(home)
    if lock_file is None:
        say(
            f"ticketrail: make run is already running on {home}; stop it first, or set TICKETRAIL_HOME to another "
            "directory and TICKETRAIL_PORT_BASE to other ports"
        )
        return 1
    try:
        leftovers.clear(home / "run.pids", say)
        require_ports(settings.ports)
        programs = ensure()
    except (PortTaken, PackagesMissing) as error:
        say(f"ticketrail: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    entry = list_system(LocalSystem(home, ROOT))
    try:
        with lock_file:
            return asyncio.run(serve(settings, home, programs, reloads=reloads))
    finally:
        entry.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
