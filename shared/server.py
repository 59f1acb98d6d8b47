"""The HTTP server that runs a service's application: Granian, one process that watches and one that works.

What this imports, the watching process holds in memory and waits for before the working one starts: no web framework
(`make lint` looks).
"""

from granian import Granian
from granian.constants import HTTPModes, Interfaces, Loops


def serve(target: str, *, host: str, port: int, connections: int | None = None, kill_after: int = 8) -> None:
    """Runs the ASGI factory `target` ("package.module:function") in one worker process until it is told to stop.
    `connections`: how many may be open at once; Granian's 1,024 leave no way to /health when all of them stream.
    `kill_after`: seconds after which a worker that is told to stop is killed; a client that does not read holds it."""
    Granian(
        target,
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,  # to detect HTTP/2 costs 10 KB of buffers for every open connection
        backpressure=connections,
        factory=True,
        loop=Loops.uvloop,
        workers=1,
        log_access=False,
        workers_kill_timeout=kill_after,
    ).serve()
