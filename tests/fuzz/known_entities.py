"""Makes entities that requests can name by id, so that most calls get more than a 404: a new restaurant with several
entities of each kind."""

from typing import Any
from uuid import uuid4

import httpx
from msgspec import Struct

from tests.rigs.http_client import http_client
from tests.rigs.system import System

_PASSWORD = "a long password that is hard to guess"
_SIZES = {"name": "size", "options": [{"name": "regular"}, {"name": "large", "price": 200}], "max_choices": 100}
Ids = dict[str, list[str]]
"""Parameter, such as `order_id` -> ids that exist."""


class KnownEntities(Struct, frozen=True):
    tokens: dict[str, str]
    """Role -> token."""
    changed: Ids
    """Entities that requests may change and delete. The last one of each kind is deleted already."""
    referenced: Ids
    """Entities that bodies and queries refer to."""
    admin_id: str
    choice: dict[str, str]
    """A customization that every dish has."""
    sync_token: str
    """An API key with the scope `sync:write`."""


async def prepare(system: System) -> KnownEntities:
    slug = f"fuzz-{uuid4().hex[:12]}"
    credentials = {"email": f"admin@{slug}.example", "password": _PASSWORD}
    async with http_client(base_url=system.urls["orders"], timeout=10.0) as client:
        registered = await _post(client, "/api/auth/register-restaurant", {"name": "Fuzz", "slug": slug, **credentials})
        session, restaurant = registered["session"], registered["restaurant"]["id"]
        tokens = {"admin": session["access_token"]}
        client.headers["Authorization"] = f"Bearer {tokens['admin']}"
        key = await _post(client, "/api/api-keys", {"name": "Fuzz", "scopes": ["sync:write"]})
        referenced = await _make_entities(client, 2) | {"slug": [slug], "restaurant_id": [restaurant]}
        page = (await client.get("/api/tables?limit=1")).json()["pagination"]
        referenced |= {"cursor": [page["next_cursor"]], "fields": ["created_at,version,sync"]}
        changed = await _make_entities(client, 4) | {
            "user_id": [await _user(client, f"{n}@{slug}.example") for n in "123"],
            "api_key_id": [
                (await _post(client, "/api/api-keys", {"name": n, "scopes": ["menu:read"]}))["id"] for n in "123"
            ],
        }
        staff = {**credentials, "email": f"1@{slug}.example"}
        tokens["staff"] = (await _post(client, "/api/auth/login", staff))["access_token"]
        guest = await _post(client, "/api/auth/table-session", {"slug": slug, "table_id": referenced["table_id"][0]})
        tokens["customer"] = guest["access_token"]
        for name, path in _PATHS.items():
            await client.delete(f"{path}/{changed[name][-1]}")
        client.headers["Authorization"] = f"Bearer {tokens['customer']}"
        changed["order_id"].append(await _make(client, "/api/orders", _order(referenced)))
    choice = {"name": "size", "option": "large"}
    return KnownEntities(tokens, changed, referenced, session["user"]["id"], choice, key["key"])


_PATHS = {
    "table_id": "/api/tables",
    "category_id": "/api/menu/categories",
    "brand_id": "/api/menu/brands",
    "inventory_item_id": "/api/inventory",
    "menu_item_id": "/api/menu",
    "customer_id": "/api/customers",
    "order_id": "/api/orders",
    "bay_id": "/api/bays",
    "job_id": "/api/jobs",
    "user_id": "/api/users",
}


async def _make_entities(client: httpx.AsyncClient, count: int) -> Ids:
    """Makes `count` entities of each kind; returns their ids."""
    ids: Ids = {}

    async def several(id_: str, **body: Any) -> None:
        ids[id_] = [await _make(client, _PATHS[id_], body) for _ in range(count)]

    await several("table_id", label="Window", seats=4)
    await several("category_id", name="Mains")
    await several("brand_id", name="House")
    await several("inventory_item_id", name="Dough", quantity=10**9)
    consumed = [{"inventory_item_id": ids["inventory_item_id"][0], "quantity": 1}]
    await several(
        "menu_item_id", name="Calzone", price=900, category="Mains", customizations=[_SIZES], consumes=consumed
    )
    await several("customer_id", name="Ada", phone="+4930123456")
    await several("order_id", **_order(ids), customer_id=ids["customer_id"][0])
    await _post(client, f"/api/orders/{ids['order_id'][0]}/payments", {"amount": 500, "method": "card"})
    await several("bay_id", name="Oven")
    await several("job_id", title="Bake", bay_id=ids["bay_id"][0], order_id=ids["order_id"][0])
    return ids


def _order(ids: Ids) -> dict[str, Any]:
    return {"items": [{"menu_item_id": ids["menu_item_id"][0], "quantity": 2}]}


async def _user(client: httpx.AsyncClient, email: str) -> str:
    return await _make(client, "/api/users", {"email": email, "password": _PASSWORD, "role": "staff"})


async def _make(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    return str((await _post(client, path, body))["id"])


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = await client.post(path, json=body)
    assert reply.is_success, reply.text
    data: dict[str, Any] = reply.json()["data"]
    return data
