"""Load: a closed loop by wrk (each connection sends when it has its answer), and an open loop of constant arrivals,
whose latency counts from the moment at which a request was due: a server that stalls cannot hide it."""

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
    """A program that is needed is not installed; the message says how to get it."""


class LoadResult(Struct, frozen=True):
    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float


def order_body(restaurant: SeededRestaurant, number: int = 0) -> bytes:
    """Three items, a table and a name: what a terminal sends."""
    dishes = restaurant.menu_item_ids
    items = [{"menu_item_id": dishes[(number + place) % len(dishes)], "quantity": 1 + place} for place in range(3)]
    return json.dumps(
        {"items": items, "table_id": restaurant.table_id, "customer_name": "Ada", "tip_amount": 150},
        separators=(",", ":"),
    ).encode()


def posts(restaurants: Sequence[SeededRestaurant]) -> str:
    """A wrk script that orders at each of the restaurants in turn."""
    made = [
        f'  wrk.format("POST", "/api/orders", {{["Authorization"]="Bearer {one.token}",'
        f' ["Content-Type"]="application/json"}}, {json.dumps(order_body(one, number).decode())}),'
        for number, one in enumerate(restaurants)
    ]
    return (
        "local made, at\ninit = function()\n  at = 0\n  made = {\n" + "\n".join(made) + "\n  }\nend\n"
        "request = function()\n  at = at % #made + 1\n  return made[at]\nend\n"
    )


def gets(path: str, token: str) -> str:
    return f'wrk.method = "GET"\nwrk.path = "{path}"\nwrk.headers["Authorization"] = "Bearer {token}"\n'


def wrk(url: str, script: str, *, connections: int = 64, seconds: float) -> LoadResult:
    """Raises RuntimeError when any answer is not a 2xx."""
    program = shutil.which("wrk")
    if program is None:
        raise ProgramMissing("wrk is not installed: apt-get install wrk")
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        said = subprocess.run(
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
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"{url}: {said}")
    return LoadResult(
        int(_found(r"(\d+) requests in", said)),
        float(_found(r"Requests/sec:\s+([\d.]+)", said)),
        _milliseconds(_found(r"(?m)^\s+50%\s+(\S+)", said)),
        _milliseconds(_found(r"(?m)^\s+99%\s+(\S+)", said)),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"wrk said something else: {text}")
    return match[1]


def _milliseconds(text: str) -> float:
    for unit, factor in (("us", 0.001), ("ms", 1.0), ("s", 1000.0), ("m", 60_000.0)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise RuntimeError(f"not a time: {text}")


# -- the open loop -----------------------------------------------------------------------------------------------


class SentOrder(Struct):
    due: float
    """On the monotonic clock."""
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
    told: list[SentOrder] | None = None,
) -> list[SentOrder]:
    """Orders at constant intervals over kept connections; raises RuntimeError when one is not accepted. `told`: the
    list to add to, for who wants to see each as it is answered."""
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(await asyncio.open_connection(host, port))
    sent: list[SentOrder] = [] if told is None else told
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


def here(name: str) -> Path:
    """A peer's file or folder."""
    return Path(__file__).parent / "peers" / name
