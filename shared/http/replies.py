"""Successful replies: `{"success": true, "data": ...}`. error_replies.py makes the replies of errors."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
from litestar.types import Receive, Scope, Send

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Reply:
    """A complete response, as an ASGI application that sends it. Litestar's own response class looks for cookies,
    encoders and hooks, which this project does not use. This search took a fifth of the time of an order."""

    __slots__ = ("_body", "_headers", "_status", "_type")

    def __init__(
        self,
        body: bytes,
        *,
        status: int = 200,
        headers: Mapping[str, str] = _NO_HEADERS,
        content_type: bytes = b"application/json",
    ) -> None:
        self._body = body
        self._status = status
        self._headers = headers
        self._type = content_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in self._headers.items()]
        if self._status != 304:
            headers += ((b"content-type", self._type), (b"content-length", b"%d" % len(self._body)))
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


def success(data: Any, *, status: int = 200, headers: Mapping[str, str] = _NO_HEADERS, **meta: Any) -> Reply:
    """Returns a successful reply. `data`: anything that msgspec encodes; pass encoded JSON as `msgspec.Raw`. `meta`:
    further fields of the envelope."""
    return Reply(msgspec.json.encode({"success": True, "data": data, **meta}), status=status, headers=headers)
