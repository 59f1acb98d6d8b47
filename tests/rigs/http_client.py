"""The HTTP client of the tests."""

import ssl
from typing import Any

import httpx

# All clients share one empty context: the tests use plain HTTP only. Reading the list of authorities again for each
# client takes 20 ms, which was a third of the tests' own time.
_NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def http_client(**options: Any) -> httpx.AsyncClient:
    """Takes the options of httpx.AsyncClient."""
    return httpx.AsyncClient(verify=_NO_AUTHORITIES, **options)
