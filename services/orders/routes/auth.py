"""/api/auth: registration of restaurants, sign-in and sign-out, tokens for guests at a table."""

import contextlib
from typing import Annotated, Any
from uuid import UUID

from litestar.types import ASGIApp
from msgspec import Meta, Struct, structs

from services.orders.requests import Request
from services.orders.route_context import context_of
from services.orders.sign_in import SignInSession, TableSession
from shared.entities.contract import NO_NUL, NO_NUL_SENTENCE, SENTENCE, encode
from shared.http.bodies import read_body
from shared.http.call import Call
from shared.http.endpoint import endpoint
from shared.http.replies import success
from shared.http.texts import END, Email
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.restaurants import NewRestaurant, Restaurant, Slug
from shared.security.emails import read_email
from shared.security.passwords import NewPassword
from shared.security.permissions import PUBLIC
from shared.security.tokens import Role

_TAG = "Sign-in"
Invitation = Annotated[
    str,
    Meta(
        max_length=200,
        pattern=rf"^[\x21-\x7e]*{END}",
        extra={SENTENCE: "must have visible ASCII characters only"},
    ),
]
Token = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=rf"^[\x21-\x7e]+{END}",
        extra={SENTENCE: "must have visible ASCII characters only"},
    ),
]


class RegisterRestaurant(NewRestaurant):
    """`tax_basis_points`: 500 means 5 %. A sale before `cutoff_hour` belongs to the previous business day. The setting
    TICKETRAIL_REGISTRATION decides whether `invitation_code` is needed."""

    email: Email
    password: NewPassword
    invitation_code: Invitation | None = None


class Login(Request):
    email: Annotated[str, Meta(max_length=254, pattern=NO_NUL, extra={SENTENCE: NO_NUL_SENTENCE})]
    password: Annotated[str, Meta(max_length=200)]


class Refresh(Request):
    refresh_token: Token


class OpenTableSession(Request):
    slug: Slug
    table_id: UUID


class Registered(Struct, frozen=True):
    restaurant: Restaurant
    session: SignInSession


class Me(Struct, frozen=True):
    user_id: str
    role: str
    email: str
    restaurant: Restaurant | None
    customer_session_id: str | None = None


class LoggedOut(Struct, frozen=True):
    logged_out: bool = True


@endpoint(
    "POST",
    "/api/auth/register-restaurant",
    action=PUBLIC,
    tag=_TAG,
    summary="Register a restaurant and its first admin",
    description="The reply has the session of the admin. `slug` is the name of the restaurant in URLs, and must be"
    " free.",
    body=RegisterRestaurant,
    answer=Registered,
    status=201,
    errors=(403, 409, 504),
    example={
        "name": "Trattoria Ada",
        "slug": "trattoria-ada",
        "email": "ada@trattoria.example",
        "password": "a long and unusual passphrase",
        "currency": "EUR",
        "time_zone": "Europe/Berlin",
        "tax_basis_points": 1900,
        "settings": {"country": "DE"},
    },
)
async def register_restaurant(request: Call) -> ASGIApp:
    requested = read_body(await request.whole_body(), RegisterRestaurant)
    context = context_of(request)
    email = read_email(requested.email)
    restaurant = Restaurant.of(requested, email=email)
    session = await context.sign_in.register(
        restaurant,
        email,
        requested.admin_name or "",
        requested.password,
        address_of(request),
        invitation_code=requested.invitation_code,
    )
    with contextlib.suppress(MirrorUnavailable, MirrorInDoubt):  # the reconciler adds it later
        await context.mirror.keep_restaurant(restaurant.id, encode(restaurant))
    return success(Registered(restaurant, session), status=201)


@endpoint(
    "POST",
    "/api/auth/login",
    action=PUBLIC,
    tag=_TAG,
    summary="Sign in",
    description="An unknown email and a wrong password get the same reply.",
    body=Login,
    answer=SignInSession,
    errors=(401,),
    example={"email": "ada@trattoria.example", "password": "a long and unusual passphrase"},
)
async def login(request: Call) -> ASGIApp:
    requested = read_body(await request.whole_body(), Login)
    return success(await context_of(request).sign_in.login(requested.email, requested.password, address_of(request)))


@endpoint(
    "POST",
    "/api/auth/refresh",
    action=PUBLIC,
    tag=_TAG,
    summary="Exchange a refresh token for new tokens",
    description="A refresh token is valid once. A use within ten seconds after the first one gets the same successor, "
    "so two tabs may refresh at once. A later use ends its session: all its tokens are refused within five seconds.",
    body=Refresh,
    answer=SignInSession,
    errors=(401,),
    example={"refresh_token": "cH0ZcXlVbJ3m2vJw5n1tq8uYk4sR7eXo0aLdT9fGi6M"},
)
async def refresh(request: Call) -> ASGIApp:
    requested = read_body(await request.whole_body(), Refresh)
    return success(await context_of(request).sign_in.refresh(requested.refresh_token, address_of(request)))


@endpoint(
    "POST",
    "/api/auth/logout",
    action=PUBLIC,
    tag=_TAG,
    summary="End a session",
    description="All tokens of the session are refused within five seconds, and its event streams end. An unknown token"
    " gets the same reply.",
    body=Refresh,
    answer=LoggedOut,
    example={"refresh_token": "cH0ZcXlVbJ3m2vJw5n1tq8uYk4sR7eXo0aLdT9fGi6M"},
)
async def logout(request: Call) -> ASGIApp:
    requested = read_body(await request.whole_body(), Refresh)
    await context_of(request).sign_in.logout(requested.refresh_token, address_of(request))
    return success(LoggedOut())


@endpoint(
    "GET",
    "/api/auth/me",
    action="me.read",
    tag=_TAG,
    summary="Show the user of this token",
    description="Also shows the restaurant, without its email for a guest.",
    answer=Me,
)
async def me(request: Call) -> ASGIApp:
    identity, context = request.identity, context_of(request)
    restaurant = (await context.menus.book(identity.restaurant_id)).restaurant if identity.restaurant_id else None
    if restaurant is not None and identity.role is Role.CUSTOMER:
        # Guests must not learn the email with which the admin signs in.
        restaurant = structs.replace(restaurant, email=None)
    return success(Me(identity.user_id, identity.role, identity.email, restaurant, identity.session_id))


@endpoint(
    "POST",
    "/api/auth/table-session",
    action=PUBLIC,
    tag=_TAG,
    summary="Get a token for a guest who scanned the code of a table",
    description="The token lets the guest read the menu, and place and follow orders of its own session.",
    body=OpenTableSession,
    answer=TableSession,
    status=201,
    errors=(404,),
    example={"slug": "trattoria-ada", "table_id": "2a6d1f0e-4c11-5c0a-9b1d-7f0c3b526f1e"},
)
async def table_session(request: Call) -> ASGIApp:
    requested = read_body(await request.whole_body(), OpenTableSession)
    opened = await context_of(request).sign_in.at_table(requested.slug, str(requested.table_id), address_of(request))
    return success(opened, status=201)


def address_of(request: Call) -> str:
    found: Any = request.scope.get("client_address")
    return str(found or "")


ROUTES = [register_restaurant, login, refresh, logout, me, table_session]
