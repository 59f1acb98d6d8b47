"""/api/users: the user accounts of a restaurant, for its admins."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from litestar.types import ASGIApp
from msgspec import UNSET, Meta, UnsetType

from services.orders.accounts import User
from services.orders.idempotency import RequestKey
from services.orders.requests import Request
from services.orders.route_context import context_of
from services.orders.routes.auth import address_of
from shared.entities.contract import now
from shared.errors import Unauthenticated
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.cursors import page_of, read_cursor
from shared.http.endpoint import endpoint, path_id, read_query
from shared.http.replies import success
from shared.http.texts import Email, Label
from shared.rail.idempotency import key_reused
from shared.security.emails import read_email
from shared.security.passwords import NewPassword

_TAG = "Users"


class UserRole(StrEnum):
    ADMIN = "admin"
    STAFF = "staff"
    CUSTOMER = "customer"


class CreateUser(Request):
    email: Email
    password: NewPassword
    role: UserRole
    name: Label | None = None


class UpdateUser(Request):
    """A new role or password, or `is_active` false, ends all sessions of the user: all its tokens are refused within
    five seconds, and its event streams end."""

    email: Email | UnsetType = UNSET
    password: NewPassword | UnsetType = UNSET
    role: UserRole | UnsetType = UNSET
    name: Label | UnsetType = UNSET
    is_active: bool | UnsetType = UNSET


class UsersQuery(Request):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | None = None
    role: UserRole | None = None
    include_deleted: bool = False


@endpoint(
    "POST",
    "/api/users",
    action="users.manage",
    tag=_TAG,
    summary="Add a user",
    description="The email must be free in all restaurants. The new user signs in with it and the password.",
    body=CreateUser,
    answer=User,
    status=201,
    errors=(409, 504),
    headers=("Idempotency-Key",),
    example={"email": "kim@trattoria.example", "password": "another long passphrase", "role": "staff", "name": "Kim"},
)
async def create_user(request: Call) -> ASGIApp:
    key, body = RequestKey.of(request, "POST /api/users"), await request.whole_body()
    requested, context = read_body(body, CreateUser), context_of(request)
    tenant, id_, sha256 = await admins_tenant(request), key.entity_id(), key.hash_of(body)
    await context.sign_in.limits.count_account_change(address_of(request))
    email, name = read_email(requested.email), requested.name or ""
    hashed = await context.sign_in.hash_new(requested.password, email)
    kept = None if sha256 is None else await context.sign_in.hash(sha256)
    actor = request.identity.actor
    user = await context.accounts.add(tenant, id_, email, name, requested.role, hashed, kept, actor=actor)
    if user is not None:
        return success(user, status=201)
    first = await context.accounts.request_hash(tenant, id_)
    if first is None or sha256 is None or not await context.sign_in.fits(first, sha256):
        raise key_reused()
    user = await context.accounts.user(tenant, id_, deleted=True)
    return success(user, status=201, headers={"Idempotency-Replayed": "true"})


@endpoint(
    "GET",
    "/api/users",
    action="users.manage",
    tag=_TAG,
    summary="List users, newest first",
    description="Deleted users are left out unless `include_deleted` is true.",
    query=UsersQuery,
    answer=User,
    many=True,
)
async def list_users(request: Call) -> ASGIApp:
    query = read_query(request, UsersQuery)
    found = await context_of(request).accounts.users(
        await admins_tenant(request),
        limit=query.limit + 1,
        before=read_cursor(query.cursor) if query.cursor else None,
        role=query.role,
        deleted=query.include_deleted,
    )
    page, pagination = page_of(found, query.limit, _cursor_position)
    return success(page, pagination=pagination)


def _cursor_position(user: User) -> tuple[datetime, str]:
    assert user.created_at is not None  # every list selects it
    return user.created_at, user.id


@endpoint(
    "GET",
    "/api/users/{user_id:str}",
    action="users.manage",
    tag=_TAG,
    summary="Read a user",
    description="A deleted user is not found. The reply never has a password.",
    answer=User,
    errors=(404,),
)
async def get_user(request: Call, user_id: str) -> ASGIApp:
    return success(await context_of(request).accounts.user(await admins_tenant(request), path_id(user_id, "user_id")))


@endpoint(
    "PUT",
    "/api/users/{user_id:str}",
    action="users.manage",
    tag=_TAG,
    summary="Change a user",
    description="Absent fields keep their values. A new role or password, or `is_active` false, ends all sessions"
    " of the user. The last admin cannot be removed.",
    body=UpdateUser,
    answer=User,
    errors=(404, 409, 504),
    example={"role": "admin"},
)
async def update_user(request: Call, user_id: str) -> ASGIApp:
    requested = read_body(await request.whole_body(), UpdateUser)
    context, id_, tenant = context_of(request), path_id(user_id, "user_id"), await admins_tenant(request)
    if requested.email is not UNSET or requested.password is not UNSET:
        await context.sign_in.limits.count_account_change(address_of(request))
    names = ("email", "role", "name", "is_active")
    fields = {name: value for name in names if (value := getattr(requested, name)) is not UNSET}
    if requested.email is not UNSET:
        fields["email"] = read_email(requested.email)
    if requested.password is not UNSET:
        email = fields.get("email") or (await context.accounts.user(tenant, id_)).email
        fields["password_hash"] = await context.sign_in.hash_new(requested.password, email)
    return success(await context.accounts.change(tenant, id_, fields, actor=request.identity.actor))


@endpoint(
    "DELETE",
    "/api/users/{user_id:str}",
    action="users.manage",
    tag=_TAG,
    summary="Delete a user; it can be restored",
    description="Ends all sessions of the user, whose email becomes free. The last admin cannot be deleted.",
    answer=User,
    errors=(404, 409, 504),
)
async def delete_user(request: Call, user_id: str) -> ASGIApp:
    id_ = path_id(user_id, "user_id")
    accounts, tenant = context_of(request).accounts, await admins_tenant(request)
    return success(await accounts.change(tenant, id_, {"deleted_at": now()}, actor=request.identity.actor))


@endpoint(
    "POST",
    "/api/users/{user_id:str}/restore",
    action="users.manage",
    tag=_TAG,
    summary="Restore a user",
    description="Answers 409 if the user is not deleted, or if another one has its email by now.",
    answer=User,
    errors=(404, 409, 504),
)
async def restore_user(request: Call, user_id: str) -> ASGIApp:
    id_ = path_id(user_id, "user_id")
    accounts, tenant = context_of(request).accounts, await admins_tenant(request)
    return success(await accounts.restore(tenant, id_, actor=request.identity.actor))


async def admins_tenant(request: Call) -> str:
    """Returns the caller's tenant. Raises Unauthenticated for a former admin whose token is still valid, because such a
    user could make itself an admin again."""
    identity = request.identity
    if not await context_of(request).accounts.may_administer(identity.tenant, identity.user_id):
        raise Unauthenticated("this user is no longer an admin: sign in again", code="not_admin_any_more")
    return identity.tenant


ROUTES = [create_user, list_users, get_user, update_user, delete_user, restore_user]
