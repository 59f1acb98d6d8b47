"""Users and restaurants in PostgreSQL, as plain rows. No other module of the API uses these tables.

The api role sees only the users of the current tenant. Before the tenant is known, functions of the database look up
one row at a time: the user of an email, or the session of a refresh token. The functions for sessions (begin, rotate,
refuse a used refresh token) are in shared/postgres/migrations/0002_back_office.sql."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import structlog
from msgspec import Struct

from shared.errors import Conflict, Forbidden, NotFound, OutcomeUnknown, Unavailable
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.restaurants import Restaurant, find_restaurant, find_restaurant_by_slug, insert_restaurant
from shared.security.emails import plain_email

log = structlog.get_logger(__name__)

_FIELDS = "id::text, restaurant_id::text, email, name, role, is_active, created_at, updated_at, deleted_at"
_INSERT_USER = (
    "insert into users (id, restaurant_id, email, name, role, password_hash, request_hash)"  # noqa: S608  (constants)
    " values ($1, $2, $3, $4, $5, $6, $7) on conflict (id) do nothing returning " + _FIELDS
)
_BEGIN_SESSION = "select family, epoch from begin_session($1, $2, $3, $4)"
# The actor in the audit of identity, and the address of the request (0008_identity.sql).
_SET_ACTOR = "select set_config('app.actor', $1, true)"
_SET_ADDRESS = "select set_config('app.address', $1, true)"
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


class Session(Struct, frozen=True):
    """The part of a session that its access tokens carry."""

    family: str
    """The id that all refresh tokens of the session share."""
    epoch: int
    """The epoch of the user. Ending all sessions of the user raises it."""


class Rotated(Struct, frozen=True):
    outcome: str
    """`rotated`, `repeated`, `reused` or `invalid`."""
    found: tuple[User, Session] | None
    """The user and the session; None if the token is refused."""


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
    async def _session_of(self, address: str) -> AsyncIterator[Connection]:
        """A transaction whose events in the audit of identity have this address of a client."""
        async with self._without_tenant() as connection, connection.transaction():
            await connection.execute(_SET_ADDRESS, address)
            yield connection

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

    async def note_failed_sign_in(self, email: str, address: str) -> None:
        async with self._session_of(address) as connection:
            await connection.execute("select note_failed_sign_in($1)", plain_email(email))

    async def find_restaurant_by_slug(self, slug: str) -> Restaurant | None:
        async with self._without_tenant() as connection:
            return await find_restaurant_by_slug(connection, slug)

    async def begin_session(
        self, token_sha256: bytes, user: str, matched_hash: str, ttl_seconds: int, address: str
    ) -> Session | None:
        """Begins a session. Returns None if the user is inactive or if `matched_hash` is no longer the user's hash."""
        async with self._session_of(address) as connection:
            row = await connection.fetchrow(
                _BEGIN_SESSION, token_sha256, user, matched_hash, timedelta(seconds=ttl_seconds)
            )
        return None if row is None else _session(row)

    async def rotate_session(
        self, old_sha256: bytes, new_sha256: bytes, ttl_seconds: int, access_ttl_seconds: float, address: str
    ) -> Rotated:
        """Exchanges a refresh token. `access_ttl_seconds`: the time in which all access tokens of the session expire,
        which are refused if the token was used before."""
        async with self._session_of(address) as connection:
            row = await connection.fetchrow(
                "select * from rotate_session($1, $2, $3, $4)",
                old_sha256,
                new_sha256,
                timedelta(seconds=ttl_seconds),
                timedelta(seconds=access_ttl_seconds),
            )
            assert row is not None
        return Rotated(row["outcome"], None if row["id"] is None else (_user(row), _session(row)))

    async def end_session(self, token_sha256: bytes, access_ttl_seconds: float, address: str) -> None:
        async with self._session_of(address) as connection:
            await connection.execute("select end_session($1, $2)", token_sha256, timedelta(seconds=access_ttl_seconds))

    # -- passwords ---------------------------------------------------------------------------------------------

    async def email_and_password_of(self, user_id: str) -> tuple[str, str] | None:
        """Returns (email, password hash) of an active user, or None, also for a subject that is not a user."""
        try:
            UUID(user_id)
        except ValueError:
            return None
        async with self._without_tenant() as connection:
            row = await connection.fetchrow("select * from password_of($1)", user_id)
        return None if row is None or row["password_hash"] is None else (row["email"], row["password_hash"])

    async def change_password(self, user_id: str, known_hash: str, new_hash: str, address: str) -> bool:
        """Replaces a password and ends all sessions of the user. Returns False if `known_hash` is no longer the user's
        hash."""
        async with self._session_of(address) as connection:
            changed: bool = await connection.fetchval(
                "select change_password($1, $2, $3)", user_id, known_hash, new_hash
            )
        return changed

    async def reset_password(self, email: str, code_sha256: bytes, new_hash: str, address: str) -> bool:
        """Replaces a password with a code and ends all sessions of the user. Returns False for a code that is not valid
        for this email."""
        async with self._session_of(address) as connection:
            user = await connection.fetchval(
                "select reset_password($1, $2, $3)", plain_email(email), code_sha256, new_hash
            )
        return user is not None

    async def make_reset_code(
        self, restaurant: str, id_: str, code_sha256: bytes, ttl_seconds: int, *, actor: str
    ) -> None:
        """Stores the code that resets a user's password, in place of an earlier one. Raises NotFound."""
        async with self._as_tenant(restaurant, readonly=False) as connection:
            if not await connection.fetchval(
                "select make_reset_code($1, $2, $3, $4)", id_, code_sha256, actor, timedelta(seconds=ttl_seconds)
            ):
                raise NotFound("no such user")

    # -- restaurants -------------------------------------------------------------------------------------------

    async def register(
        self,
        restaurant: Restaurant,
        email: str,
        name: str,
        password_hash: str,
        token_sha256: bytes,
        ttl_seconds: int,
        address: str,
        *,
        invitation_sha256: bytes | None = None,
    ) -> tuple[User, Session]:
        """Creates the restaurant, its first admin and a session, and uses up the invitation if there is one, in one
        transaction. Raises Conflict if the slug or the email is in use, InvalidInput for a time zone that the database
        does not know, and Forbidden for an invitation that is not valid."""
        async with self._as_tenant(restaurant.id, readonly=False) as connection:
            await connection.execute(_SET_ADDRESS, address)
            if invitation_sha256 is not None and not await connection.fetchval(
                "select use_invitation($1)", invitation_sha256
            ):
                raise Forbidden(
                    "this invitation is wrong, used or expired", code="invitation_invalid", field="invitation_code"
                )
            await insert_restaurant(connection, restaurant)
            row = await connection.fetchrow(
                _INSERT_USER, str(uuid4()), restaurant.id, plain_email(email), name, "admin", password_hash, None
            )
            user = _user(row)
            begun = await connection.fetchrow(
                _BEGIN_SESSION, token_sha256, user.id, password_hash, timedelta(seconds=ttl_seconds)
            )
        return user, _session(begun)

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
        self,
        restaurant: str,
        id_: str,
        email: str,
        name: str,
        role: str,
        password_hash: str,
        request_hash: str | None,
        *,
        actor: str,
    ) -> User | None:
        """Adds a user. `request_hash`: a slow hash of a request with an Idempotency-Key, because the request contains
        the password. Returns None if there is a user with this id. Raises Conflict if the email is in use."""
        async with self._as_tenant(restaurant, readonly=False) as connection:
            await connection.execute(_SET_ACTOR, actor)
            row = await connection.fetchrow(
                _INSERT_USER, id_, restaurant, plain_email(email), name, role, password_hash, request_hash
            )
        if row is None:
            return None
        log.info("user_created", user=id_, role=role, restaurant=restaurant)
        return _user(row)

    async def request_hash(self, restaurant: str, id_: str) -> str | None:
        """Returns the hash of the request that has added a user, or None if it had no Idempotency-Key."""
        async with self._as_tenant(restaurant) as connection:
            found: str | None = await connection.fetchval("select request_of_user($1)", id_)
        return found

    async def restore(self, restaurant: str, id_: str, *, actor: str) -> User:
        """Restores a user. Raises NotFound, and Conflict if the user is not deleted or another one has its email."""
        if (await self.user(restaurant, id_, deleted=True)).deleted_at is None:
            raise Conflict("the user is not deleted", code="not_deleted")
        return await self.change(restaurant, id_, {"deleted_at": None}, deleted=True, actor=actor)

    async def change(
        self, restaurant: str, id_: str, fields: dict[str, Any], *, actor: str, deleted: bool = False
    ) -> User:
        """Changes columns of a user. Revokes all sessions if access was reduced or the password changed. Raises
        NotFound, and Conflict if the email is in use or the restaurant would have no admin left."""
        assert set(fields) <= set(_CHANGEABLE)
        async with self._as_tenant(restaurant, readonly=False) as connection:
            # Changes run one at a time, because two admins who remove each other would leave none.
            await connection.execute("select pg_advisory_xact_lock(hashtextextended($1, 0))", restaurant)
            await connection.execute(_SET_ACTOR, actor)
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
        log.info("user_changed", user=id_, fields=names, restaurant=restaurant)
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


def _session(row: Any) -> Session:
    return Session(row["family"], row["epoch"])
