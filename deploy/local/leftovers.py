"""Ends processes that a killed run left behind, because they hold the ports that the next run needs.

The kernel signals them when their runner dies (child.py), but RabbitMQ takes some seconds to end. A file of that run
identifies them by pid and start time; no other process is touched.
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
    """Waits `within` seconds for the processes that an earlier run left behind, then kills them."""
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
        say(f"waiting for processes of an earlier run: {', '.join(alive.values())}")
        _, stubborn = psutil.wait_procs(list(alive), timeout=within)
        for process in stubborn:
            for each in [process, *process.children(recursive=True)]:
                each.kill()
        psutil.wait_procs(stubborn, timeout=5)
    file.unlink(missing_ok=True)
