"""Users and restaurants in PostgreSQL, as plain rows. No other module of the API uses these tables.

The api role sees only the users of the current tenant. Before the tenant is known, functions of the database look up
one row at a time: the user of an email, or the session of a refresh token. The functions for sessions (begin, rotate,
refuse a used refresh token) are in shared/postgres/migrations/0002_back_office.sql."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
from msgspec import Struct

from shared.entities.contract import encode
from shared.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.restaurants import Restaurant, find_restaurant, find_restaurant_by_slug
from shared.security.emails import plain_email

_FIELDS = "id::text, restaurant_id::text, email, name, role, is_active, created_at, updated_at, deleted_at"
_INSERT_RESTAURANT = (
    "insert into restaurants (id, slug, name, currency, time_zone, cutoff_hour, tax_basis_points, email, settings)"
    " values ($1, $2, $3, $4, $5, $6, $7, $8, $9::text::jsonb)"
)
_INSERT_USER = (
    "insert into users (id, restaurant_id, email, name, role, password_hash, request_hash)"  # noqa: S608  (constants)
    " values ($1, $2, $3, $4, $5, $6, $7) on conflict (id) do nothing returning " + _FIELDS
)
_BEGIN_SESSION = "select begin_session($1, $2, $3, $4)"
_CHANGEABLE = ("email", "name", "role", "is_active", "password_hash", "deleted_at")


class User(Struct, frozen=True, kw_only=True):
    id: str
    email: str
    name: str
    role: str
    restaurant_id: str | None = None
    is_active: bool = True
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deleted_at: datetime | None = None


class Rotated(Struct, frozen=True):
    outcome: str
    """`rotated`, `reused` or `invalid`."""
    user: User | None
    """The user of the session; None if the token was not rotated."""


class Accounts:
    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    @asynccontextmanager
    async def _without_tenant(self) -> AsyncIterator[Connection]:
        try:
            async with self._postgres.connection() as connection:
                yield connection
        except UNAVAILABLE as error:
            raise Unavailable("sign-in needs the database, which is unavailable", retry_after=2.0) from error

    @asynccontextmanager
    async def _as_tenant(self, restaurant: str, *, readonly: bool = True) -> AsyncIterator[Connection]:
        committing = False
        try:
            async with self._postgres.tenant(restaurant, readonly=readonly) as connection:
                yield connection
                committing = not readonly
        except UNAVAILABLE as error:
            if committing:  # the commit was sent but not answered; a 503 would promise that nothing happened
                raise OutcomeUnknown("the database did not confirm the change; it may have been made") from error
            raise Unavailable("users need the database, which is unavailable", retry_after=2.0) from error
        except asyncpg.UniqueViolationError as error:
            field = "slug" if "slug" in (error.constraint_name or "") else "email"
            raise Conflict(f"this {field} is taken", code=f"{field}_taken", field=field) from error
        except asyncpg.ForeignKeyViolationError as error:
            raise NotFound("no such restaurant") from error

    # -- before the tenant is known ----------------------------------------------------------------------------

    async def by_email(self, email: str) -> tuple[User, str | None] | None:
        """Returns (user, password hash), or None for an unknown email."""
        async with self._without_tenant() as connection:
            row = await connection.fetchrow("select * from sign_in_user($1)", plain_email(email))
        return None if row is None else (_user(row), row["password_hash"])

    async def find_restaurant_by_slug(self, slug: str) -> Restaurant | None:
        async with self._without_tenant() as connection:
            return await find_restaurant_by_slug(connection, slug)

    async def begin_session(self, token_sha256: bytes, user: str, matched_hash: str, ttl_seconds: int) -> bool:
        """Begins a session. Returns False if the user is inactive or if `matched_hash` is no longer the user's hash."""
        async with self._without_tenant() as connection:
            begun: bool = await connection.fetchval(
                _BEGIN_SESSION, token_sha256, user, matched_hash, timedelta(seconds=ttl_seconds)
            )
        return begun

    async def rotate_session(self, old_sha256: bytes, new_sha256: bytes, ttl_seconds: int) -> Rotated:
        async with self._without_tenant() as connection:
            row = await connection.fetchrow(
                "select * from rotate_session($1, $2, $3)", old_sha256, new_sha256, timedelta(seconds=ttl_seconds)
            )
            assert row is not None
        return Rotated(row["outcome"], _user(row) if row["outcome"] == "rotated" else None)

    async def end_session(self, token_sha256: bytes) -> None:
        async with self._without_tenant() as connection:
            await connection.execute("select end_session($1)", token_sha256)

    # -- restaurants -------------------------------------------------------------------------------------------

    async def register(
        self, restaurant: Restaurant, email: str, name: str, password_hash: str, token_sha256: bytes, ttl_seconds: int
    ) -> User:
        """Creates the restaurant, its first admin and a session in one transaction. Raises Conflict if the slug or
        the email is in use, and InvalidInput for a time zone that the database does not know."""
        try:
            async with self._as_tenant(restaurant.id, readonly=False) as connection:
                await connection.execute(
                    _INSERT_RESTAURANT,
                    restaurant.id,
                    restaurant.slug,
                    restaurant.name,
                    restaurant.currency,
                    restaurant.time_zone,
                    restaurant.cutoff_hour,
                    restaurant.tax_basis_points,
                    restaurant.email,
                    encode(restaurant.settings).decode(),
                )
                row = await connection.fetchrow(
                    _INSERT_USER, str(uuid4()), restaurant.id, plain_email(email), name, "admin", password_hash, None
                )
                user = _user(row)
                await connection.execute(
                    _BEGIN_SESSION, token_sha256, user.id, password_hash, timedelta(seconds=ttl_seconds)
                )
        except asyncpg.InvalidParameterValueError as error:
            raise InvalidInput("the database does not know this time zone", field="time_zone") from error
        return user

    async def restaurant(self, restaurant_id: str) -> Restaurant | None:
        async with self._without_tenant() as connection:
            return await find_restaurant(connection, restaurant_id)

    # -- users of a restaurant ---------------------------------------------------------------------------------

    async def may_administer(self, restaurant: str, user_id: str) -> bool:
        """Returns whether the caller may administer the restaurant. False for a user that is no longer an active admin,
        although its token may still be valid. True for a subject that is not a user, because its token is signed."""
        async with self._as_tenant(restaurant) as connection:
            is_admin: bool | None = await connection.fetchval(
                "select role = 'admin' and is_active and deleted_at is null from users where id::text = $1", user_id
            )
        return is_admin is not False

    async def users(
        self, restaurant: str, *, limit: int, before: tuple[datetime, str] | None, role: str | None, deleted: bool
    ) -> list[User]:
        """Returns users, newest first. `before` is (created_at, id) of the last user of the previous page. `deleted`
        includes deleted users."""
        at, id_ = before or (None, None)
        async with self._as_tenant(restaurant) as connection:
            rows = await connection.fetch(
                f"select {_FIELDS} from users where ($1::timestamptz is null or (created_at, id) < ($1, $2::uuid))"  # noqa: S608
                " and ($3::text is null or role = $3) and (deleted_at is null or $4)"
                " order by created_at desc, id desc limit $5",
                at,
                id_,
                role,
                deleted,
                limit,
            )
        return [_user(row) for row in rows]

    async def user(self, restaurant: str, id_: str, *, deleted: bool = False) -> User:
        """Returns a user. Raises NotFound."""
        async with self._as_tenant(restaurant) as connection:
            return await _one(connection, id_, deleted=deleted)

    async def add(
        self, restaurant: str, id_: str, email: str, name: str, role: str, password_hash: str, request_hash: str | None
    ) -> User | None:
        """Adds a user. `request_hash`: a slow hash of a request with an Idempotency-Key, because the request contains
        the password. Returns None if there is a user with this id. Raises Conflict if the email is in use."""
        async with self._as_tenant(restaurant, readonly=False) as connection:
            row = await connection.fetchrow(
                _INSERT_USER, id_, restaurant, plain_email(email), name, role, password_hash, request_hash
            )
        return None if row is None else _user(row)

    async def request_hash(self, restaurant: str, id_: str) -> str | None:
        """Returns the hash of the request that has added a user, or None if it had no Idempotency-Key."""
        async with self._as_tenant(restaurant) as connection:
            found: str | None = await connection.fetchval("select request_of_user($1)", id_)
        return found

    async def restore(self, restaurant: str, id_: str) -> User:
        """Restores a user. Raises NotFound, and Conflict if the user is not deleted or another one has its email."""
        if (await self.user(restaurant, id_, deleted=True)).deleted_at is None:
            raise Conflict("the user is not deleted", code="not_deleted")
        return await self.change(restaurant, id_, {"deleted_at": None}, deleted=True)

    async def change(self, restaurant: str, id_: str, fields: dict[str, Any], *, deleted: bool = False) -> User:
        """Changes columns of a user. Revokes all sessions if access was reduced or the password changed. Raises
        NotFound, and Conflict if the email is in use or the restaurant would have no admin left."""
        assert set(fields) <= set(_CHANGEABLE)
        async with self._as_tenant(restaurant, readonly=False) as connection:
            # Changes run one at a time, because two admins who remove each other would leave none.
            await connection.execute("select pg_advisory_xact_lock(hashtextextended($1, 0))", restaurant)
            before = await _one(connection, id_, deleted=deleted)
            if "email" in fields:
                fields = {**fields, "email": plain_email(fields["email"])}
            names = list(fields)
            assignments = ", ".join(f"{name} = ${number}" for number, name in enumerate(names, start=2))
            row = await connection.fetchrow(
                f"update users set {assignments + ', ' if names else ''}updated_at = now() where id = $1"  # noqa: S608
                f" returning {_FIELDS}",
                id_,
                *fields.values(),
            )
            after = _user(row)
            admins = await connection.fetchval(
                "select count(*) from users where role = 'admin' and is_active and deleted_at is null"
            )
            if not admins:
                raise Conflict("a restaurant needs an admin", code="last_admin")
            if before.role != after.role or "password_hash" in fields or not after.is_active or after.deleted_at:
                await connection.execute("select end_sessions_of($1)", id_)
        return after


async def _one(connection: Connection, id_: str, *, deleted: bool) -> User:
    row = await connection.fetchrow(
        f"select {_FIELDS} from users where id = $1 and (deleted_at is null or $2)",  # noqa: S608
        id_,
        deleted,
    )
    if row is None:
        raise NotFound("no such user")
    return _user(row)


def _user(row: Any) -> User:
    return User(**{name: row[name] for name in User.__struct_fields__ if name in row.keys()})  # noqa: SIM118
