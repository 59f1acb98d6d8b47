"""The API keys of restaurants in PostgreSQL, as plain rows. shared/http/api_key_verifier.py verifies them."""

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import asyncpg
import structlog
from msgspec import Struct

from shared.entities.contract import now
from shared.errors import Conflict, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.rail.idempotency import key_reused
from shared.security.api_key_text import derived_key, new_key
from shared.security.permissions import Scope
from shared.security.tokens import Tokens

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
_FIND = "select * from find_api_key($1)"
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
    def __init__(self, postgres: Postgres, tokens: Tokens) -> None:
        """`postgres`: a pool of the api role. Raises BadKey if `tokens` can only verify."""
        self._postgres = postgres
        self._secret = tokens.derived_secret("api-key").hex()

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
        self,
        restaurant: str,
        id_: str,
        name: str,
        scopes: list[Scope],
        expires_at: datetime | None,
        request_hash: str | None,
        *,
        actor: str,
    ) -> tuple[ApiKey, str, bool]:
        """Makes a key. Returns (key, its text, whether an earlier request has made it). `request_hash`: the hash of a
        request with an Idempotency-Key, from which `id_` is derived. The text is not stored: that of such a request is
        derived from the key that signs tokens, so a repeat shows the same one. Raises InvalidInput for a key that was
        used for another request and for an expiry that has passed, and Conflict if the restaurant has too many valid
        keys."""
        made = new_key() if request_hash is None else derived_key(self._secret, f"{id_}/{request_hash}")
        async with self._as_tenant(restaurant, readonly=False) as connection:
            await connection.execute(_LOCK, restaurant)
            if request_hash is not None and (earlier := await connection.fetchrow(_ONE, id_)) is not None:
                row = await connection.fetchrow(_FIND, made.prefix)
                if row is None or not hmac.compare_digest(row["key_sha256"], made.digest):
                    raise key_reused()
                return _key(earlier), made.text, True
            if expires_at is not None and expires_at <= now():
                raise InvalidInput("must be in the future", field="expires_at")
            if await connection.fetchval(_COUNT) >= MAX_VALID_KEYS:
                raise Conflict(f"a restaurant has at most {MAX_VALID_KEYS} valid keys", code="too_many_api_keys")
            names = sorted({scope.value for scope in scopes})
            row = await connection.fetchrow(
                _INSERT, id_, restaurant, made.prefix, made.digest, name, names, actor, expires_at
            )
        key = _key(row)
        log.info("api_key_made", api_key=key.id, prefix=key.prefix, restaurant=restaurant)
        return key, made.text, False

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
