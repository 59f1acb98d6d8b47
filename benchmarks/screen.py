"""`python -m benchmarks.screen URL TOKENS FILE`: counts the orders that a subscriber sees.

Subscribes to the event stream of each token and writes to FILE, five times per second, how many different orders were
created. FILE appears once all streams are open. To use little CPU time, the client searches the bytes and parses
nothing.
"""

import json
import re
import selectors
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

_WRITE_INTERVAL_SECONDS = 0.2
_CONNECT_SECONDS = 1.0
"""The time for the streams to begin before FILE appears."""
_CREATED = re.compile(rb'event: order_created\ndata: [^\n]*?"orderID":"([0-9a-f-]{36})"')


def main(url: str, tokens: Path, count_file: Path) -> None:
    address = urlsplit(url)
    selector = selectors.DefaultSelector()
    for token in json.loads(tokens.read_text()):
        link = socket.create_connection((address.hostname, address.port))
        link.sendall(
            b"GET /api/v1/sync/events HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %b\r\n\r\n" % token.encode()
        )
        selector.register(link, selectors.EVENT_READ, bytearray())
    seen: set[bytes] = set()
    written_at = 0.0
    connected_at = time.monotonic() + _CONNECT_SECONDS
    while True:
        for key, _ in selector.select(_WRITE_INTERVAL_SECONDS):
            got = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            if not got:
                raise SystemExit("an event stream ended")
            rest: bytearray = key.data
            rest += got
            end = rest.rfind(b"\n\n")
            if end >= 0:
                seen.update(_CREATED.findall(rest, 0, end + 2))
                del rest[: end + 2]
        now = time.monotonic()
        if now - written_at > _WRITE_INTERVAL_SECONDS and now > connected_at:
            new = count_file.with_suffix(".new")
            new.write_text(str(len(seen)))
            new.rename(count_file)
            written_at = now


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
