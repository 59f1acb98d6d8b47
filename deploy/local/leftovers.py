"""Ends processes that a killed run left behind, because they hold the ports that the next run needs.

The kernel signals them when their runner dies (child.py), but RabbitMQ takes some seconds to end. A file of that run
identifies them by pid and start time; no other process is touched.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil


def record(file: Path, pids: Mapping[str, int]) -> None:
    """Writes the pid and start time of each process to `file`."""
    started = {}
    for name, pid in pids.items():
        try:
            started[name] = [pid, psutil.Process(pid).create_time()]
        except psutil.NoSuchProcess:
            continue
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(started))
    draft.rename(file)


def clear(file: Path, say: Callable[[str], None], within: float = 10.0) -> None:
    """Waits `within` seconds for the processes that an earlier run left behind, then kills them."""
    alive: dict[psutil.Process, str] = {}
    try:
        recorded = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return
    for name, (pid, created) in recorded.items():
        try:
            process = psutil.Process(pid)
            if process.create_time() == created:
                alive[process] = name
        except psutil.NoSuchProcess:
            continue
    if alive:
        say(f"waiting for processes of an earlier run: {', '.join(alive.values())}")
        _, still_running = psutil.wait_procs(list(alive), timeout=within)
        for process in still_running:
            for member in [process, *process.children(recursive=True)]:
                member.kill()
        psutil.wait_procs(still_running, timeout=5)
    file.unlink(missing_ok=True)
