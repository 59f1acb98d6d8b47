"""The process that serves an ASGI application: Granian with one worker, and its signals."""

import asyncio
import ctypes
import resource
import signal
from typing import Any

from shared.observability.logs import SERVER_LOGGING, configure_logging

_M_MMAP_THRESHOLD = -3  # the number of the parameter in malloc.h of glibc
_LARGE_BLOCK_BYTES = 128 << 10
_OTHER_FILES = 500
"""The files of a process that are no connections of clients: of backends, the journal, traces and the server itself."""


def stop_event() -> asyncio.Event:
    """Returns an event that is set by SIGTERM and SIGINT before the server acts on them. Granian waits for open
    responses, so every stream must end on this event; otherwise the process never exits. Call this function in the
    lifespan, inside the worker process."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def stop(signum: int, frame: Any, before: Any = before) -> None:
            loop.call_soon_threadsafe(stopping.set)
            if callable(before):
                before(signum, frame)

        signal.signal(number, stop)
    return stopping


def serve(target: str, *, service: str, host: str, port: int, connections: int, kill_after_seconds: int = 8) -> None:
    """Runs the ASGI factory `target` ("package.module:function") in one worker process until SIGTERM or SIGINT.

    `service`: the name of the service in the log.

    `connections`: the maximum number of open connections. Granian's default is 1,024; if all of these are streams, or
    wait for the rest of a request, none is left for other clients. `kill_after_seconds`: the time from the signal until
    the worker is killed. Without it, a client that does not read would delay the exit.
    """
    _return_large_blocks()
    _allow_files(connections)
    # Imported here, because tests of an app need no server.
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops

    # The process that starts the worker logs too. The worker configures its own log with the level of its settings.
    configure_logging(service)
    Granian(
        target,
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,  # detecting HTTP/2 costs 10 KB of buffers per open connection
        backpressure=connections,
        factory=True,
        loop=Loops.uvloop,
        workers=1,
        log_access=False,
        log_dictconfig=SERVER_LOGGING,
        workers_kill_timeout=kill_after_seconds,
    ).serve()


def _allow_files(connections: int) -> None:
    """Raises the soft limit of open files, because each connection needs one. Many systems start with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _return_large_blocks() -> None:
    """Makes malloc give each freed block of 128 KiB or more back to the system, also in the worker process, which is a
    fork. glibc starts with this threshold, but raises it to up to 32 MiB when such blocks are freed. Messages of some
    megabytes would then leave holes in the heap, which grows for as long as such messages come."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
