"""The change of one's own password, and its reset with a code that an admin made."""

from datetime import datetime, timedelta
from typing import Annotated

from litestar.types import ASGIApp
from msgspec import Meta, Struct

from services.orders.requests import Request
from services.orders.route_context import context_of
from services.orders.routes.auth import address_of
from services.orders.routes.users import admins_tenant
from shared.entities.contract import now
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.endpoint import endpoint, path_id
from shared.http.replies import success
from shared.http.texts import Email, Label
from shared.security.passwords import MAX_PASSWORD_CHARS, NewPassword
from shared.security.permissions import PUBLIC


class ChangePassword(Request):
    current_password: Annotated[str, Meta(max_length=MAX_PASSWORD_CHARS)]
    new_password: NewPassword


class ResetPassword(Request):
    email: Email
    code: Label
    new_password: NewPassword


class PasswordChanged(Struct, frozen=True):
    changed: bool = True


class ResetCode(Struct, frozen=True):
    """`code` is shown only once. A new code of the same user replaces it."""

    code: str
    expires_at: datetime


@endpoint(
    "POST",
    "/api/auth/password",
    action="password.change",
    tag="Sign-in",
    summary="Change your own password",
    description="All sessions of the user end, this one too: sign in again.",
    body=ChangePassword,
    answer=PasswordChanged,
    errors=(404, 409),
    example={"current_password": "a long and unusual passphrase", "new_password": "an even longer passphrase"},
)
async def change_password(request: Call) -> ASGIApp:
    requested = read_body(await request.whole_body(), ChangePassword)
    await context_of(request).sign_in.change_password(
        request.identity.user_id, requested.current_password, requested.new_password, address_of(request)
    )
    return success(PasswordChanged())


@endpoint(
    "POST",
    "/api/auth/password-reset",
    action=PUBLIC,
    tag="Sign-in",
    summary="Set a new password with a code from an admin",
    description="All sessions of the user end. The code is valid once.",
    body=ResetPassword,
    answer=PasswordChanged,
    errors=(401,),
    example={"email": "kim@trattoria.example", "code": "Zk3vX0w8rJ1mTq6yNfHs2A", "new_password": "my own passphrase"},
)
async def reset_password(request: Call) -> ASGIApp:
    requested = read_body(await request.whole_body(), ResetPassword)
    await context_of(request).sign_in.reset_password(
        requested.email, requested.code, requested.new_password, address_of(request)
    )
    return success(PasswordChanged())


@endpoint(
    "POST",
    "/api/users/{user_id:str}/password-reset",
    action="users.manage",
    tag="Users",
    summary="Make a code with which a user sets a new password",
    description="The code is valid once and for an hour. Until it is used, the old password stays.",
    answer=ResetCode,
    status=201,
    errors=(404, 504),
)
async def make_reset_code(request: Call, user_id: str) -> ASGIApp:
    id_, tenant = path_id(user_id, "user_id"), await admins_tenant(request)
    code, seconds = await context_of(request).sign_in.make_reset_code(tenant, id_, actor=request.identity.actor)
    return success(ResetCode(code, now() + timedelta(seconds=seconds)), status=201)


ROUTES = [change_password, reset_password, make_reset_code]
