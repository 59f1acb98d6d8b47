"""How fast do 200 events reach 1,000 connections of one process, and how much memory does an idle connection take?

One restaurant has 1,000 subscribers. The benchmark publishes 200 created orders of three items, 25 per message as under
load. The time runs from the first event at any client to the last event at the last client. All servers are measured
with the same client: one thread that reads sockets and counts a byte pattern. The peers are Socket.IO on Node
(WebSocket, one room, the same JSON) and nginx with nchan (C, event stream). A peer that is not installed is reported in
its row.
"""

import base64
import contextlib
import http.client
import json
import os
import resource
import selectors
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import psutil

from benchmarks.load import ProgramMissing, peer_path
from benchmarks.peers.node import install_packages
from benchmarks.question import BenchmarkPlan, ResultRow, compared, interleave, not_run
from benchmarks.random_orders import encoded_orders
from benchmarks.rig import BenchmarkRig, NotReady, RunningProgram
from benchmarks.rig import run as run_async
from deploy.local.port_check import find_free
from shared.entities.contract import CONTENT_TYPE, encode_batch, split_batch
from shared.messaging.topology import CHANGES

QUESTION = "push"
_CONNECTIONS = 1_000
_EVENTS = 200
_EVENTS_PER_MESSAGE = 25
_EVENT_PATTERN = b'"customer_name":"Ada"'
"""Bytes that every event contains exactly once."""
_CONNECT_TIMEOUT_SECONDS = 10.0
_GREETING_SECONDS = 0.5
"""The wait before the first event, so that the greetings of the server have arrived."""
_DELIVERIES_TIMEOUT_SECONDS = 60.0
_IDLE_SECONDS = 1.0
"""The wait between the last connection and the measurement of memory."""
_OPEN_FILES = 16_384
_NCHAN_MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _OPEN_FILES), hard))
    notifier = rig.service("notifier", client_buffer_events=5_000, client_buffer_bytes=16 << 20)
    cases: dict[str, Callable[[], float]] = {"rail": lambda: _ours(rig, notifier)}
    missing: dict[str, str] = {}
    peers: list[RunningProgram] = []
    payload = encode_batch(encoded_orders(rig.restaurants[:1], _EVENTS))
    try:
        peers.append(socketio := _socketio(rig))
        cases["socketio"] = lambda: _measure_deliveries(
            socketio, _join_socketio, lambda: _post(socketio, "/publish", payload)
        )
    except ProgramMissing as error:
        missing["socketio"] = str(error)
    try:
        peers.append(nchan := _nchan(rig))
        cases["nchan"] = lambda: _measure_deliveries(
            nchan, _join_stream("/sub", ""), lambda: _post_each(nchan, "/pub", payload)
        )
    except ProgramMissing as error:
        missing["nchan"] = str(error)
    memory = [_memory(rig, notifier)]
    found = interleave(plan.rounds, cases)
    notifier.stop()
    for peer in peers:
        peer.stop()
    rows = [compared(QUESTION, "an idle connection", "memory", "KB", memory, at_most=20.0)]
    for name, label, bound in (("socketio", "Socket.IO on Node", 1.5), ("nchan", "nginx with nchan", 0.5)):
        if name in found:
            rows.append(
                compared(QUESTION, "200 events to 1,000", "throughput", "deliveries/s", found["rail"], label,
                         found[name], at_least=bound)
            )  # fmt: skip
        else:
            rows.append(not_run(QUESTION, "200 events to 1,000", label, missing[name], f"≥ {bound:g}×"))
    return rows


# -- the subscribers ---------------------------------------------------------------------------------------------

Join = Callable[[socket.socket], bytes]
"""Subscribes on a socket and returns the byte pattern that every event contains."""


def _measure_deliveries(server: RunningProgram, join: Join, publish: Callable[[], None]) -> float:
    """Returns how many deliveries per second the server makes of the events that `publish` sends."""
    selector = selectors.DefaultSelector()
    links = []
    pattern = b""
    buffer = bytearray(1 << 20)
    for _ in range(_CONNECTIONS):
        link = _connect(server)
        pattern = join(link)
        link.setblocking(False)
        selector.register(link, selectors.EVENT_READ, [b""])
        links.append(link)
    time.sleep(_GREETING_SECONDS)
    thread = threading.Thread(target=publish)
    first = last = 0.0
    expected = _CONNECTIONS * _EVENTS
    seen = 0
    thread.start()
    deadline = time.monotonic() + _DELIVERIES_TIMEOUT_SECONDS
    while seen < expected:
        for key, _ in selector.select(1.0):
            try:
                size = key.fileobj.recv_into(buffer)  # type: ignore[union-attr]
            except BlockingIOError:
                continue
            if not size:
                raise RuntimeError("the server closed a connection")
            overlap = len(pattern) - 1
            # Count the patterns in the buffer without a copy, and also one that is split between two reads.
            count = buffer.count(pattern, 0, size) + (key.data[0] + buffer[: min(overlap, size)]).count(pattern)
            key.data[0] = (key.data[0] + bytes(buffer[max(0, size - overlap) : size]))[-overlap:]
            if count:
                last = time.monotonic()
                first = first or last
                seen += count
        if time.monotonic() > deadline:
            raise RuntimeError(f"{seen} of {expected} deliveries within {_DELIVERIES_TIMEOUT_SECONDS:.0f} s")
    thread.join()
    for link in links:
        link.close()
    selector.close()
    return expected / max(last - first, 1e-6)


def _connect(server: RunningProgram) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=_CONNECT_TIMEOUT_SECONDS)


def _join_stream(path: str, token: str) -> Join:
    head = (
        f"GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n"
        + (f"Authorization: Bearer {token}\r\n" if token else "")
        + "\r\n"
    ).encode()

    def join(link: socket.socket) -> bytes:
        link.sendall(head)
        _read_until(link, b"\r\n\r\n")
        return _EVENT_PATTERN

    return join


def _join_socketio(link: socket.socket) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    link.sendall(
        f"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    _read_until(link, b'"sid"')
    link.sendall(bytes((0x81, 0x82, 0, 0, 0, 0)) + b"40")  # joins the default namespace, with a mask of zeros
    _read_until(link, b"40{")
    return _EVENT_PATTERN


def _read_until(link: socket.socket, pattern: bytes) -> None:
    got = b""
    while pattern not in got:
        chunk = link.recv(65_536)
        if not chunk:
            raise RuntimeError(f"the server closed the connection after {got!r}")
        got += chunk


# -- ours --------------------------------------------------------------------------------------------------------


def _ours(rig: BenchmarkRig, notifier: RunningProgram) -> float:
    events = encoded_orders(rig.restaurants[:1], _EVENTS)

    async def publish() -> None:
        async with await aio_pika.connect(rig.rabbitmq_url) as connection:
            exchange = await (await connection.channel()).get_exchange(CHANGES, ensure=False)
            for start in range(0, _EVENTS, _EVENTS_PER_MESSAGE):
                body = encode_batch(events[start : start + _EVENTS_PER_MESSAGE])
                await exchange.publish(aio_pika.Message(body, content_type=CONTENT_TYPE), "critical")

    join = _join_stream("/api/v1/sync/events", rig.restaurants[0].token)
    return _measure_deliveries(notifier, join, lambda: run_async(publish()))


def _memory(rig: BenchmarkRig, notifier: RunningProgram) -> float:
    """Returns the kilobytes by which the notifier's processes grow for each idle stream.

    It measures the second 1,000 streams, because the first 1,000 allocate what all streams share.
    """

    def used() -> int:
        total = 0
        for process in (root := psutil.Process(notifier.pid), *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().uss
        return total

    join = _join_stream("/api/v1/sync/events", rig.restaurants[0].token)

    def connect_all() -> list[socket.socket]:
        links = [_connect(notifier) for _ in range(_CONNECTIONS)]
        for link in links:
            join(link)
        return links

    first = connect_all()
    time.sleep(_IDLE_SECONDS)
    before = used()
    links = connect_all()
    time.sleep(_IDLE_SECONDS)
    grown = (used() - before) / _CONNECTIONS / 1024
    for link in (*links, *first):
        link.close()
    return grown


# -- peers -------------------------------------------------------------------------------------------------------


def _socketio(rig: BenchmarkRig) -> RunningProgram:
    folder = peer_path("socketio")
    node = install_packages(folder)
    (port,) = find_free(1)
    env = {**os.environ, "BENCH_PORT": str(port), "NODE_ENV": "production"}
    try:
        return rig.program([node, "server.js"], env, port, name="socketio", cwd=folder)
    except NotReady as error:
        raise ProgramMissing(f"Socket.IO does not start: {error}") from error


def _nchan(rig: BenchmarkRig) -> RunningProgram:
    nginx = shutil.which("nginx")
    if nginx is None or not _NCHAN_MODULE.exists():
        raise ProgramMissing("nginx with nchan is not installed: apt-get install nginx libnginx-mod-nchan")
    (port,) = find_free(1)
    folder = rig.folder / "nchan"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)  # if root starts nginx, its worker runs as another user
    config = folder / "nginx.conf"
    template = peer_path("nchan.conf.template").read_text()
    config.write_text(template.format(module=_NCHAN_MODULE, port=port, folder=folder))
    command = [nginx, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
    try:
        return rig.program(command, dict(os.environ), port, name="nchan")
    except NotReady as error:
        raise ProgramMissing(f"nginx with nchan does not start: {error}") from error


def _post(server: RunningProgram, path: str, body: bytes) -> None:
    address = urlsplit(server.url)
    link = http.client.HTTPConnection(str(address.hostname), address.port)
    link.request("POST", path, body, {"Content-Type": "application/json"})
    reply = link.getresponse()
    if reply.status >= 300:
        raise RuntimeError(f"{path}: {reply.status} {reply.read()!r}")
    link.close()


def _post_each(server: RunningProgram, path: str, body: bytes) -> None:
    address = urlsplit(server.url)
    link = http.client.HTTPConnection(str(address.hostname), address.port)
    for event in split_batch(body):
        after = json.dumps(json.loads(event)["data"]["after"], separators=(",", ":"))
        link.request("POST", path, f'{{"eventType":"order_created","data":{after}}}'.encode())
        reply = link.getresponse()
        reply.read()
        if reply.status >= 300:
            raise RuntimeError(f"{path}: {reply.status}")
    link.close()
