"""Ports on 127.0.0.1: whether one is free, and which are.

A port that is taken is an error that names the port and the setting that moves it; nothing here ever takes another
port silently, because clients and printed URLs would then point at somebody else's server.
"""

import fcntl
import os
import random
import socket
import tempfile
import time
from pathlib import Path
from typing import IO

HOST = "127.0.0.1"

# Below the range from which Linux takes local ports for outgoing connections (32768 and up): a server that is stopped
# and started again finds its port still free.
FIRST, LAST = 20_000, 32_000


class PortTaken(Exception):
    def __init__(self, port: int, setting: str | None, what: str) -> None:
        move = f", or move it with {setting}, or all ports with TICKETRAIL_PORT_BASE" if setting else ""
        super().__init__(f"port {port} ({what}) is taken: stop what listens there{move}")
        self.port = port
        self.setting = setting


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections that linger after a close (TIME_WAIT) do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def require_free(port: int, setting: str | None, what: str, *, within: float = 10.0) -> None:
    """Raises PortTaken at once if a process listens on the port. If none listens, an outgoing connection uses it as its
    local port by chance: then this waits up to `within` seconds for that connection to end."""
    deadline = time.monotonic() + within
    while not is_free(port):
        if _listens(port) or time.monotonic() > deadline:
            raise PortTaken(port, setting, what)
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def find_free(count: int) -> list[int]:
    """So many different ports that are free, and that no other process of ours was given while it lives: a server
    takes seconds until it binds, and test runs go side by side."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(FIRST, LAST), k=LAST - FIRST):
        if is_free(port) and _reserve(port):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"fewer than {count} free ports between {FIRST} and {LAST}")


_reserved: list[IO[str]] = []


def _reserve(port: int) -> bool:
    """Locks a file named after the port. The kernel releases the lock when this process ends, however it ends."""
    folder = Path(tempfile.gettempdir()) / f"ticketrail-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    file = (folder / str(port)).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _reserved.append(file)
    return True
