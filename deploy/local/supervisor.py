"""Keeps programs running: restarts a program that dies, and stops all of them.

- It reports a program that dies in one line, and restarts it after a pause. The pause doubles with each restart up to
  5 s, so that a program that cannot start uses little CPU time. After the program has run for 30 s, the pause is short
  again.
- `stop` returns when none of its programs runs any more. It may be called before `start`, and twice.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from deploy.local.child import Child

T = TypeVar("T")


class Program(Protocol):
    """A supervised program: a service or a private server. All calls block."""

    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int | None: ...
    def start(self) -> None: ...
    def wait(self) -> int | None:
        """Waits until the program ends. Returns its return code, which is negative for a signal."""

    def stop(self) -> bool:
        """Stops the program. Returns False if it did not end in time and was killed."""


class Service:
    """A service, which runs as `python -m …`."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        program: str = sys.executable,
        stop_timeout_seconds: float = 7.0,
    ) -> None:
        self.name = name
        self.log = log
        self._command = [program, *arguments]
        self._env, self._cwd, self._stop_timeout_seconds = env, cwd, stop_timeout_seconds
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    def start(self) -> None:
        if self._child:
            self._child.kill()  # workers that outlived their parent would keep its port
        self._child = Child.spawn(self._command, log=self.log, env=self._env, cwd=self._cwd)

    def wait(self) -> int | None:
        return self._child.wait() if self._child else None

    def stop(self) -> bool:
        return self._child is None or self._child.terminate(self._stop_timeout_seconds)


class Supervisor:
    def __init__(
        self,
        programs: Sequence[Program],
        *,
        say: Callable[[str], None],
        on_restart: Callable[[], None] = lambda: None,
        first_pause_seconds: float = 0.2,
        max_pause_seconds: float = 5.0,
        settled_seconds: float = 30.0,
    ) -> None:
        self.programs = programs
        self.restarts = {program.name: 0 for program in programs}
        self._say, self._on_restart = say, on_restart
        self._first_pause_seconds, self._max_pause_seconds, self._settled_seconds = (
            first_pause_seconds,
            max_pause_seconds,
            settled_seconds,
        )
        self._stopping = asyncio.Event()
        self._restart_requested = {program.name: asyncio.Event() for program in programs}
        self._watchers: list[asyncio.Task[None]] = []
        # Two calls per program may block at the same time: the wait of its watcher, and a stop.
        self._threads = ThreadPoolExecutor(2 * len(programs), thread_name_prefix="supervisor")

    @property
    def pids(self) -> dict[str, int]:
        return {program.name: program.pid for program in self.programs if program.pid is not None}

    async def start(self) -> None:
        """Starts all programs at the same time. When every start has succeeded or failed, raises the first error."""
        results = await asyncio.gather(
            *(self._blocking(program.start) for program in self.programs), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self._watchers = [asyncio.create_task(self._watch(program)) for program in self.programs]

    async def restart(self, names: Collection[str]) -> None:
        """Restarts these programs at once, without a report, even one that is in its pause."""
        chosen = [program for program in self.programs if program.name in names]
        for program in chosen:
            self._restart_requested[program.name].set()
        await asyncio.gather(*(self._blocking(program.stop) for program in chosen))

    async def stop(self) -> None:
        self._stopping.set()
        ended = await asyncio.gather(*(self._blocking(program.stop) for program in self.programs))
        for program, in_time in zip(self.programs, ended, strict=True):
            if not in_time:
                self._say(f"{program.name} did not end in time and was killed")
        await asyncio.gather(*self._watchers)
        # A program that was restarting during the first stop is stopped now.
        await asyncio.gather(*(self._blocking(program.stop) for program in self.programs))

    async def _watch(self, program: Program) -> None:
        pause, restart_requested = self._first_pause_seconds, self._restart_requested[program.name]
        while not self._stopping.is_set():
            started = time.monotonic()
            code = await self._blocking(program.wait)
            if self._stopping.is_set():
                return
            if time.monotonic() - started > self._settled_seconds:
                pause = self._first_pause_seconds
            reason = describe(code)
            while True:
                if not restart_requested.is_set():
                    self._say(f"{program.name} ended ({reason}); restarting it in {pause:.1f} s")
                    if await self._stopped_within(pause, restart_requested):
                        return
                    pause = min(pause * 2, self._max_pause_seconds)
                    self.restarts[program.name] += 1
                restart_requested.clear()
                try:
                    await self._blocking(program.start)
                except Exception as error:  # noqa: BLE001  (after any error, the next try may succeed)
                    if self._stopping.is_set():
                        return
                    reason = str(error).splitlines()[0]
                else:
                    break
            self._on_restart()

    async def _stopped_within(self, seconds: float, restart_requested: asyncio.Event) -> bool:
        """Waits for `seconds`, or until a restart is requested. Returns whether the supervisor is stopping."""
        waits = [asyncio.create_task(event.wait()) for event in (self._stopping, restart_requested)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self._stopping.is_set()

    async def _blocking(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def describe(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"exit code {code}"
