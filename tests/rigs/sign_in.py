"""Sign-in at an orders instance that allows few failures and trusts a proxy. Each client has its own address."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
from msgspec import Struct

from tests.rigs.http_client import http_client
from tests.rigs.system import System

PASSWORD = "long enough to be good"
GUEST_TOKEN_TTL_SECONDS = 900
FAILURE_WINDOW_SECONDS = 86_400  # so that no try comes back during a test
FAILURES_PER_ACCOUNT_AND_ADDRESS = 10  # the default
FAILURES_PER_ACCOUNT, FAILURES_PER_ADDRESS = 15, 60
CHANGES_PER_ADDRESS, SESSIONS_PER_TABLE = 8, 12
addresses = (f"198.51.{number // 250}.{number % 250 + 1}" for number in itertools.count())


class RegisteredRestaurant(Struct, frozen=True):
    """A restaurant with its first admin."""

    system: System
    url: str
    id: str
    slug: str
    email: str
    session: dict[str, Any]

    @property
    def admin_id(self) -> str:
        return str(self.session["user"]["id"])

    def client(self, token: str | None = None) -> httpx.AsyncClient:
        """A client with the given token, or with the admin's token."""
        return client(self.url, token or self.session["access_token"])

    async def user(self, role: str = "staff", **fields: str) -> dict[str, Any]:
        """Creates a user of this role with PASSWORD; returns it."""
        body = {"email": new_email(), "password": PASSWORD, "role": role, **fields}
        async with self.client() as admin:
            return dict(expect(await admin.post("/api/users", json=body), 201))


def client(url: str, token: str | None = None, *, address: str | None = None) -> httpx.AsyncClient:
    """Returns a client with this address; by default no other client has the same."""
    headers = {"X-Forwarded-For": address or next(addresses)}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return http_client(base_url=url, headers=headers, timeout=10.0)


def expect(reply: httpx.Response, status: int = 200) -> Any:
    """Asserts the status; returns `data` of the reply, or `error` if the status is 400 or higher."""
    assert reply.status_code == status, f"{reply.request.method} {reply.request.url}: {reply.status_code} {reply.text}"
    return reply.json()["data" if status < 400 else "error"]


def new_email() -> str:
    return f"u{uuid4().hex[:12]}@people.example"


@asynccontextmanager
async def guarded(system: System) -> AsyncIterator[str]:
    """Starts an orders instance that allows few failures and trusts a proxy; yields its URL."""
    async with system.another_orders(
        "guarded",
        failure_window_seconds=FAILURE_WINDOW_SECONDS,
        sign_in_failures_per_account_and_address=FAILURES_PER_ACCOUNT_AND_ADDRESS,
        sign_in_failures_per_account=FAILURES_PER_ACCOUNT,
        sign_in_failures_per_address=FAILURES_PER_ADDRESS,
        account_changes_per_address=CHANGES_PER_ADDRESS,
        table_sessions_per_table_and_address=SESSIONS_PER_TABLE,
        guest_token_ttl_seconds=GUEST_TOKEN_TTL_SECONDS,
    ) as url:
        yield url


def registration(**fields: Any) -> dict[str, Any]:
    """The body of a valid registration of a new restaurant."""
    slug = f"place-{uuid4().hex[:12]}"
    return {"name": "Place", "slug": slug, "email": new_email(), "password": PASSWORD, **fields}


async def register(system: System, url: str, **fields: Any) -> RegisteredRestaurant:
    """Registers a restaurant with its first admin."""
    body = registration(**fields)
    async with client(url) as anonymous:
        made = expect(await anonymous.post("/api/auth/register-restaurant", json=body), 201)
    return RegisteredRestaurant(system, url, made["restaurant"]["id"], body["slug"], body["email"], made["session"])


async def sign_in(url: str, email: str, password: str = PASSWORD, *, address: str | None = None) -> httpx.Response:
    async with client(url, address=address) as anonymous:
        return await anonymous.post("/api/auth/login", json={"email": email, "password": password})


async def refresh(url: str, token: str) -> httpx.Response:
    async with client(url) as anonymous:
        return await anonymous.post("/api/auth/refresh", json={"refresh_token": token})
