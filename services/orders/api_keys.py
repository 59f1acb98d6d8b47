"""The API keys of restaurants in PostgreSQL, as plain rows. shared/http/api_keys.py verifies them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import uuid4

import asyncpg
import structlog
from msgspec import Struct

from shared.errors import Conflict, NotFound, OutcomeUnknown, Unavailable
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.security.api_keys import new_key
from shared.security.permissions import Scope

log = structlog.get_logger(__name__)

MAX_VALID_KEYS = 100
"""The number of valid keys that a restaurant may have."""

_FIELDS = (
    "id::text, prefix, name, scopes, terminal_id::text, created_at, created_by, expires_at, first_used_at,"
    " last_used_at, revoked_at, revoked_by"
)
_LOCK = "select pg_advisory_xact_lock(hashtextextended('api-keys:' || $1, 0))"
_COUNT = "select count(*) from api_keys where revoked_at is null and (expires_at is null or expires_at > now())"
_INSERT = (
    "insert into api_keys (id, restaurant_id, prefix, key_sha256, name, scopes, created_by, expires_at)"  # noqa: S608
    f" values ($1, $2, $3, $4, $5, $6, $7, $8) returning {_FIELDS}"
)
_PAGE = (
    f"select {_FIELDS} from api_keys where ($1::timestamptz is null or (created_at, id) < ($1, $2::uuid))"  # noqa: S608
    " order by created_at desc, id desc limit $3"
)
_ONE = f"select {_FIELDS} from api_keys where id = $1"  # noqa: S608
_REVOKE = "select revoke_api_key($1, $2)"


class ApiKey(Struct, frozen=True, kw_only=True):
    """An API key without its secret. `last_used_at` is exact to a minute."""

    id: str
    prefix: str
    name: str
    scopes: list[str]
    terminal_id: str | None
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    first_used_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None
    revoked_by: str | None


class ApiKeyStore:
    def __init__(self, postgres: Postgres) -> None:
        """`postgres`: a pool of the api role."""
        self._postgres = postgres

    @asynccontextmanager
    async def _as_tenant(self, restaurant: str, *, readonly: bool = True) -> AsyncIterator[Connection]:
        committing = False
        try:
            async with self._postgres.tenant(restaurant, readonly=readonly) as connection:
                yield connection
                committing = not readonly
        except UNAVAILABLE as error:
            if committing:
                raise OutcomeUnknown("the database did not confirm the change; it may have been made") from error
            raise Unavailable("API keys need the database, which is unavailable", retry_after=2.0) from error
        except asyncpg.ForeignKeyViolationError as error:
            raise NotFound("no such restaurant") from error

    async def add(
        self, restaurant: str, name: str, scopes: list[Scope], expires_at: datetime | None, *, actor: str
    ) -> tuple[ApiKey, str]:
        """Makes a key. Returns (key, its text); the text is not stored. Raises Conflict if the restaurant has
        too many valid keys."""
        made = new_key()
        async with self._as_tenant(restaurant, readonly=False) as connection:
            await connection.execute(_LOCK, restaurant)
            if await connection.fetchval(_COUNT) >= MAX_VALID_KEYS:
                raise Conflict(f"a restaurant has at most {MAX_VALID_KEYS} valid keys", code="too_many_api_keys")
            names = sorted({scope.value for scope in scopes})
            row = await connection.fetchrow(
                _INSERT, str(uuid4()), restaurant, made.prefix, made.digest, name, names, actor, expires_at
            )
        key = _key(row)
        log.info("api_key_made", api_key=key.id, prefix=key.prefix, restaurant=restaurant)
        return key, made.text

    async def page(self, restaurant: str, *, limit: int, before: tuple[datetime, str] | None) -> list[ApiKey]:
        """Returns keys, also revoked and expired ones, newest first. `before` is (created_at, id) of the last key of
        the previous page."""
        at, id_ = before or (None, None)
        async with self._as_tenant(restaurant) as connection:
            return [_key(row) for row in await connection.fetch(_PAGE, at, id_, limit)]

    async def one(self, restaurant: str, id_: str) -> ApiKey:
        """Returns a key. Raises NotFound."""
        async with self._as_tenant(restaurant) as connection:
            return await _one(connection, id_)

    async def revoke(self, restaurant: str, id_: str, *, actor: str) -> ApiKey:
        """Revokes a key; a repeat changes nothing. Raises NotFound."""
        async with self._as_tenant(restaurant, readonly=False) as connection:
            await connection.execute(_REVOKE, id_, actor)
            revoked = await _one(connection, id_)
        log.info("api_key_revoked", api_key=id_, prefix=revoked.prefix, restaurant=restaurant)
        return revoked


async def _one(connection: Connection, id_: str) -> ApiKey:
    row = await connection.fetchrow(_ONE, id_)
    if row is None:
        raise NotFound("no such API key")
    return _key(row)


def _key(row: Any) -> ApiKey:
    return ApiKey(**dict(row))
