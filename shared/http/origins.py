"""Which pages may open a stream. CORS hides a reply from a page of another origin, but it prevents no request: such a
page could open streams of its visitors, and a WebSocket does not ask CORS at all."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from shared.errors import Forbidden


class AllowedOrigins:
    def __init__(self, listed: str) -> None:
        """`listed`: the setting `cors_origins`."""
        self._listed = frozenset(origin.strip() for origin in listed.split(",") if origin.strip())

    def allow(self, origin: str, host: str) -> bool:
        """Returns whether a page of `origin` may open a stream at `host` (the header Host): the page comes from the
        same host, or the setting lists its origin."""
        return "*" in self._listed or origin in self._listed or (bool(host) and _host_of(origin) == host.lower())

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises Forbidden if a request comes from a page that may not open a stream. Programs other than browsers send
        no Origin."""
        found = {name: value.decode("latin-1") for name, value in headers if name in (b"origin", b"host")}
        origin = found.get(b"origin")
        if origin is not None and not self.allow(origin, found.get(b"host", "")):
            raise Forbidden("pages of this origin may not open a stream", code="origin_not_allowed")


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
