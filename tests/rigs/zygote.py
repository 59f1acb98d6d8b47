"""Starts our programs without the cost of their imports: it forks a process that has imported them already.

Each test process starts one such process, the zygote, on first use. The zygote imports the services once and forks for
each request. A forked program runs as under `python -m`: with its own session, environment, folder, arguments and
output. The program gets SIGTERM when its zygote ends, and the zygote gets SIGTERM when its test process ends.

`spawn` and `run` use `python -m` instead if coverage is measured, if the program belongs to a copy of the tree, or if a
library is preloaded.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from deploy.local.child import Child

ROOT = Path(__file__).resolve().parents[2]
_MODULES = (
    "granian.server.mp",
    "services.orders.app",
    "services.sync.worker",
    "services.sync.api",
    "services.sync.cli.main",
    "services.notifier.app",
)
_START_TIMEOUT_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1
_LENGTH_BYTES = 8


def spawn(arguments: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path = ROOT) -> Child:
    """Starts `python -m ARGUMENTS`; its output is appended to `log`."""
    if not _forks(cwd, env):
        return Child.spawn([sys.executable, "-m", *arguments], log=log, env=env, cwd=cwd)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return Child(_zygote().fork(arguments, env, cwd, output.fileno(), output.fileno()), log)


def run(arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path = ROOT) -> tuple[int, str, str]:
    """Runs `python -m ARGUMENTS` to its end; returns (exit code, stdout, stderr)."""
    if not _forks(cwd, env):
        ended = subprocess.run([sys.executable, "-m", *arguments], env=env, cwd=cwd, capture_output=True, text=True)
        return ended.returncode, ended.stdout, ended.stderr
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = _zygote().fork(arguments, env, cwd, out.fileno(), err.fileno()).wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return code, texts[0], texts[1]


def warm_up() -> None:
    """Starts the zygote, if it will be used, without waiting for its imports."""
    if _forks(ROOT, {}):
        _zygote()


def _forks(cwd: Path, env: Mapping[str, str]) -> bool:
    return cwd == ROOT and "LD_PRELOAD" not in env and not any(name.startswith("COV") for name in os.environ)


class ForkedProcess:
    """A program whose parent is the zygote. It has those methods of subprocess.Popen that `Child` calls."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._replies = connection.makefile("rb", buffering=0)
        self._returncode: int | None = None
        first = self._replies.readline()
        if not first:
            raise RuntimeError("the zygote ended before it started the program")
        self.pid = int(first)

    def poll(self) -> int | None:
        return self._read_returncode(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._read_returncode(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def _read_returncode(self, timeout: float | None) -> int | None:
        if self._returncode is None and select.select([self._connection], [], [], timeout)[0]:
            reply = self._replies.readline()
            # Without a reply the zygote has ended, so the kernel has sent SIGTERM to the program.
            self._returncode = int(reply) if reply else -signal.SIGTERM
            self._replies.close()
            self._connection.close()
        return self._returncode


class _Zygote:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ticketrail-zygote-")
        folder = Path(self._folder.name)
        self._path = str(folder / "socket")
        self._child = Child.spawn(
            [sys.executable, "-m", "tests.rigs.zygote", self._path], log=folder / "log", env=os.environ, cwd=ROOT
        )

    def fork(self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, out: int, err: int) -> ForkedProcess:
        connection = self._connect()
        request = json.dumps({"arguments": list(arguments), "env": dict(env), "cwd": str(cwd)}).encode()
        socket.send_fds(connection, [len(request).to_bytes(_LENGTH_BYTES, "big")], [out, err])
        connection.sendall(request)
        return ForkedProcess(connection)

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._path)
            except OSError as error:  # the zygote listens only after its imports
                connection.close()
                if self._child.wait(0.02) is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the zygote does not answer: {error}\n{self._child.tail(30)}") from error
            else:
                return connection


@functools.cache
def _zygote() -> _Zygote:
    return _Zygote()


# -- in the zygote -----------------------------------------------------------------------------------------------


class _Program(Struct):
    arguments: list[str]

    def run(self) -> None:
        """Runs the module; the interpreter then ends as after `python -m`."""
        module, *rest = self.arguments
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _serve(path: str) -> _Program:
    """Handles requests as long as the zygote lives. Returns only in a forked child, with the program that the child
    runs."""
    for module in _MODULES:
        importlib.import_module(module)
    prctl = ctypes.CDLL(None).prctl
    gc.collect()
    gc.freeze()  # a collection in a child would copy all pages
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    zygote = os.getpid()
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, wake], [], [])
        if wake in ready:
            wake.recv(4_096)
            _report_ended(running)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        length, fds, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, 2)
        request = json.loads(_receive(connection, int.from_bytes(length, "big")))
        # The main thread forks, because the kernel sends the death signal when the forking thread ends.
        pid = os.fork()
        if pid:
            for fd in fds:
                os.close(fd)
            connection.sendall(b"%d\n" % pid)
            running[pid] = connection
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in (listener, wake, woken, connection, *running.values()):
            one.close()
        os.setsid()
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != zygote:
            os._exit(1)  # the zygote ended before the death signal was set
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (fds[0], 1), (fds[1], 2)):
            os.dup2(source, target)
        for fd in (nothing, *fds):
            os.close(fd)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        return _Program(request["arguments"])


def _report_ended(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        # The pipe is broken if the test has ended and does not wait.
        with running.pop(pid) as connection, contextlib.suppress(BrokenPipeError):
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        piece = connection.recv(size - len(received))
        if not piece:
            raise ConnectionError("a request is shorter than its stated length")
        received += piece
    return received


def _main() -> None:
    _serve(sys.argv[1]).run()


if __name__ == "__main__":
    _main()
