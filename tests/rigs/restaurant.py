"""A restaurant for one test on the running system, and functions that check replies."""

from typing import Any
from uuid import uuid4

import httpx
import pytest
from msgspec import Struct

from shared.entities.contract import Change, Lane
from shared.security.tokens import Identity, Role, Tokens
from tests.rigs.builders import message
from tests.rigs.http_client import http_client
from tests.rigs.system import System, publisher_to


class RestaurantRig(Struct, frozen=True):
    """A restaurant that was registered for one test. `admin_id` and `staff_id` are ids of users."""

    system: System
    id: str
    slug: str
    admin_id: str
    token: str
    """The admin's token from the registration."""
    staff_id: str

    def client(self, role: Role = Role.STAFF, *, session: str | None = None) -> httpx.AsyncClient:
        if role is Role.ADMIN:
            return self.system.client(token=self.token)
        return self.system.client(token=self.token_of(role, session=session))

    def token_of(self, role: Role, *, session: str | None = None) -> str:
        user = self.staff_id if role is Role.STAFF else str(uuid4())
        tokens = Tokens(self.system.env["TICKETRAIL_JWT_SECRET"], ttl_seconds=600)
        return tokens.issue(Identity(user, role, self.id, "", session))

    async def api_key(self, *scopes: str, **fields: Any) -> str:
        """Makes an API key; returns its text."""
        async with self.client(Role.ADMIN) as admin:
            body = {"name": "Test", "scopes": list(scopes), **fields}
            return str(made(await admin.post("/api/api-keys", json=body))["key"])

    async def dish(self, **fields: Any) -> dict[str, Any]:
        async with self.client(Role.ADMIN) as admin:
            body = {"name": "Dosa", "price": 1_000, "category": "Mains", **fields}
            created: dict[str, Any] = made(await admin.post("/api/menu", json=body))
            return created

    async def publish(self, *changes: Change, lane: Lane = Lane.CRITICAL) -> None:
        """Records the changes as another instance would."""
        async with publisher_to(self.system) as publisher:
            await publisher.publish(lane.value, message(*changes))


async def register_restaurant(system: System, **fields: Any) -> RestaurantRig:
    """Registers a restaurant over HTTP; `fields` override those of the request."""
    slug = f"shop-{uuid4().hex[:12]}"
    body = {"name": slug, "slug": slug, "email": f"{slug}@shop.example", "password": "long enough to be good", **fields}
    async with http_client(base_url=system.urls["orders"], timeout=10.0) as client:
        data = made(await client.post("/api/auth/register-restaurant", json=body))
    session = data["session"]
    return RestaurantRig(
        system, data["restaurant"]["id"], slug, session["user"]["id"], session["access_token"], staff_id=str(uuid4())
    )


def made(reply: httpx.Response) -> Any:
    return expect(reply, 201)


def expect(reply: httpx.Response, status: int = 200) -> Any:
    """Returns `data` of a reply with the expected status. An unexpected 500 fails the test at once, so that
    `eventually` does not retry it."""
    if reply.status_code == 500 != status:
        pytest.fail(reply.text)
    assert reply.status_code == status, f"{reply.request.method} {reply.request.url}: {reply.status_code} {reply.text}"
    return reply.json()["data"] if status < 400 else reply.json()["error"]


def refused(reply: httpx.Response, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """Returns `details` of a refusal; it must have this code and name this field."""
    error = expect(reply, status)
    assert error["code"] == code, error
    if field is not None:
        assert error["details"]["field"] == field, error
    details: dict[str, Any] = error["details"]
    return details
