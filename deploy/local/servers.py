"""Runs private instances of RabbitMQ, PostgreSQL and Redis, for `make run` and the tests.

- Each instance lives in one directory, listens only on 127.0.0.1 and its given ports, and affects no other instance.
- `start` returns when the server answers, or raises ServerFailed with the tail of its log and leaves no process
  running. It raises PortTaken if a port is in use.
- Data survives a stop, a kill and a restart, also by another process that uses the same directory.
- `stop`, `kill`, `freeze` and `thaw` affect every process of the server and no other. They do nothing if the server is
  not running. `stop` in one thread ends a `start` in another thread.
"""

import base64
import os
import shutil
import signal
import socket
import time
import urllib.error
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.local import database
from deploy.local.child import Child
from deploy.local.packages import Programs
from deploy.local.port_check import HOST, require_free
from deploy.local.rabbitmq_home import make_home
from shared.messaging.management import ask

PASSWORD = "ticketrail"  # noqa: S105  (local instances on 127.0.0.1, the same on every machine)


class ServerFailed(Exception):
    """A server did not start. The message ends with the tail of its log."""


class Server(ABC):
    name: str
    stop_timeout_seconds = 6.0
    """The time that a server gets to end by itself before it is killed."""
    stop_signal = signal.SIGTERM

    def __init__(self, directory: Path, log: Path, ports: Mapping[str, int]) -> None:
        """Creates no files and starts nothing. `ports` maps the name of each port setting to its port."""
        self.directory = directory.absolute()
        self.log = log.absolute()
        self._ports = ports
        self._children: list[Child] = []  # the last one is the server itself

    @property
    def pid(self) -> int | None:
        """The pid of the server's root process, or None if the server was not started."""
        return self._children[-1].pid if self._children else None

    @property
    def running(self) -> bool:
        return bool(self._children) and self._children[-1].returncode is None

    def start(self, within: float = 60.0) -> None:
        if self.running:
            return
        self.kill()  # an instance that died may have left helpers
        for setting, port in self._ports.items():
            require_free(port, setting, self.name)
        try:
            self._prepare()
            self._launch()
            self._wait_until_it_answers(time.monotonic() + within)
        except BaseException:
            self.kill()
            raise

    def wait(self) -> int | None:
        """Waits until the server ends. Returns its return code, which is negative for a signal."""
        return self._children[-1].wait() if self._children else None

    def stop(self) -> bool:
        """Stops the server. Returns False if it did not end in time and was killed."""
        children, self._children = self._children, []
        ended = [child.terminate(self.stop_timeout_seconds, self.stop_signal) for child in reversed(children)]
        return all(ended)

    def kill(self) -> None:
        children, self._children = self._children, []
        for child in reversed(children):
            child.kill()

    def freeze(self) -> None:
        for child in self._children:
            child.freeze()

    def thaw(self) -> None:
        for child in self._children:
            child.thaw()

    @abstractmethod
    def _prepare(self) -> None:
        """Creates the files that the server needs. It is idempotent, and a kill at any point does no harm."""

    @abstractmethod
    def _launch(self) -> None:
        """Starts the programs, and adds each one to `_children` at once. The server comes last."""

    @abstractmethod
    def _answers(self) -> bool:
        """Checks once, within about a second, whether the server answers. May raise OSError."""

    def _wait_until_it_answers(self, deadline: float) -> None:
        pause = 0.02
        while True:
            children = self._children
            if not children:
                raise ServerFailed(f"{self.name} was stopped while it started")
            try:
                if self._answers():
                    return
            except OSError:
                pass
            if children[-1].wait(pause) is not None:
                raise ServerFailed(f"{self.name} ended while it started; {self.log} ends with:\n{children[-1].tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} does not answer; {self.log} ends with:\n{children[-1].tail()}")
            pause = min(pause * 1.5, 0.2)


class Redis(Server):
    """Redis or Valkey, with an append-only file. It never evicts keys, because claims and pending state must stay."""

    name = "redis"

    def __init__(
        self, directory: Path, log: Path, programs: Programs, *, port: int, arguments: Sequence[str] = ()
    ) -> None:
        """`arguments`: more arguments of the server, such as `--cluster-enabled yes`."""
        super().__init__(directory, log, {"TICKETRAIL_REDIS_PORT": port})
        self._program = programs.redis_server
        self._arguments = arguments
        self.port = port
        self.url = f"redis://{HOST}:{port}/0"

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def _launch(self) -> None:
        options = {
            "bind": HOST,
            "port": str(self.port),
            "dir": str(self.directory),
            "daemonize": "no",
            "maxmemory-policy": "noeviction",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",  # disables snapshots: the append-only file is enough, and a snapshot can double the memory
            # An hour after its last replica left, a server would free its backlog and take another replication id. The
            # mirror would then be cold for a few seconds without need (scripts/identity.lua).
            "repl-backlog-ttl": "0",
        }
        command = [str(self._program), *(part for name, value in options.items() for part in (f"--{name}", value))]
        command += self._arguments
        self._children = [Child.spawn(command, log=self.log, env=_environment(), cwd=self.directory)]

    def _answers(self) -> bool:
        # Redis answers -LOADING while it reads its file.
        with socket.create_connection((HOST, self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"


_RABBITMQ_PLUGINS = ("rabbitmq_management",)


class RabbitMQ(Server):
    """One node of RabbitMQ 3.10 or newer, with the management plugin and its own port mapper (epmd)."""

    name = "rabbitmq"
    stop_timeout_seconds = 7.5  # a normal stop takes 6 to 7 s on 3.10

    def __init__(
        self,
        directory: Path,
        log: Path,
        programs: Programs,
        *,
        port: int,
        management_port: int,
        epmd_port: int,
        distribution_port: int,
    ) -> None:
        super().__init__(
            directory,
            log,
            {
                "TICKETRAIL_RABBITMQ_PORT": port,
                "TICKETRAIL_RABBITMQ_MANAGEMENT_PORT": management_port,
                "TICKETRAIL_EPMD_PORT": epmd_port,
                "TICKETRAIL_RABBITMQ_DIST_PORT": distribution_port,
            },
        )
        self._programs = programs
        self._scripts: Path | None = None
        self.port, self.management_port = port, management_port
        self.epmd_port, self.distribution_port = epmd_port, distribution_port
        self.url = f"amqp://ticketrail:{PASSWORD}@{HOST}:{port}/"
        self.management_url = f"http://ticketrail:{PASSWORD}@{HOST}:{management_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the server and its port mapper, complete only after `_prepare`."""
        directory = self.directory
        home = {"RABBITMQ_SCRIPTS_DIR": str(self._scripts)} if self._scripts else {}
        return {
            **_environment(),
            **home,
            "HOME": str(directory),  # Erlang looks for its cookie here
            # The data directory is named after the node. The name is stored, so that moving the port keeps the data.
            "RABBITMQ_NODENAME": self._node_name(),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_SCHEMA_DIR": str(directory / "schema"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(directory / "schema"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            # The next four settings keep the node from reading the files of the machine in /etc/rabbitmq.
            "RABBITMQ_CONFIG_FILES": str(directory / "conf.d"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "rabbitmq-env.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": HOST,
            # The node must not bind its schedulers to cores, because all nodes of a machine would choose the same core.
            "RABBITMQ_SCHEDULER_BIND_TYPE": "u",
            # The node must not start a port mapper (ours already runs) and must not be reachable from other machines.
            # Its idle schedulers must sleep, not spin, because it shares few cores with all other servers and services.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
            " +sbwt none +sbwtdcpu none +sbwtdio none",
            # This setting makes the start script become the server, not its parent, so that signals reach the server.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _prepare(self) -> None:
        for name in ("data", "log", "schema", "conf.d"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        cookie = self.directory / ".erlang.cookie"
        if not cookie.exists() or not cookie.stat().st_size:
            _write(cookie, base64.b32encode(os.urandom(20)).decode())
            cookie.chmod(0o400)
        _write(self.directory / "rabbitmq-env.conf", "")
        _write(self.directory / "advanced.config", "[].\n")
        _write(self.directory / "enabled_plugins", f"[{','.join(_RABBITMQ_PLUGINS)}].\n")
        self._scripts = make_home(self._programs.rabbitmq_server, self.directory / "home", _RABBITMQ_PLUGINS)
        _write(
            self.directory / "rabbitmq.conf",
            f"""\
listeners.tcp.local = {HOST}:{self.port}
management.tcp.ip = {HOST}
management.tcp.port = {self.management_port}
default_user = ticketrail
default_pass = {PASSWORD}
disk_free_limit.absolute = 100MB
vm_memory_high_watermark.absolute = 1GB
log.console = true
log.console.level = info
log.file = false
""",
        )

    def _launch(self) -> None:
        env = self.environment
        port_mapper = [str(self._programs.epmd), "-port", str(self.epmd_port), "-address", HOST]
        self._children = [Child.spawn(port_mapper, log=self.log, env=env, cwd=self.directory)]
        server = Child.spawn([self._programs.rabbitmq_server], log=self.log, env=env, cwd=self.directory)
        self._children = [*self._children, server]

    def _answers(self) -> bool:
        with socket.create_connection((HOST, self.port), timeout=1) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            if connection.recv(1) != b"\x01":  # 1 is the type of a method frame, such as connection.start
                return False
        try:
            return ask(self.management_url, "GET", "/api/health/checks/virtual-hosts", timeout=2) is not None
        except urllib.error.HTTPError:
            return False

    def _node_name(self) -> str:
        name_file = self.directory / "node"
        if not name_file.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            _write(name_file, f"ticketrail-{self.port}@localhost")
        return name_file.read_text().strip()


class PostgreSQL(Server):
    """A PostgreSQL server with the role `ticketrail_owner` and its database `ticketrail`.

    PostgreSQL refuses to run as root, so root starts it as another user. If that user cannot reach `directory` (a
    checkout below /root), the data is in /var/lib/ticketrail and `directory` is a link to it.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # a "fast" shutdown, which ends sessions instead of waiting for them

    def __init__(self, directory: Path, log: Path, programs: Programs, *, port: int) -> None:
        super().__init__(directory, log, {"TICKETRAIL_POSTGRES_PORT": port})
        self._programs = programs
        self.port = port
        self.superuser_url = f"postgresql://postgres:{PASSWORD}@{HOST}:{port}/postgres"
        self._user = database.user_to_run_as()

    def url(self, role: str = "ticketrail_owner") -> str:
        return f"postgresql://{role}:{PASSWORD}@{HOST}:{self.port}/ticketrail"

    @property
    def _data(self) -> Path:
        return self.directory.resolve() / "data"

    def _prepare(self) -> None:
        database.make_reachable(self.directory, self._user)
        if self._data.exists():
            database.remove_lock_of_killed_server(self._data)
            return
        # initdb fills another directory, which is renamed when it is complete. A killed run therefore leaves no
        # directory that only looks complete.
        place = self.directory.resolve()
        draft, password = place / "data.new", place / "password"
        shutil.rmtree(draft, ignore_errors=True)
        _write(password, PASSWORD + "\n")
        if self._user:
            shutil.chown(password, self._user)
        command: list[str | Path] = [self._programs.initdb, "--pgdata", draft, "--username", "postgres"]
        command += ["--auth", "scram-sha-256", "--pwfile", password, "--encoding", "UTF8", "--locale", "C.UTF-8"]
        initdb = Child.spawn(command, log=self.log, env=_environment(), cwd=place, user=self._user)
        self._children = [initdb]
        if initdb.wait(60) != 0:
            raise ServerFailed(f"initdb failed; {self.log} ends with:\n{initdb.tail()}")
        draft.rename(self._data)
        password.unlink()

    def _launch(self) -> None:
        options = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "timezone": "UTC",
        }
        command = [str(database.postgres_for(self._data, self._programs.postgres)), "-D", str(self._data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        env, place = _environment(), self.directory.resolve()
        server = Child.spawn(command, log=self.log, env=env, cwd=place, user=self._user, death_signal=self.stop_signal)
        self._children = [server]

    def _answers(self) -> bool:
        return database.make_owner(self.superuser_url, PASSWORD)


def _environment() -> dict[str, str]:
    """Returns our environment without variables that would point a server or its tools at another instance."""
    foreign_prefixes = (
        "RABBITMQ_",
        "ERL_",
        "ELIXIR_ERL",
        "PG",
        "REDIS",
        "VALKEY",
        "NOTIFY_SOCKET",
        "LC_",
        "LANG",
        "TICKETRAIL_",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign_prefixes)} | {
        "LC_ALL": "C.UTF-8"
    }


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
