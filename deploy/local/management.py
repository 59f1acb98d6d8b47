"""One call of RabbitMQ's management API, by an URL that carries its credentials."""

import base64
import json
import urllib.request


def ask(base_url: str, method: str, path: str, body: object = None, timeout: float = 10.0) -> object:
    """One call of RabbitMQ's management API; None for an empty answer. Raises urllib.error.HTTPError, OSError."""
    scheme, _, rest = base_url.partition("://")
    credentials, _, address = rest.rpartition("@")
    request = urllib.request.Request(  # noqa: S310  (always http, to 127.0.0.1)
        f"{scheme}://{address}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": "Basic " + base64.b64encode(credentials.encode()).decode(),
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=timeout) as reply:  # noqa: S310
        content = reply.read()
    return json.loads(content) if content else None
