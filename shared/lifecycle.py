"""Background loops and garbage collection of a process. A loop that crashes ends the process."""

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from shared.errors import described

log = structlog.get_logger(__name__)

_CANCEL_INTERVAL_SECONDS = 0.5


class BackgroundLoop:
    """Work that a service does in the background from its start to its stop, such as following the log.

    Contract, tested in tests/unit/test_lifecycle.py:

    | call                  | what happens                                                                             |
    |-----------------------|------------------------------------------------------------------------------------------|
    | start                 | the work begins in a separate task; needs a running event loop                           |
    | start while it runs   | nothing                                                                                  |
    | start after a stop    | the work begins again from its first line                                                |
    | stop                  | the work is cancelled; returns when it has ended, even when the work delays cancellation |
    | stop, grace_seconds=n | the work has n seconds to return by itself before it is cancelled                        |
    | stop without a start  | nothing                                                                                  |
    | stop twice            | the second call does nothing; two calls at once both return when the work has ended      |
    | the work raises       | logs `task_broke`, then sends SIGTERM to this process: its supervisor starts a new one   |
    | the work returns      | the loop is no longer running, and may be started again                                  |

    The work calls `turned` when it has finished one round. Tests await `turn_after`, so that they wait for an outcome
    and not for time.
    """

    def __init__(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`name`: the name of the task in the log. `work`: called once for each start."""
        self.name = name
        self.turns = 0
        """The number of rounds that the work has finished since this object was made."""
        self._work = work
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        if not self.running:
            self._task = vital_task(self._work(), name=self.name)
            self._task.add_done_callback(lambda _: self._wake())

    async def stop(self, *, grace_seconds: float = 0.0) -> None:
        task = self._task
        if task is None:
            return
        if grace_seconds:
            await asyncio.wait({task}, timeout=grace_seconds)
        await end_tasks(task)
        if self._task is task:
            self._task = None

    def turned(self) -> None:
        """Counts a finished round. The work calls this at the end of each round."""
        self.turns += 1
        self._wake()

    async def turn_after(self, turns: int) -> int:
        """Waits until more than `turns` rounds are finished, and returns the number of finished rounds.

        `turn_after(loop.turns)` waits for the end of the current round. `turn_after(loop.turns + 1)` also waits for the
        end of the next round, which begins after the call and therefore sees what the caller did before it. Raises
        RuntimeError if the loop is not running or ends first.
        """
        while self.turns <= turns:
            if not self.running:
                raise RuntimeError(f"the loop {self.name} ended after {self.turns} rounds")
            await self._changed.wait()
        return self.turns

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def vital_task(work: Coroutine[Any, Any, None], *, name: str) -> "asyncio.Task[None]":
    """Runs `work` once in a task. If the task crashes, it logs `task_broke` and sends SIGTERM to this process, so that
    the supervisor starts a new one. For work that lasts as long as the service, use BackgroundLoop."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_end_process)
    return task


async def end_tasks(*tasks: "asyncio.Task[None]") -> None:
    """Cancels the tasks and returns when all of them have ended. Cancels them again every half second, because a client
    library that is handling a failure may raise that failure instead of the cancellation. The task would then continue.
    """
    left = {task for task in tasks if not task.done()}
    for task in left:
        task.cancel()
    while left:
        _, left = await asyncio.wait(left, timeout=_CANCEL_INTERVAL_SECONDS)
        for task in left:
            task.cancel()


def freeze_memory(*, collect_rarely: bool = True) -> None:
    """Excludes all existing objects from garbage collection. Call it once, after the objects that live as long as the
    process have been made.

    `collect_rarely`: also makes the cycle collector run less often. Requests leave almost no cycles behind, and the
    search for cycles took a seventh of the time of an order. Pass False in a service with thousands of connections that
    come and go, because each connection leaves cycles.
    """
    gc.collect()
    gc.freeze()
    if collect_rarely:
        gc.set_threshold(50_000, 20, 50)


def _end_process(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("task_broke", task=task.get_name(), error=described(error), exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)
