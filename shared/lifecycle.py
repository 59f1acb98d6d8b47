"""What holds a process together: the tasks without which it must not look alive, and its memory."""

import asyncio
import gc
import os
import signal
from collections.abc import Coroutine
from typing import Any

import structlog

log = structlog.get_logger(__name__)


def settle_memory(*, rarely: bool = True) -> None:
    """Once, when everything that lives as long as the process has been made: the cycle collector leaves that alone
    from now on, and runs more rarely. Requests leave next to no cycles behind; looking for them took a seventh of the
    time of an order. `rarely` False: where thousands of connections come and go, what each leaves counts for more."""
    gc.collect()
    gc.freeze()
    if rarely:
        gc.set_threshold(50_000, 20, 50)


def vital_task(work: Coroutine[Any, Any, None], *, name: str) -> "asyncio.Task[None]":
    """Runs a loop of the service in the background. One that breaks, for whatever reason it did not foresee, ends the
    process in order (SIGTERM): whoever supervises it sees why in the log and starts a new one."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_end_process)
    return task


async def end_tasks(*tasks: "asyncio.Task[None]") -> None:
    """Cancels them and waits until they have ended. Again and again: a client library in the middle of a failure of its
    own may turn a cancellation into that failure, and the loop goes on."""
    for task in tasks:
        task.cancel()
    left = set(tasks)
    while left:
        _, left = await asyncio.wait(left, timeout=0.5)
        for task in left:
            task.cancel()


def _end_process(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("task_broke", task=task.get_name(), error=f"{type(error).__name__}: {error}", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)
