"""Adds and changes users from the command line: operators, whom no route can reach, and the first admin of a
restaurant.

Users are plain rows without events.
"""

import getpass
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg

from services.sync.command_session import connected
from shared.entities.contract import encode
from shared.errors import Conflict, NotFound
from shared.postgres.pool import Connection
from shared.restaurants import Restaurant, insert_restaurant
from shared.security.emails import plain_email, read_email
from shared.security.one_time_codes import code_digest, new_code
from shared.security.passwords import check_new_password, hash_password
from shared.security.tokens import Identity, Role
from shared.settings import Settings

_INSERT = (
    "insert into users (id, restaurant_id, email, name, role, password_hash) values ($1, $2, $3, $4, $5, $6)"
    " on conflict (id) do update set password_hash = coalesce(users.password_hash, excluded.password_hash)"
)
_CHANGE = (
    "update users set password_hash = $2, updated_at = now() where email = $1 and deleted_at is null returning id::text"
)
_SET_ACTIVE = (
    "update users set is_active = $2, updated_at = now() where email = $1 and deleted_at is null returning id::text"
)
_BETWEEN = "select id::text, email from users where id between $1 and $2 order by id limit $3"
_SIGN_OUT = "select end_sessions_of($1)"
_EPOCH = "select token_epoch from users where id = $1"
_NOTE = (
    "insert into identity_events (restaurant_id, entity, entity_id, action, actor, changed)"
    " values ($1, 'user', $2, $3, $4, $5::text::json)"
)
_ISSUED = (
    "select restaurant_id, entity_id from identity_events"
    " where action = 'token_issued' and changed -> 'token' ->> 'after' = $1"
)
_INVITE = (
    "insert into one_time_codes (code_sha256, purpose, created_by, expires_at)"
    " values ($1, 'invitation', $2, now() + $3)"
)


async def add_user(
    connection: Connection,
    *,
    email: str,
    role: Role,
    password: str,
    restaurant: str | None = None,
    name: str = "",
    id_: str | None = None,
) -> str:
    """Adds a user and returns its id. `connection`: a connection of the writer role. `id_`: the id of the user; by
    default a new id. If a user with this id exists, its password stays.

    Raises InvalidInput, Conflict if the email is taken, and NotFound if the restaurant does not exist."""
    id_, email = id_ or str(uuid4()), read_email(email)
    check_new_password(password, email)
    try:
        await connection.execute(_INSERT, id_, restaurant, email, name, role.value, hash_password(password))
    except asyncpg.UniqueViolationError as error:
        raise Conflict("this email is taken", code="email_taken", field="email") from error
    except asyncpg.ForeignKeyViolationError as error:
        raise NotFound("no such restaurant", field="restaurant") from error
    return id_


async def set_password(connection: Connection, email: str, password: str) -> None:
    """Sets the password and ends all sessions of the user. Raises InvalidInput, NotFound."""
    check_new_password(password, email)
    async with connection.transaction():
        id_ = await connection.fetchval(_CHANGE, plain_email(email), hash_password(password))
        if id_ is None:
            raise NotFound("no such user", field="email")
        await connection.execute(_SIGN_OUT, id_)


async def set_active(connection: Connection, email: str, *, active: bool) -> None:
    """Deactivates a user and ends all its sessions, or activates it again. Raises NotFound."""
    async with connection.transaction():
        id_ = await connection.fetchval(_SET_ACTIVE, plain_email(email), active)
        if id_ is None:
            raise NotFound("no such user", field="email")
        if not active:
            await connection.execute(_SIGN_OUT, id_)


async def token_epoch(connection: Connection, user: str) -> int:
    """Returns the epoch that tokens of this user must carry (`users.token_epoch`), or 0 if there is no such user."""
    return int(await connection.fetchval(_EPOCH, user) or 0)


async def note_token(settings: Settings, identity: Identity) -> tuple[int, str]:
    """Notes in the audit that a token is issued. Returns (the epoch that it must carry, its family, which is the id by
    which it can be revoked)."""
    family = str(uuid4())
    async with connected(settings, settings.database_writer_url) as connection:
        # A token of an account that was signed out must carry the new epoch, or the services refuse it.
        epoch = await token_epoch(connection, identity.user_id)
        changed = encode({"token": {"before": None, "after": family}}).decode()
        await connection.execute(
            _NOTE, identity.restaurant_id or None, identity.user_id, "token_issued", getpass.getuser(), changed
        )
    return epoch, family


async def revoke_token(settings: Settings, family: str) -> None:
    """Revokes a token that `ticketrail token` printed. Raises NotFound."""
    async with connected(settings, settings.database_writer_url) as connection, connection.transaction():
        issued = await connection.fetchrow(_ISSUED, family)
        if issued is None:
            raise NotFound("no token with this id was issued")
        await connection.execute("select revoke_family($1)", family)
        changed = encode({"token": {"before": family, "after": None}}).decode()
        await connection.execute(
            _NOTE, issued["restaurant_id"], issued["entity_id"], "token_revoked", getpass.getuser(), changed
        )


async def add_restaurant(
    connection: Connection, restaurant: Restaurant, *, email: str, name: str, password: str
) -> None:
    """Adds a restaurant and its first admin in one transaction. Raises InvalidInput, and Conflict if the slug or the
    email is taken."""
    async with connection.transaction():
        try:
            await insert_restaurant(connection, restaurant)
        except asyncpg.UniqueViolationError as error:
            raise Conflict("this slug is taken", code="slug_taken", field="slug") from error
        await add_user(connection, email=email, role=Role.ADMIN, password=password, restaurant=restaurant.id, name=name)


async def add_invitation(connection: Connection, *, days: int, maker: str) -> str:
    """Makes a code that registers one restaurant, and returns it."""
    code = new_code()
    await connection.execute(_INVITE, code_digest(code), maker, timedelta(days=days))
    return code


async def users_between(connection: Connection, first: UUID, last: UUID, limit: int) -> list[tuple[str, str]]:
    """Returns (id, email) of the users from the first to the last id, in order of id."""
    return [tuple(row) for row in await connection.fetch(_BETWEEN, first, last, limit)]
