"""The HTTP client of the tests."""

import ssl
from typing import Any

import httpx

# One for all, and empty: all of it is plain HTTP, and to read the list of authorities anew for each client, twenty
# milliseconds, was a third of what the tests themselves took.
_NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def http_client(**options: Any) -> httpx.AsyncClient:
    """As httpx.AsyncClient takes them."""
    return httpx.AsyncClient(verify=_NO_AUTHORITIES, **options)
