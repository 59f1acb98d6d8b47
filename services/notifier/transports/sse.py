"""Server-sent events: `GET /api/v1/sync/events`.

The first event is `connected`, keep-alives are comments, and the id of an event is its cursor. The stream is raw ASGI
below Litestar's route, without a generator, task group or timer per client. It needs no second task to notice a
disconnect, because Granian's `receive` returns a future (`_DisconnectWatch`). Everything that waits for a client goes
out in one write. If a client does not read, its buffer fills up and the hub disconnects it.

The stream ends when the client disconnects, when the hub ends it (services/notifier/streams.py), and at shutdown.
Unless the client left, the last event is `closing`. The client's reconnect (`Last-Event-ID`) then resumes on any
instance.
"""

import asyncio
import re
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import uuid4

from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Meta, Struct, field

from services.notifier.cursor import PATTERN, Cursor, parse_cursor
from services.notifier.events import KINDS, PushEvent
from services.notifier.follower import LogFollower
from services.notifier.hub import Form, Hub, Subscriber
from services.notifier.interest import Interest, interest_of
from services.notifier.streams import OpenStreams
from shared.entities.contract import encode
from shared.errors import InvalidInput, Unavailable
from shared.http.call import Call
from shared.http.endpoint import ANY_TEXT, endpoint, read_query
from shared.http.origins import AllowedOrigins
from shared.security.tokens import Grant

# A cursor may be ahead of this instance, because another instance has read further. This instance waits this long for
# it.
_AHEAD_TIMEOUT_SECONDS = 2.0

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def _event(event: PushEvent, interest: Interest) -> bytes:
    of_one_order = interest.order_id is not None
    name = event.name(of_one_order=of_one_order)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (
        str(event.cursor).encode(),
        name.encode(),
        event.payload(of_one_order=of_one_order, holds=interest.holds),
    )


def _control_event(name: str, cursor: Cursor, **data: Any) -> bytes:
    """Encodes an event without a change. Its id lets the client resume even before the first change."""
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (
        str(cursor).encode(),
        name.encode(),
        encode({**data, "cursor": str(cursor)}),
    )


def _closing(reason: str, retry_after: float) -> bytes:
    """Encodes the last event. It has no id, so that the client resumes after the last change that it got."""
    return b"event: closing\ndata: %b\n\n" % encode({"reason": reason, "retryAfter": round(retry_after, 1)})


FORM = Form(
    event=_event,
    resync=lambda reason, cursor: _control_event("resync", cursor, reason=reason),
    keep_alive=lambda cursor: b": keep-alive\nid: %b\n\n" % str(cursor).encode(),
    closing=_closing,
)


_NAMES = "|".join(KINDS)
_CLIENT_ID = r"[\x21-\x7e]{1,64}"
_UUID = "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"


class EventsQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    """Empty parameters count as absent. The patterns only document them: `interest_of` says what is wrong, and a cursor
    is never refused."""

    order_id: Annotated[str, Meta(extra_json_schema={"pattern": f"^({_UUID})?$"})] = field(default="", name="orderID")
    event_types: list[
        Annotated[
            str,
            Meta(
                extra_json_schema={"pattern": f"^(({_NAMES})(,({_NAMES}))*)?$"},
                description="names, separated by commas",
            ),
        ]
    ] = field(default_factory=list, name="eventTypes")
    last_event_id: Annotated[
        str,
        Meta(
            description="the cursor of the last received event; after another text, the stream begins with resync",
            extra={ANY_TEXT: True},
        ),
    ] = field(default="", name="lastEventId")
    client_id: Annotated[
        str,
        Meta(
            extra_json_schema={"pattern": f"^({_CLIENT_ID})?$"},
            description="names this client; a later stream of the same user with this name replaces the older one",
        ),
    ] = field(default="", name="clientId")


class StreamEvent(Struct):
    """One event of the stream. `data` is a JSON object. `connected` has {"restaurantId", "clientId", "expiresAt",
    "cursor"}, `resync` has {"reason", "cursor"}, `closing` has {"reason", "retryAfter": seconds} and no id, and all
    others have {"eventType", "data": the order, "orderID", "timestamp", "version", "traceId"}."""

    id: Annotated[
        str,
        Meta(
            pattern=f"^{PATTERN}$",
            description="the cursor, for Last-Event-ID",
            examples=["911-48b87745-0"],
        ),
    ]
    event: Annotated[str, Meta(extra_json_schema={"enum": ["connected", "resync", "closing", *KINDS]})]
    data: Annotated[
        str,
        Meta(
            extra_json_schema={"contentMediaType": "application/json"},
            examples=['{"restaurantId":"7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11","cursor":"911-48b87745-0"}'],
        ),
    ]


@endpoint(
    "GET",
    "/api/v1/sync/events",
    action="events.follow",
    tag="Events",
    summary="Follow all changes as server-sent events",
    description="The first event is `connected`. Then every change is an event. After a `resync`, load all data again. "
    "The last event is `closing`, with the reason: `expired` (get a new token), `revoked` (sign in again), `replaced` "
    "(another stream has the same clientId), `slow` or `restart`. Above the number of streams that a user, a guest "
    "session or a restaurant may have, the reply is 429.",
    query=EventsQuery,
    answer=StreamEvent,
    media_type="text/event-stream",
    headers=("Last-Event-ID",),
    errors=(422, 429, 503),
)
async def events(request: Call) -> ASGIApp:
    # Both come from the application's state, because Litestar's dependency injection opens a task group per request.
    hub: Hub = request.app.state["hub"]
    follower: LogFollower = request.app.state["follower"]
    streams: OpenStreams = request.app.state["streams"]
    origins: AllowedOrigins = request.app.state["origins"]
    origins.check(request.scope["headers"])
    query = read_query(request, EventsQuery)
    interest = interest_of(request.identity, order_id=query.order_id, event_types=query.event_types)
    # The header wins, because a browser that reconnects repeats its first query. An empty value counts as absent.
    last_event_id = request.header(b"last-event-id") or query.last_event_id
    cursor = parse_cursor(last_event_id) if last_event_id else None
    client_id = query.client_id or str(uuid4())
    if not re.fullmatch(_CLIENT_ID, client_id):
        raise InvalidInput("must have 1 to 64 visible ASCII characters", field="clientId")
    if not follower.serving:
        raise Unavailable("the recent changes are still being loaded", code="not_caught_up")
    if cursor is not None:
        await hub.reached(cursor, within=_AHEAD_TIMEOUT_SECONDS)
    return _Stream(hub, streams, request.grant, client_id, interest, cursor)


class _Stream:
    __slots__ = ("_client_id", "_cursor", "_grant", "_hub", "_interest", "_streams")

    def __init__(
        self,
        hub: Hub,
        streams: OpenStreams,
        grant: Grant,
        client_id: str,
        interest: Interest,
        cursor: Cursor | None,
    ) -> None:
        self._hub = hub
        self._streams = streams
        self._grant = grant
        self._client_id = client_id
        self._interest = interest
        self._cursor = cursor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A refusal by `open` becomes an error reply, because the response has not begun.
        stream = self._streams.open(self._grant, self._client_id, self._interest, FORM, self._cursor)
        subscriber = stream.subscriber
        cursor = self._cursor or self._hub.window.present
        subscriber.task = asyncio.current_task()
        disconnect_watch = _DisconnectWatch(receive, self._hub, subscriber)
        disconnect_watch.watch()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await _write(send, self._connected(cursor))
            while (missed := self._hub.resume(subscriber)) is not None:
                if missed:
                    await _write(send, missed)
            while not subscriber.idle or not subscriber.ended:
                if chunk := subscriber.take():
                    await _write(send, chunk)
                else:
                    await subscriber.wait()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not subscriber.ended:
                raise
            # The hub or _DisconnectWatch cancelled this task: the client has disconnected, or has not read its last
            # bytes.
            if subscriber.task is not None:
                subscriber.task.uncancel()
        finally:
            subscriber.task = None
            self._streams.leave(stream)
            disconnect_watch.cancel()

    def _connected(self, cursor: Cursor) -> bytes:
        return _control_event(
            "connected",
            cursor,
            restaurantId=self._interest.tenant,
            clientId=self._client_id,
            expiresAt=datetime.fromtimestamp(self._grant.expires_at, UTC),
        )


async def _write(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})


class _DisconnectWatch:
    """Ends a subscription when its client disconnects, because sending to a disconnected client raises no error."""

    __slots__ = ("_hub", "_receive", "_received", "_subscriber")

    def __init__(self, receive: Receive, hub: Hub, subscriber: Subscriber) -> None:
        self._receive = receive
        self._hub = hub
        self._subscriber = subscriber

    def watch(self) -> None:
        # Granian returns a future, so no task is needed. A task would cost 2.5 KB for each idle stream.
        self._received: asyncio.Future[Any] = asyncio.ensure_future(self._receive())
        self._received.add_done_callback(self._on_received)

    def _on_received(self, received: "asyncio.Future[Any]") -> None:
        if received.cancelled():
            return
        if received.exception() is None and received.result()["type"] != "http.disconnect":
            self.watch()
            return
        self._hub.unsubscribe(self._subscriber)
        self._subscriber.clear()
        if self._subscriber.task is not None:
            self._subscriber.task.cancel()

    def cancel(self) -> None:
        self._received.cancel()
