"""Notifier processes with their own change log, and clients that listen, resume or read nothing."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aio_pika
import httpx

from deploy.local.port_check import find_free
from shared.entities.contract import Change, Lane, now
from shared.entities.order import Order, OrderStatus
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.messaging import declare
from shared.messaging.topology import CHANGES, LOG
from shared.security.tokens import Identity, Role, Tokens
from shared.settings import Settings
from tests.rigs import zygote
from tests.rigs.builders import RESTAURANT, change, message, order, with_status
from tests.rigs.http_client import http_client
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

SECRET = "a-secret-for-tests-that-is-long-enough"
TOPOLOGY = Settings(change_log_segment_bytes=1_000_000)
TOKENS = Tokens(SECRET, ttl_seconds=3600)


def token(role: Role = Role.STAFF, *, restaurant: str = RESTAURANT, session: str | None = None) -> str:
    return TOKENS.issue(Identity(user_id="u-1", role=role, restaurant_id=restaurant, session_id=session))


class Event:
    def __init__(self, id_: str, name: str, data: dict[str, Any]) -> None:
        self.id, self.name, self.data = id_, name, data

    def __repr__(self) -> str:
        return f"{self.name}@{self.id} {self.data.get('orderID', self.data)}"


class Screen:
    """A client of the push stream that parses it as a browser does."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.events: list[Event] = []
        self.comments = 0
        self.last_event_id = ""
        self.ended = False
        self._more = asyncio.Event()

    async def listen(self) -> None:
        fields: dict[str, str] = {}
        try:
            async for line in self.response.aiter_lines():
                if line.startswith(":"):
                    self.comments += 1
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                else:
                    self.last_event_id = fields.get("id", self.last_event_id)
                    if "data" in fields:
                        event = Event(self.last_event_id, fields["event"], json.loads(fields["data"]))
                        self.events.append(event)
                    fields = {}
                self._more.set()
        except httpx.HTTPError as error:
            self.events.append(Event("", "broken", {"error": repr(error)}))
        self.ended = True
        self._more.set()

    async def until(self, condition: Callable[[], bool], within: float = 15.0) -> None:
        try:
            async with asyncio.timeout(within):
                while not condition():
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"not received; stream ended: {self.ended}; events: {self.events[-10:]}") from None

    async def first(self, count: int) -> list[Event]:
        """Waits for the first `count` events after `connected`; returns them."""
        await self.until(lambda: len(self.events) > count)
        return self.events[1 : count + 1]

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events[1:]]


class NotifierRig:
    """A vhost with the topology, and notifiers that use it, for one test."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers = servers
        self.folder = folder
        self.name = f"notifier-{uuid4().hex[:8]}"
        self.url = ""
        self.notifiers: list[Notifier] = []

    async def make(self, *, with_log: bool = True) -> None:
        self.url = await asyncio.to_thread(self.servers.rabbitmq.make_vhost, self.name)
        async with await declare.connect(self.url) as connection:
            await declare.declare(connection, TOPOLOGY)
            if with_log:
                await declare.declare_logs(connection, TOPOLOGY)

    async def clean(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(notifier.child.kill) for notifier in self.notifiers))
        await asyncio.to_thread(self.servers.rabbitmq.delete_vhost, self.name)

    @asynccontextmanager
    async def publishing(self, lane: Lane = Lane.CRITICAL) -> AsyncIterator[Callable[..., Awaitable[None]]]:
        """Yields a function that publishes message bodies over one open connection."""
        async with await declare.connect(self.url) as connection:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            exchange = await channel.get_exchange(CHANGES, ensure=False)

            async def publish(*bodies: bytes, message_id: str = "") -> None:
                for body in bodies:
                    sent = aio_pika.Message(body, message_id=message_id or uuid4().hex)
                    await exchange.publish(sent, lane.value, timeout=10)

            yield publish

    async def send(self, *bodies: bytes, lane: Lane = Lane.CRITICAL) -> None:
        async with self.publishing(lane) as publish:
            await publish(*bodies)

    async def publish_each(self, *changes: Change) -> None:
        """Publishes each change in its own message."""
        await self.send(*(message(change) for change in changes))

    async def heartbeat(self) -> None:
        await self.send(encode_signal(Signal(id=str(uuid4()), type=HEARTBEAT, time=now(), lane="critical")))

    async def recreate_log(self) -> None:
        async with await declare.connect(self.url) as connection:
            await (await connection.channel()).queue_delete(LOG)
            await declare.declare_logs(connection, TOPOLOGY)

    async def notifier(self, *, wait: bool = True, **settings: object) -> "Notifier":
        notifier = Notifier(self, find_free(1)[0], settings)
        self.notifiers.append(notifier)
        if wait:
            await notifier.ready()
        return notifier


class Notifier:
    def __init__(self, rig: NotifierRig, port: int, settings: dict[str, object]) -> None:
        self.base = f"http://127.0.0.1:{port}"
        chosen = {
            "rabbitmq_url": rig.url,
            "notifier_port": port,
            "jwt_secret": SECRET,
            "heartbeat_interval_seconds": 0.3,
            **settings,
        }
        self.child = zygote.spawn(
            ["services.notifier"],
            log=rig.folder / f"notifier-{port}.log",
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith("TICKETRAIL_")},
                **{f"TICKETRAIL_{key.upper()}": str(value) for key, value in chosen.items()},
            },
        )

    async def health(self) -> tuple[int, dict[str, Any]]:
        async with http_client() as client:
            answer = await client.get(f"{self.base}/health/ready", timeout=5)
            return answer.status_code, answer.json()

    async def ready(self) -> None:
        try:
            await eventually(
                self.health, within=30, what="a notifier that is ready", until=lambda health: health[0] == 200
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.child.tail(30)}") from None

    async def subscribers(self) -> int:
        return int((await self.health())[1]["subscribers"])

    async def has_cut_client(self) -> bool:
        return '"event": "subscriber_writing_cancelled"' in self.child.tail(5)

    async def get(self, path: str = "/api/v1/sync/events", *, by: str | None = None, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {by or token()}", **more.pop("headers", {})}
        async with (
            http_client() as client,
            client.stream("GET", self.base + path, headers=headers, timeout=5, **more) as response,
        ):
            if response.status_code != 200:
                await response.aread()
            return response

    @asynccontextmanager
    async def screen(
        self, *, by: str | None = None, after: str | None = None, asked: asyncio.Event | None = None, **params: str
    ) -> AsyncIterator[Screen]:
        """`screen_at` this notifier."""
        async with screen_at(self.base, by or token(), after=after, asked=asked, **params) as screen:
            yield screen


@asynccontextmanager
async def screen_at(
    base: str, by: str, *, after: str | None = None, asked: asyncio.Event | None = None, **params: str
) -> AsyncIterator[Screen]:
    """Yields a client of the notifier at `base` that has received `connected`. It sends the token `by`, and `after` as
    its `Last-Event-ID`. `asked` is set when it has sent the request."""

    async def trace(event: str, _: Any) -> None:
        if asked is not None and event == "http11.send_request_headers.complete":
            asked.set()

    headers = {"Authorization": f"Bearer {by}"}
    if after is not None:
        headers["Last-Event-ID"] = after
    timeout = httpx.Timeout(5.0, read=60.0)
    async with (
        http_client(timeout=timeout) as client,
        client.stream(
            "GET", f"{base}/api/v1/sync/events", params=params, headers=headers, extensions={"trace": trace}
        ) as response,
    ):
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {(await response.aread()).decode()}")
        screen = Screen(response)
        listening = asyncio.create_task(screen.listen())
        try:
            await screen.until(lambda: bool(screen.events))
            yield screen
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


def moved(base: Change, state: Order, status: OrderStatus) -> tuple[Change, Order]:
    after = with_status(state, status)
    return change(after, event="status_changed", base=base, before=state), after


async def resume(
    notifier: Notifier, cursor: str, count: int, *, asked: asyncio.Event | None = None, within: float = 150.0
) -> list[str]:
    """Resumes at the cursor; returns the order ids of the first `count` events, or the names of events without one."""
    async with notifier.screen(after=cursor, asked=asked) as screen:
        await screen.until(lambda: len(screen.events) > count, within=within)
        return [event.data.get("orderID", event.name) for event in screen.events]


@asynccontextmanager
async def silent_client(notifier: Notifier) -> AsyncIterator[asyncio.StreamReader]:
    """Yields a connection whose client reads nothing: first the kernel's buffers fill, then its buffer in the
    notifier."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(notifier.base.rsplit(":", 1)[1]), limit=1_024)
    before = await notifier.subscribers()
    writer.write(f"GET /api/v1/sync/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token()}\r\n\r\n".encode())
    await eventually(notifier.subscribers, until=lambda count: count > before, what="a further subscriber")
    yield reader
    writer.close()


async def flood(rig: NotifierRig, notifier: Notifier) -> int:
    """Publishes large orders until the notifier disconnects a subscriber; returns the number of orders. Sends two at a
    time, because the subscriber has only two seconds to read the end of its stream."""
    before = await notifier.subscribers()
    sent = 0
    async with rig.publishing() as publish:
        while await notifier.subscribers() == before:
            await publish(*(message(change(order(items=400))) for _ in range(2)))
            sent += 2
            assert sent < 1_000, "no subscriber was disconnected"
    return sent


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """Reads a stream to its end; returns its last bytes, or nothing if the connection was cut."""
    received = b""
    async with asyncio.timeout(60):
        while not received.endswith(b"\r\n0\r\n\r\n"):
            try:
                data = await reader.read(1 << 20)
            except ConnectionResetError:
                return b""
            if not data:
                return b""
            received = (received + data)[-1_000:]
    return received
