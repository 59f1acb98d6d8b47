"""The class of the requests that handlers receive."""

import asyncio
import contextlib
from typing import Any

from litestar import Request
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.types import Receive

from shared.errors import InvalidInput
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.encodings import decoded
from shared.http.open_bodies import OPEN_BODIES, OpenBodies
from shared.security.tokens import Grant, Identity

_MAX_DISCARDED_BYTES = 16_000_000
_DISCARD_TIMEOUT_SECONDS = 2.0


class Call(Request[Identity, Grant, Any]):
    """A request whose body and headers are read directly from the ASGI messages. Litestar's own class streams the body
    and builds a multidict of the headers. Both together took a tenth of the time of an order."""

    __slots__ = ()

    def header(self, name: bytes) -> str | None:
        """Returns the first header with this name (in lower case), or None."""
        for found, value in self.scope["headers"]:
            if found == name:
                return value.decode("latin-1")
        return None

    def headers_joined(self, name: bytes) -> str | None:
        """Returns all headers with this name (in lower case) as one comma-separated list, or None if there is none."""
        found = [value.decode("latin-1").strip() for key, value in self.scope["headers"] if key == name]
        return ", ".join(found) if found else None

    @property
    def identity(self) -> Identity:
        """The caller, as identified by the authorization middleware."""
        found: Identity = self.scope["user"]
        return found

    @property
    def grant(self) -> Grant:
        """The rights that the caller's token grants, and when they end."""
        found: Grant = self.scope["auth"]
        return found

    async def whole_body(self) -> bytes:
        """Reads the body, which is possible only once, and decodes its Content-Encoding. Raises RequestEntityTooLarge
        if it is larger than MAX_BODY_BYTES, before or after the decoding, InvalidInput if the client disconnects before
        its end, RequestTimeout if it comes too slowly, and the errors of `decoded`."""
        pieces: list[bytes] = []
        size, more = 0, True
        open_bodies: OpenBodies = self.scope[OPEN_BODIES]  # type: ignore[literal-required]
        with open_bodies.body_of(self.scope["client_address"]) as body:  # type: ignore[typeddict-item]
            while more and size <= MAX_BODY_BYTES:
                message = await self.receive()
                if message["type"] != "http.request":
                    raise InvalidInput("the client disconnected before the end of its request", field="body")
                pieces.append(message["body"])
                size += len(message["body"])
                more = bool(message.get("more_body"))
                if more:
                    body.received(len(message["body"]))
        if size > MAX_BODY_BYTES:
            if more:
                await discard_body(self.receive)
            raise RequestEntityTooLarge
        whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return decoded(whole, self.headers_joined(b"content-encoding"), max_bytes=MAX_BODY_BYTES)


async def discard_body(receive: Receive) -> None:
    """Reads the rest of a body without keeping it: at most 16 MB, for at most two seconds. If the server closed the
    connection while the client was still sending, the connection would be reset and the client would never see the
    reply."""
    left = _MAX_DISCARDED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_TIMEOUT_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                left -= len(message["body"])
