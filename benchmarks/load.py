"""Generates the two kinds of load.

The closed loop (wrk) measures throughput: each connection sends its next request as soon as it has the reply.
The open loop measures latency: requests are due at constant intervals, and latency counts from the moment a request was
due. If the server stalls, the latency of every request that is due meanwhile includes the stall.
"""

import asyncio
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from benchmarks.restaurants import SeededRestaurant


class ProgramMissing(Exception):
    """A program that a benchmark needs is not installed or does not start; the message says what to do."""


class LoadResult(Struct, frozen=True):
    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float


def order_body(restaurant: SeededRestaurant, number: int = 0) -> bytes:
    """Returns an order as a terminal sends it: three items, a table, a name and a tip. `number` varies the items."""
    dishes = restaurant.menu_item_ids
    items = [{"menu_item_id": dishes[(number + place) % len(dishes)], "quantity": 1 + place} for place in range(3)]
    return json.dumps(
        {"items": items, "table_id": restaurant.table_id, "customer_name": "Ada", "tip_amount": 150},
        separators=(",", ":"),
    ).encode()


def posts(restaurants: Sequence[SeededRestaurant]) -> str:
    """Returns a wrk script that places orders at the restaurants in turn."""
    requests = [
        f'  wrk.format("POST", "/api/orders", {{["Authorization"]="Bearer {one.token}",'
        f' ["Content-Type"]="application/json"}}, {json.dumps(order_body(one, number).decode())}),'
        for number, one in enumerate(restaurants)
    ]
    return (
        "local made, at\ninit = function()\n  at = 0\n  made = {\n" + "\n".join(requests) + "\n  }\nend\n"
        "request = function()\n  at = at % #made + 1\n  return made[at]\nend\n"
    )


def gets(path: str, token: str) -> str:
    return f'wrk.method = "GET"\nwrk.path = "{path}"\nwrk.headers["Authorization"] = "Bearer {token}"\n'


def wrk(url: str, script: str, *, connections: int = 64, seconds: float) -> LoadResult:
    """Runs `script` for `seconds`, rounded to whole seconds, at least one.

    Raises RuntimeError if any reply is not a 2xx or a socket fails, ProgramMissing if wrk is not installed.
    """
    program = shutil.which("wrk")
    if program is None:
        raise ProgramMissing("wrk is not installed: apt-get install wrk")
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        output = subprocess.run(
            [
                program,
                "-t1",
                f"-c{connections}",
                f"-d{max(1, round(seconds))}s",
                "--timeout",
                "10s",
                "--latency",
                "-s",
                file.name,
                url,
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(f"{url}: {output}")
    return LoadResult(
        int(_found(r"(\d+) requests in", output)),
        float(_found(r"Requests/sec:\s+([\d.]+)", output)),
        _milliseconds(_found(r"(?m)^\s+50%\s+(\S+)", output)),
        _milliseconds(_found(r"(?m)^\s+99%\s+(\S+)", output)),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no match for {pattern!r} in: {text}")
    return match[1]


def _milliseconds(text: str) -> float:
    for unit, factor in (("us", 0.001), ("ms", 1.0), ("s", 1000.0), ("m", 60_000.0)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise RuntimeError(f"wrk printed {text!r} where a time was expected")


# -- the open loop -----------------------------------------------------------------------------------------------


class SentOrder(Struct):
    """An accepted order. `due` and `answered` are seconds of the monotonic clock."""

    due: float
    order_id: str
    answered: float


async def open_loop(
    host: str,
    port: int,
    restaurants: Sequence[SeededRestaurant],
    *,
    per_second: float,
    seconds: float,
    connections: int = 64,
    into: list[SentOrder] | None = None,
) -> list[SentOrder]:
    """Places orders at constant intervals over persistent connections and returns them when all are answered.

    Adds each order to `into` as soon as it is answered. Raises RuntimeError if one is not accepted.
    """
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(await asyncio.open_connection(host, port))
    sent: list[SentOrder] = [] if into is None else into
    requests = [
        b"POST /api/orders HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nAuthorization: Bearer %b\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (one.token.encode(), len(body), body)
        for number, one in enumerate(restaurants)
        if (body := order_body(one, number))
    ]

    async def send(number: int, due: float) -> None:
        link = await free.get()
        reader, writer = link
        writer.write(requests[number % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(_found(r"(?i)content-length: (\d+)", head.decode()))
        body = await reader.readexactly(length)
        answered = time.monotonic()
        free.put_nowait(link)
        if not head.startswith(b"HTTP/1.1 201"):
            raise RuntimeError(f"{head!r} {body!r}")
        start = body.index(b'"id":"') + 6
        sent.append(SentOrder(due, body[start : start + 36].decode(), answered))

    began = time.monotonic() + 0.05
    async with asyncio.TaskGroup() as group:
        for number in range(int(per_second * seconds)):
            due = began + number / per_second
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(send(number, due))
    while not free.empty():
        free.get_nowait()[1].close()
    return sent


def percentile(samples: Sequence[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def peer_path(name: str) -> Path:
    """Returns the path of a file or folder in benchmarks/peers."""
    return Path(__file__).parent / "peers" / name
