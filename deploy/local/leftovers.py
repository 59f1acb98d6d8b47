"""Processes that a run left behind when it was killed, so that the next one does not stumble over their ports.

The kernel tells them to end when their runner dies (see child.py), which takes RabbitMQ some seconds. They are known
by pid and start time from a file of that run; nothing else is ever touched.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil


def record(file: Path, pids: Mapping[str, int]) -> None:
    kept = {}
    for name, pid in pids.items():
        try:
            kept[name] = [pid, psutil.Process(pid).create_time()]
        except psutil.NoSuchProcess:
            continue
    aside = file.with_suffix(".new")
    aside.write_text(json.dumps(kept))
    aside.rename(file)


def clear(file: Path, say: Callable[[str], None], within: float = 10.0) -> None:
    """Wait for what an earlier run left behind, then kill it."""
    alive: dict[psutil.Process, str] = {}
    try:
        known = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return
    for name, (pid, created) in known.items():
        try:
            process = psutil.Process(pid)
            if process.create_time() == created:
                alive[process] = name
        except psutil.NoSuchProcess:
            continue
    if alive:
        say(f"waiting for what an earlier run left behind: {', '.join(alive.values())}")
        _, stubborn = psutil.wait_procs(list(alive), timeout=within)
        for process in stubborn:
            for each in [process, *process.children(recursive=True)]:
                each.kill()
        psutil.wait_procs(stubborn, timeout=5)
    file.unlink(missing_ok=True)
