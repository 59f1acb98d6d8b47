"""/api/api-keys: the API keys of a restaurant, for its admins."""

from datetime import datetime
from typing import Annotated

from litestar.types import ASGIApp
from msgspec import Meta

from services.orders.api_keys import ApiKey
from services.orders.idempotency import RequestKey
from services.orders.requests import Request
from services.orders.route_context import context_of
from services.orders.routes.users import admins_tenant
from shared.entities.contract import Time
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.cursors import page_of, read_cursor
from shared.http.endpoint import endpoint, path_id, read_query
from shared.http.replies import success
from shared.http.texts import Label
from shared.security.permissions import Scope

_TAG = "API keys"


class CreateApiKey(Request):
    """To replace a key, make a second one, give it to the client, and revoke the first one: both are valid meanwhile.
    Without `expires_at` the key is valid until it is revoked."""

    name: Label
    scopes: Annotated[list[Scope], Meta(min_length=1, max_length=len(Scope))]
    expires_at: Time | None = None


class ApiKeysQuery(Request):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | None = None


class MadeApiKey(ApiKey, frozen=True, kw_only=True):
    """`key` is shown only in this reply."""

    key: str


@endpoint(
    "POST",
    "/api/api-keys",
    action="api_keys.manage",
    tag=_TAG,
    summary="Make an API key",
    description="The reply shows the key once. It goes into the header `Authorization: Bearer`, or, for"
    " `POST /api/sync/order`, into `x-sync-token`. A repeat with the same `Idempotency-Key` shows the same key, as long"
    " as the services sign with the same key.",
    body=CreateApiKey,
    answer=MadeApiKey,
    status=201,
    errors=(409, 504),
    headers=("Idempotency-Key",),
    example={"name": "Web shop", "scopes": ["menu:read", "orders:write"]},
)
async def create_api_key(request: Call) -> ASGIApp:
    key, body = RequestKey.of(request, "POST /api/api-keys"), await request.whole_body()
    requested, tenant = read_body(body, CreateApiKey), await admins_tenant(request)
    made, text, replayed = await context_of(request).api_keys.add(
        tenant,
        key.entity_id(),
        requested.name,
        requested.scopes,
        requested.expires_at,
        key.hash_of(body),
        actor=request.identity.actor,
    )
    fields = {name: getattr(made, name) for name in made.__struct_fields__}
    headers = {"Idempotency-Replayed": "true"} if replayed else {}
    return success(MadeApiKey(**fields, key=text), status=201, headers=headers)


@endpoint(
    "GET",
    "/api/api-keys",
    action="api_keys.manage",
    tag=_TAG,
    summary="List API keys, newest first",
    description="Revoked and expired keys are listed too.",
    query=ApiKeysQuery,
    answer=ApiKey,
    many=True,
)
async def list_api_keys(request: Call) -> ASGIApp:
    query = read_query(request, ApiKeysQuery)
    found = await context_of(request).api_keys.page(
        await admins_tenant(request),
        limit=query.limit + 1,
        before=read_cursor(query.cursor) if query.cursor else None,
    )
    page, pagination = page_of(found, query.limit, _cursor_position)
    return success(page, pagination=pagination)


def _cursor_position(key: ApiKey) -> tuple[datetime, str]:
    return key.created_at, key.id


@endpoint(
    "GET",
    "/api/api-keys/{api_key_id:str}",
    action="api_keys.manage",
    tag=_TAG,
    summary="Read an API key, without its secret",
    description="`last_used_at` is exact to a minute.",
    answer=ApiKey,
    errors=(404,),
)
async def get_api_key(request: Call, api_key_id: str) -> ASGIApp:
    id_, tenant = path_id(api_key_id, "api_key_id"), await admins_tenant(request)
    return success(await context_of(request).api_keys.one(tenant, id_))


@endpoint(
    "DELETE",
    "/api/api-keys/{api_key_id:str}",
    action="api_keys.manage",
    tag=_TAG,
    summary="Revoke an API key",
    description="Every service refuses it within 5 seconds, and its event streams end. A repeat changes nothing.",
    answer=ApiKey,
    errors=(404, 504),
)
async def revoke_api_key(request: Call, api_key_id: str) -> ASGIApp:
    id_, tenant = path_id(api_key_id, "api_key_id"), await admins_tenant(request)
    return success(await context_of(request).api_keys.revoke(tenant, id_, actor=request.identity.actor))


ROUTES = [create_api_key, list_api_keys, get_api_key, revoke_api_key]
