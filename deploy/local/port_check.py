"""Checks whether a port of 127.0.0.1 is free, and finds free ports.

If a port is in use, the error names the port and the setting that moves it. Nothing here silently takes another port,
because clients and printed URLs would then point to another server.
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

# These ports are below those that Linux uses for outgoing connections (32768 and up), so a server that restarts finds
# its port still free.
FIRST_PORT, LAST_PORT = 20_000, 32_000


class PortTaken(Exception):
    """A process or a connection has the port, or two settings name it. The message says what to do."""


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Servers set this option too. It ignores connections that linger after a close (TIME_WAIT).
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def require_free(port: int, setting: str | None, what: str, *, within: float = 10.0) -> None:
    """Raises PortTaken at once if a process listens on the port. If an outgoing connection uses the port,
    waits up to `within` seconds for the connection to end."""
    deadline = time.monotonic() + within
    while not is_free(port):
        if _listens(port) or time.monotonic() > deadline:
            move = f", or move the port with {setting}, or all ports with TICKETRAIL_PORT_BASE" if setting else ""
            raise PortTaken(
                f"port {port} ({what}) is in use: a process listens there, or an outgoing connection has this port. "
                f"`ss -tanp 'sport = :{port}'` shows which one. Stop its process{move}"
            )
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def find_free(count: int) -> list[int]:
    """Returns `count` different free ports and reserves them until this process ends. A server needs seconds until it
    binds its port, and a test run beside this one could otherwise get the same port."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(FIRST_PORT, LAST_PORT), k=LAST_PORT - FIRST_PORT):
        if is_free(port) and _reserve(port):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"fewer than {count} free ports between {FIRST_PORT} and {LAST_PORT}")


_reserved: list[IO[str]] = []


def _reserve(port: int) -> bool:
    """Locks a file named after the port. The kernel releases the lock when this process ends. Returns False
    if another process has the lock."""
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
