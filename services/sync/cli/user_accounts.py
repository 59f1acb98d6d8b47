"""Adds users from the command line: operators, because no route can add them, and the first admin of a restaurant.

Users are plain rows without events.
"""

from uuid import UUID, uuid4

import asyncpg

from shared.errors import Conflict, NotFound
from shared.postgres.pool import Connection
from shared.security.emails import plain_email
from shared.security.passwords import hash_password
from shared.security.tokens import Role

_INSERT = (
    "insert into users (id, restaurant_id, email, name, role, password_hash) values ($1, $2, $3, $4, $5, $6)"
    " on conflict (id) do update set password_hash = coalesce(users.password_hash, excluded.password_hash)"
)
_CHANGE = (
    "update users set password_hash = $2, updated_at = now() where lower(email) = lower($1) and deleted_at is null"
    " returning id::text"
)
_BETWEEN = "select id::text, email from users where id between $1 and $2 order by id limit $3"
_SIGN_OUT = "delete from refresh_tokens where user_id = $1"


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

    Raises Conflict if the email is taken, and NotFound if the restaurant does not exist."""
    id_ = id_ or str(uuid4())
    try:
        await connection.execute(
            _INSERT, id_, restaurant, plain_email(email), name, role.value, hash_password(password)
        )
    except asyncpg.UniqueViolationError as error:
        raise Conflict("this email is taken", code="email_taken", field="email") from error
    except asyncpg.ForeignKeyViolationError as error:
        raise NotFound("no such restaurant", field="restaurant") from error
    return id_


async def set_password(connection: Connection, email: str, password: str) -> None:
    """Sets the password and ends all sessions of the user. Raises NotFound."""
    async with connection.transaction():
        id_ = await connection.fetchval(_CHANGE, plain_email(email), hash_password(password))
        if id_ is None:
            raise NotFound("no such user", field="email")
        await connection.execute(_SIGN_OUT, id_)


async def users_between(connection: Connection, first: UUID, last: UUID, limit: int) -> list[tuple[str, str]]:
    """Returns (id, email) of the users from the first to the last id, in order of id."""
    return [tuple(row) for row in await connection.fetch(_BETWEEN, first, last, limit)]
