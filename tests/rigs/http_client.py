"""The HTTP client of the tests."""

import ssl
from typing import Any

import httpx

# All clients share one empty context, because the tests use only plain HTTP. Reading the list of authorities for each
# client would take 20 ms, which was a third of the time that the tests themselves took.
_NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def http_client(**options: Any) -> httpx.AsyncClient:
    """Takes the options of httpx.AsyncClient."""
    return httpx.AsyncClient(verify=_NO_AUTHORITIES, **options)
