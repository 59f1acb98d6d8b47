"""The methods of a path. HEAD is allowed wherever GET is (RFC 9110, section 9.3.2), without a handler of its own."""

import asyncio
from collections.abc import Iterable
from typing import Any


def allowed_methods(declared: Iterable[str]) -> str:
    """Returns the value of the header Allow for a path with handlers for these methods."""
    methods = {"OPTIONS", *declared}
    return ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))


def head_as_get(scope: Any, receive: Any, send: Any) -> tuple[Any, Any]:
    """Makes a HEAD request a GET request whose reply has no content. Returns (receive, send) for the application, which
    sees the end of the connection after its first bytes. Otherwise an event stream would not end."""
    scope["method"] = "GET"
    ended = asyncio.Event()

    async def received() -> Any:
        message = await receive()
        if message["type"] != "http.request" or message.get("more_body"):
            return message
        await ended.wait()
        return {"type": "http.disconnect"}

    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            await send(message)
        elif not ended.is_set():
            ended.set()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return received, sent
