"""Calls RabbitMQ's management API through a URL with credentials, and creates the users of operators and services."""

import base64
import json
import urllib.request
from collections.abc import Mapping
from urllib.parse import quote, unquote, urlsplit

from shared.host_urls import host_urls
from shared.messaging.topology import PERMISSIONS, Permissions
from shared.version import USER_AGENT


def ask(base_url: str, method: str, path: str, body: object = None, timeout: float = 10.0) -> object:
    """Calls the API once. Returns the JSON of the reply, or None if the reply is empty. `timeout`: the seconds to wait.
    Raises urllib.error.HTTPError and OSError."""
    scheme, _, rest = base_url.partition("://")
    credentials, _, address = rest.rpartition("@")
    request = urllib.request.Request(  # noqa: S310  (the URL is a setting)
        f"{scheme}://{address}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": "Basic " + base64.b64encode(credentials.encode()).decode(),
            "Content-Type": "application/json",
            "User-Agent": USER_AGENT,
        },
    )
    with urllib.request.urlopen(request, timeout=timeout) as reply:  # noqa: S310
        content = reply.read()
    return json.loads(content) if content else None


def vhost_of(amqp_url: str) -> str:
    """Returns the vhost of an AMQP URL, or of the first of several URLs."""
    path = urlsplit(host_urls(amqp_url)[0]).path.removeprefix("/")
    return unquote(path) or "/"


def make_watcher(admin_url: str, watcher_url: str, amqp_url: str) -> None:
    """Creates the user of `watcher_url` with the password in that URL. The user may only look at queues and rates.
    Raises urllib.error.HTTPError and OSError."""
    _make_user(admin_url, watcher_url, amqp_url, Permissions(write="^$", read="^$"), tags="monitoring")


def make_service_users(admin_url: str, service_urls: Mapping[str, str]) -> None:
    """Creates the user of each service, or updates its password and permissions. `service_urls`: service -> its URL of
    RabbitMQ. Raises KeyError for an unknown service, urllib.error.HTTPError and OSError."""
    for service, url in service_urls.items():
        _make_user(admin_url, host_urls(url)[0], url, PERMISSIONS[service], tags="")


def _make_user(admin_url: str, user_url: str, amqp_url: str, permissions: Permissions, *, tags: str) -> None:
    parts = urlsplit(user_url)
    name = quote(unquote(parts.username or ""), safe="")
    ask(admin_url, "PUT", f"/api/users/{name}", {"password": unquote(parts.password or ""), "tags": tags})
    rights = {"configure": permissions.configure, "write": permissions.write, "read": permissions.read}
    ask(admin_url, "PUT", f"/api/permissions/{quote(vhost_of(amqp_url), safe='')}/{name}", rights)
