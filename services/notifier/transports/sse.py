"""Server-sent events: `GET /api/v1/sync/events`.

The first event is `connected`, keep-alives are comments, and the id of an event is its cursor. The stream is raw ASGI
below Litestar's route, without a generator, task group or timer per client. It needs no second task to notice a
disconnect, because Granian's `receive` returns a future (`_DisconnectWatch`). Everything that waits for a client goes
out in one write. If a client does not read, its buffer fills up and the hub disconnects it.

The stream ends when the client disconnects, when the hub ends it, and at shutdown. The client's reconnect
(`Last-Event-ID`) then resumes on any instance.
"""

import asyncio
from typing import Annotated, Any

from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Meta, Struct, field

from services.notifier.cursor import PATTERN, Cursor, parse_cursor
from services.notifier.events import KINDS, PushEvent
from services.notifier.follower import LogFollower
from services.notifier.hub import Form, Hub, Subscriber
from services.notifier.interest import Interest, interest_of
from shared.entities.contract import encode
from shared.errors import Unavailable
from shared.http.call import Call
from shared.http.endpoint import endpoint, read_query

# A cursor may be ahead of this instance, because another instance has read further. This instance waits this long for
# it.
_AHEAD_TIMEOUT_SECONDS = 2.0

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def _event(event: PushEvent, of_one_order: bool) -> bytes:
    name = event.name(of_one_order=of_one_order)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (
        str(event.cursor).encode(),
        name.encode(),
        event.payload(of_one_order=of_one_order),
    )


def _control_event(name: str, cursor: Cursor, **data: Any) -> bytes:
    """Encodes an event without a change. Its id lets the client resume even before the first change."""
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (
        str(cursor).encode(),
        name.encode(),
        encode({**data, "cursor": str(cursor)}),
    )


FORM = Form(
    event=_event,
    resync=lambda reason, cursor: _control_event("resync", cursor, reason=reason),
    keep_alive=lambda cursor: b": keep-alive\nid: %b\n\n" % str(cursor).encode(),
)


_NAMES = "|".join(KINDS)
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
        Meta(description="the cursor of the last received event; after another text, the stream begins with resync"),
    ] = field(default="", name="lastEventId")


class StreamEvent(Struct):
    """One event of the stream. `data` is a JSON object. `connected` has {"restaurantId", "cursor"}, `resync` has
    {"reason", "cursor"}, and all others have {"eventType", "data": the order, "orderID", "timestamp", "version",
    "traceId"}."""

    id: Annotated[
        str,
        Meta(
            pattern=f"^{PATTERN}$",
            description="the cursor, for Last-Event-ID",
            examples=["911-48b87745-0"],
        ),
    ]
    event: Annotated[str, Meta(extra_json_schema={"enum": ["connected", "resync", *KINDS]})]
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
    description="The first event is `connected`. Then every change is an event. After a `resync`, load all data again.",
    query=EventsQuery,
    answer=StreamEvent,
    media_type="text/event-stream",
    headers=("Last-Event-ID",),
    errors=(422,),
)
async def events(request: Call) -> ASGIApp:
    # Both come from the application's state, because Litestar's dependency injection opens a task group per request.
    hub: Hub = request.app.state["hub"]
    follower: LogFollower = request.app.state["follower"]
    query = read_query(request, EventsQuery)
    interest = interest_of(request.identity, order_id=query.order_id, event_types=query.event_types)
    # The header wins, because a browser that reconnects repeats its first query. An empty value counts as absent.
    last_event_id = request.header(b"last-event-id") or query.last_event_id
    cursor = parse_cursor(last_event_id) if last_event_id else None
    if not follower.serving:
        raise Unavailable("the recent changes are still being loaded", code="not_caught_up")
    if cursor is not None:
        await hub.reached(cursor, within=_AHEAD_TIMEOUT_SECONDS)
    return _Stream(hub, interest, cursor)


class _Stream:
    __slots__ = ("_cursor", "_hub", "_interest")

    def __init__(self, hub: Hub, interest: Interest, cursor: Cursor | None) -> None:
        self._hub = hub
        self._interest = interest
        self._cursor = cursor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        subscriber = self._hub.subscribe(self._interest, FORM, self._cursor)
        cursor = self._cursor or self._hub.window.present
        subscriber.task = asyncio.current_task()
        disconnect_watch = _DisconnectWatch(receive, self._hub, subscriber)
        disconnect_watch.watch()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await _write(send, _control_event("connected", cursor, restaurantId=self._interest.tenant))
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
            self._hub.unsubscribe(subscriber)
            disconnect_watch.cancel()


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
