"""Starts a program, and stops, kills, freezes and thaws it together with all its descendants.

- It sends signals only to the processes of this tree, which it finds by their parents, never by name.
- The program has its own session, so that Ctrl-C in the terminal reaches the runner and not the program.
- When the process that started the program dies, even by kill -9, the kernel sends `death_signal` to the program.
- Stopping or killing a program twice, or after it has ended, is not an error.
"""

import contextlib
import functools
import grp
import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import psutil


@functools.cache
def _spawner() -> ThreadPoolExecutor:
    """Returns an executor with one thread, which starts all children. The kernel sends the death signal when the
    *thread* that started a child ends, so a child of a short-lived thread would stop with that thread."""
    return ThreadPoolExecutor(1, thread_name_prefix="spawner")


class Process(Protocol):
    """The methods of a process that a Child needs. subprocess.Popen has them."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


class Child:
    def __init__(self, process: Process, log: Path) -> None:
        """`process` must be the leader of its own process group."""
        self._process = process
        self.log = log
        self.pid = process.pid
        self._group_gone = False

    @classmethod
    def spawn(
        cls,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str],
        cwd: Path,
        user: str | None = None,
        death_signal: signal.Signals = signal.SIGTERM,
    ) -> "Child":
        """Starts a program and appends its output to `log`. Only root may set `user`."""
        # setpriv turns into the program and keeps the pid. A change of user clears the death signal, so setpriv sets it
        # after that.
        prefix = ["setpriv", "--pdeathsig", death_signal.name.removeprefix("SIG")]
        if user is not None:
            prefix += ["--reuid", user, "--regid", _group_of(user), "--init-groups"]
        log.parent.mkdir(parents=True, exist_ok=True)

        def start() -> "subprocess.Popen[bytes]":
            with log.open("ab") as output:
                return subprocess.Popen(
                    [*prefix, *map(str, command)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(env),
                    cwd=cwd,
                    start_new_session=True,
                )

        return cls(_spawner().submit(start).result(), log)

    @property
    def returncode(self) -> int | None:
        """The return code; None while the program runs, negative if a signal ended it."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """Returns the return code, or None if the program still runs after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def terminate(self, within: float, request: signal.Signals = signal.SIGTERM) -> bool:
        """Asks the program to end, and kills the rest of its tree after `within` seconds. Returns whether the program
        ended in time."""
        if self.returncode is not None:
            self._kill_group()
            return True
        # The tree is listed now, because the descendants get another parent when the program ends.
        tree = self._tree()
        self.thaw()  # a frozen process does not react to the signal
        self._process.send_signal(request)
        ended = self.wait(within) is not None
        if not ended:
            self.kill()
        for process in tree:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(tree, timeout=5)
        self._kill_group()
        return ended

    def kill(self) -> None:
        """Sends SIGKILL to the whole tree, and waits until it is gone."""
        tree = self.freeze()  # a frozen process cannot start another one during the loop
        for process in tree:
            _signal(process, signal.SIGKILL)
        self._process.wait(10)
        psutil.wait_procs(tree, timeout=10)
        self._kill_group()

    def freeze(self) -> list[psutil.Process]:
        frozen: list[psutil.Process] = []
        while new := [process for process in self._tree() if process not in frozen]:
            for process in new:
                _signal(process, signal.SIGSTOP)
            frozen += new
        return frozen

    def thaw(self) -> None:
        for process in reversed(self._tree()):
            _signal(process, signal.SIGCONT)

    def tail(self, lines: int = 15) -> str:
        return tail(self.log, lines)

    def _kill_group(self) -> None:
        """Kills workers that outlive the program. They have another parent by then, but are still in its group. The
        signal is sent only once, because another process group may get the number later."""
        if self._group_gone:
            return
        self._group_gone = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _tree(self) -> list[psutil.Process]:
        """Returns the program and its descendants, parents before children, or nothing after the program has ended."""
        if self.returncode is not None:
            return []
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def tail(log: Path, lines: int = 15) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)  # psutil checks the start time, so a process that reuses the pid gets no signal


def _group_of(user: str) -> str:
    return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
