"""How fast do 200 events reach 1,000 connections of one process, and how much memory does an idle connection take?

One restaurant with 1,000 subscribers; 200 created orders of three items, 25 per message as a load records them. The
time runs from the first event at any client to the last event at the last client. The client is the same for every
peer: one thread that reads sockets and counts marks in bytes. Peers: Socket.IO on Node (WebSocket, one room, the same
JSON) and nginx with nchan (C, event stream). A peer that is not installed is reported in its row.
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

from benchmarks.load import ProgramMissing, here
from benchmarks.peers.node import prepared
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
_PER_MESSAGE = 25
_EVENT_MARK = b'"customer_name":"Ada"'
"""Every event contains it once."""
_CONNECT_SECONDS = 10.0
_GREETING_SECONDS = 0.5
"""Time for what a server sends before the first event."""
_CROWD_SECONDS = 60.0
"""Time limit for all deliveries."""
_IDLE_SECONDS = 1.0
"""Between the last connection and the measurement of memory."""
_OPEN_FILES = 16_384
_NCHAN = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")


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
        cases["socketio"] = lambda: _crowd(socketio, _join_socketio, lambda: _post(socketio, "/publish", payload))
    except ProgramMissing as error:
        missing["socketio"] = str(error)
    try:
        peers.append(nchan := _nchan(rig))
        cases["nchan"] = lambda: _crowd(nchan, _join_stream("/sub", ""), lambda: _post_each(nchan, "/pub", payload))
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


# -- the crowd ---------------------------------------------------------------------------------------------------

Join = Callable[[socket.socket], bytes]
"""Connects one socket and returns the mark that every event carries."""


def _crowd(server: RunningProgram, join: Join, publish: Callable[[], None]) -> float:
    """Deliveries per second of what `publish` sends."""
    selector = selectors.DefaultSelector()
    links = []
    mark = b""
    buffer = bytearray(1 << 20)
    for _ in range(_CONNECTIONS):
        link = _connect(server)
        mark = join(link)
        link.setblocking(False)
        selector.register(link, selectors.EVENT_READ, [b""])
        links.append(link)
    time.sleep(_GREETING_SECONDS)
    thread = threading.Thread(target=publish)
    first = last = 0.0
    wanted = _CONNECTIONS * _EVENTS
    seen = 0
    thread.start()
    deadline = time.monotonic() + _CROWD_SECONDS
    while seen < wanted:
        for key, _ in selector.select(1.0):
            try:
                size = key.fileobj.recv_into(buffer)  # type: ignore[union-attr]
            except BlockingIOError:
                continue
            if not size:
                raise RuntimeError("the server closed a connection")
            around = len(mark) - 1
            # Count whole marks in place, without a copy, and a mark that was split between two reads.
            count = buffer.count(mark, 0, size) + (key.data[0] + buffer[: min(around, size)]).count(mark)
            key.data[0] = (key.data[0] + bytes(buffer[max(0, size - around) : size]))[-around:]
            if count:
                last = time.monotonic()
                first = first or last
                seen += count
        if time.monotonic() > deadline:
            raise RuntimeError(f"{seen} of {wanted} deliveries within {_CROWD_SECONDS:.0f} s")
    thread.join()
    for link in links:
        link.close()
    selector.close()
    return wanted / max(last - first, 1e-6)


def _connect(server: RunningProgram) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=_CONNECT_SECONDS)


def _join_stream(path: str, token: str) -> Join:
    head = (
        f"GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n"
        + (f"Authorization: Bearer {token}\r\n" if token else "")
        + "\r\n"
    ).encode()

    def join(link: socket.socket) -> bytes:
        link.sendall(head)
        _read_until(link, b"\r\n\r\n")
        return _EVENT_MARK

    return join


def _join_socketio(link: socket.socket) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    link.sendall(
        f"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    _read_until(link, b'"sid"')
    link.sendall(bytes((0x81, 0x82, 0, 0, 0, 0)) + b"40")  # joins the default namespace; masked with zeros
    _read_until(link, b"40{")
    return _EVENT_MARK


def _read_until(link: socket.socket, mark: bytes) -> None:
    got = b""
    while mark not in got:
        piece = link.recv(65_536)
        if not piece:
            raise RuntimeError(f"the server closed the connection after {got!r}")
        got += piece


# -- ours --------------------------------------------------------------------------------------------------------


def _ours(rig: BenchmarkRig, notifier: RunningProgram) -> float:
    made = encoded_orders(rig.restaurants[:1], _EVENTS)

    async def publish() -> None:
        async with await aio_pika.connect(rig.rabbitmq_url) as connection:
            exchange = await (await connection.channel()).get_exchange(CHANGES, ensure=False)
            for start in range(0, _EVENTS, _PER_MESSAGE):
                body = encode_batch(made[start : start + _PER_MESSAGE])
                await exchange.publish(aio_pika.Message(body, content_type=CONTENT_TYPE), "critical")

    join = _join_stream("/api/v1/sync/events", rig.restaurants[0].token)
    return _crowd(notifier, join, lambda: run_async(publish()))


def _memory(rig: BenchmarkRig, notifier: RunningProgram) -> float:
    """Kilobytes by which the server's processes grow for each of the second 1,000 idle streams.

    The first 1,000 are not counted: they allocate what all streams share.
    """

    def used() -> int:
        total = 0
        for process in (root := psutil.Process(notifier.pid), *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().uss
        return total

    join = _join_stream("/api/v1/sync/events", rig.restaurants[0].token)

    def crowd() -> list[socket.socket]:
        links = [_connect(notifier) for _ in range(_CONNECTIONS)]
        for link in links:
            join(link)
        return links

    first = crowd()
    time.sleep(_IDLE_SECONDS)
    before = used()
    links = crowd()
    time.sleep(_IDLE_SECONDS)
    grown = (used() - before) / _CONNECTIONS / 1024
    for link in (*links, *first):
        link.close()
    return grown


# -- peers -------------------------------------------------------------------------------------------------------


def _socketio(rig: BenchmarkRig) -> RunningProgram:
    folder = here("socketio")
    node = prepared(folder)
    (port,) = find_free(1)
    env = {**os.environ, "BENCH_PORT": str(port), "NODE_ENV": "production"}
    try:
        return rig.program([node, "server.js"], env, port, name="socketio", cwd=folder)
    except NotReady as error:
        raise ProgramMissing(f"Socket.IO does not start: {error}") from error


def _nchan(rig: BenchmarkRig) -> RunningProgram:
    nginx = shutil.which("nginx")
    if nginx is None or not _NCHAN.exists():
        raise ProgramMissing("nginx with nchan is not installed: apt-get install nginx libnginx-mod-nchan")
    (port,) = find_free(1)
    folder = rig.folder / "nchan"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)  # as root, nginx runs its worker as another user
    config = folder / "nginx.conf"
    template = here("nchan.conf.template").read_text()
    config.write_text(template.format(module=_NCHAN, port=port, folder=folder))
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
