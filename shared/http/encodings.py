"""The encoding of request bodies: plain, or compressed with gzip (RFC 9110, section 8.4)."""

import zlib

from litestar.exceptions.http_exceptions import RequestEntityTooLarge

from shared.errors import InvalidInput, UnsupportedMediaType

ACCEPTED = "gzip"
"""The value of Accept-Encoding in a reply that refuses an encoding."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = 16 + zlib.MAX_WBITS
_MAX_MEMBERS = 16
"""Clients send one member. Each further one costs a copy of the rest of the body: 50,000 empty ones would stop the
service for a minute."""


def decoded(body: bytes, coding: str | None, *, max_bytes: int) -> bytes:
    """Returns the plain bytes of a body without a byte order mark. `coding`: the header Content-Encoding. Raises
    UnsupportedMediaType for another encoding than gzip, InvalidInput for a body that is not gzip, and
    RequestEntityTooLarge if more than `max_bytes` come out of it."""
    match (coding or "identity").strip().lower():
        case "" | "identity":
            pass
        case "gzip" | "x-gzip":
            body = _unpacked(body, max_bytes)
        case _:
            raise UnsupportedMediaType(
                f"the Content-Encoding must be {ACCEPTED} or absent", field="Content-Encoding", allowed=[ACCEPTED]
            )
    return body.removeprefix(_BYTE_ORDER_MARK)


def _unpacked(body: bytes, max_bytes: int) -> bytes:
    """A gzip file has one or more members, one after the other (RFC 1952)."""
    plain = b""
    for _ in range(_MAX_MEMBERS):
        member = zlib.decompressobj(_GZIP)
        try:
            # The limit also bounds the memory: a thousandth of a body may expand to all of it.
            plain += member.decompress(body, max_bytes + 1 - len(plain))
        except zlib.error as error:
            raise InvalidInput(f"not gzip: {error}", field="body", code="malformed_gzip") from error
        if len(plain) > max_bytes:
            raise RequestEntityTooLarge
        if not member.eof:
            raise InvalidInput("the gzip data is cut short", field="body", code="malformed_gzip")
        body = member.unused_data
        if not body:
            return plain
    raise InvalidInput(f"more than {_MAX_MEMBERS} members of gzip", field="body", code="malformed_gzip")
