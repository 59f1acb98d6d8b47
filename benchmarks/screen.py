"""`python -m benchmarks.screen URL TOKENS FILE`: subscribes to each token's event stream and keeps writing into FILE
how many different orders were created. A light client: it looks for marks in bytes and parses nothing."""

import json
import re
import selectors
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

_CREATED = re.compile(rb'event: order_created\ndata: [^\n]*?"orderID":"([0-9a-f-]{36})"')


def main(url: str, tokens: Path, counted: Path) -> None:
    address = urlsplit(url)
    selector = selectors.DefaultSelector()
    for token in json.loads(tokens.read_text()):
        link = socket.create_connection((address.hostname, address.port))
        link.sendall(
            b"GET /api/v1/sync/events HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %b\r\n\r\n" % token.encode()
        )
        selector.register(link, selectors.EVENT_READ, bytearray())
    seen: set[bytes] = set()
    told = 0.0
    connected = time.monotonic() + 1.0
    while True:
        for key, _ in selector.select(0.2):
            got = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            if not got:
                raise SystemExit("a stream ended")
            rest: bytearray = key.data
            rest += got
            end = rest.rfind(b"\n\n")
            if end >= 0:
                seen.update(_CREATED.findall(rest, 0, end + 2))
                del rest[: end + 2]
        now = time.monotonic()
        if now - told > 0.2 and now > connected:
            aside = counted.with_suffix(".new")
            aside.write_text(str(len(seen)))
            aside.rename(counted)
            told = now


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
