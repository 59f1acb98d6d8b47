"""Authentication by API key. Every service verifies keys by itself.

A key that was verified is looked up again after a few seconds, so a revocation takes effect everywhere within 5 s.
While PostgreSQL is unavailable, keys that this process has verified stay valid until they expire, because orders must
be accepted then; a key that this process does not know gets 503.

Wrong keys are counted by (address, key prefix) and by address. A caller that has used up its tries gets 429 before
anything is looked up. A key that this process has verified, or that was used from the same address before, is never
refused for the failures of others: a guest in the network of a restaurant must not stop its tills. Without a mirror a
process knows only its own keys.
"""

import asyncio
import hmac
import math
import time
from contextlib import suppress
from datetime import datetime

import structlog
from msgspec import Struct

from shared.errors import TooManyRequests, Unauthenticated, Unavailable
from shared.http.limits import Rate, TokenBucket, counted_as
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.security.api_key_text import digest_of, prefix_of
from shared.security.tokens import Grant, Identity, Role
from shared.settings import Settings

log = structlog.get_logger(__name__)

_RECHECK_SECONDS = 3.0
_GRANT_SECONDS = 24 * 3600.0  # an event stream of a key ends after this time, and its client opens another one
_RECHECK_TIMEOUT_SECONDS = 1.0
_MAX_KNOWN = 10_000
_FAMILIAR_SECONDS = 30 * 24 * 3600
_FIND = "select * from find_api_key($1)"
_NOTE_USE = "select note_api_key_use($1)"


class _Known(Struct):
    grant: Grant
    expires_at: datetime | None
    checked_at: float
    """A time of the monotonic clock."""

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at.timestamp() <= time.time()


class ApiKeyVerifier:
    def __init__(self, postgres: Postgres, mirror: Mirror | None, settings: Settings) -> None:
        """`postgres`: a pool of the api role. `mirror`: counts failures for all instances; without it, each counts
        alone."""
        self._postgres = postgres
        self._mirror = mirror
        self._known: dict[bytes, _Known] = {}
        """Digest of a key -> what it grants. A dump of the memory shows no key."""
        of_prefix, of_address = settings.api_key_failures_per_prefix_and_address, settings.api_key_failures_per_address
        window = settings.failure_window_seconds
        self._by_prefix = TokenBucket(mirror, "api-key", Rate(of_prefix, of_prefix / window))
        self._by_address = TokenBucket(mirror, "api-key-address", Rate(of_address, of_address / window))

    async def verify(self, key: str, address: str, *, field: str = "Authorization") -> Grant:
        """Returns what a key grants. `field`: the header that contains it. Raises Unauthenticated (the same for
        every wrong key), TooManyRequests, and Unavailable if the key can be neither confirmed nor refused."""
        digest = digest_of(key)
        known = self._known.get(digest)
        if known is not None:
            if known.expired:
                raise _refused(field)
            if time.monotonic() - known.checked_at < _RECHECK_SECONDS:
                return known.grant
            known.checked_at = time.monotonic()  # other requests with this key do not look it up as well
            return await self._recheck(key, digest, known, field)
        prefix, origin = prefix_of(key), counted_as(address)
        pair, taken = f"{origin}:{prefix or ''}", list[tuple[TokenBucket, str]]()
        for bucket, caller in ((self._by_prefix, pair), (self._by_address, origin)):
            wait, _ = await bucket.take(caller)
            if not wait:
                taken.append((bucket, caller))
            elif bucket is self._by_prefix or not await self._is_familiar(pair):
                await _give_back(taken)
                raise TooManyRequests("too many wrong API keys; try again later", retry_after=math.ceil(wait))
        try:
            grant = await self._look_up(prefix, digest) if prefix else None
        except UNAVAILABLE as error:
            await _give_back(taken)
            raise Unavailable("API keys need the database, which is unavailable", retry_after=2.0) from error
        if grant is None:
            log.warning("api_key_refused", prefix=prefix, address=address)
            raise _refused(field)
        await _give_back(taken)
        await self._make_familiar(pair)
        return grant

    async def _is_familiar(self, pair: str) -> bool:
        if self._mirror is None:
            return False
        try:
            return await self._mirror.is_familiar(f"api-key:{pair}")
        except (MirrorUnavailable, MirrorInDoubt):
            return False

    async def _make_familiar(self, pair: str) -> None:
        if self._mirror is not None:
            with suppress(MirrorUnavailable, MirrorInDoubt):  # the next instance that verifies the key notes it
                await self._mirror.make_familiar(f"api-key:{pair}", _FAMILIAR_SECONDS)

    async def _recheck(self, key: str, digest: bytes, known: _Known, field: str) -> Grant:
        try:
            async with asyncio.timeout(_RECHECK_TIMEOUT_SECONDS):
                grant = await self._look_up(prefix_of(key) or "", digest)
        except UNAVAILABLE:
            return known.grant
        if grant is None:
            self._known.pop(digest, None)
            raise _refused(field)
        return grant

    async def _look_up(self, prefix: str, digest: bytes) -> Grant | None:
        """Returns what a valid key grants, and keeps it. Raises one of UNAVAILABLE."""
        async with self._postgres.connection() as connection:
            row = await connection.fetchrow(_FIND, prefix)
            if row is None or not hmac.compare_digest(row["key_sha256"], digest) or row["revoked"]:
                return None
            identity = Identity(row["id"], Role.STAFF, row["restaurant_id"], scopes=frozenset(row["scopes"]))
            until = time.time() + _GRANT_SECONDS
            if row["expires_at"] is not None:
                until = min(until, row["expires_at"].timestamp())
            grant = Grant(identity, until, ((f"user:{row['id']}", 0),))
            known = _Known(grant, row["expires_at"], time.monotonic())
            if known.expired:
                return None
            if row["idle"] and await connection.fetchval(_NOTE_USE, row["id"]):
                log.info("api_key_first_used", api_key=row["id"], prefix=prefix, restaurant=row["restaurant_id"])
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[digest] = known
        return grant


async def _give_back(taken: list[tuple[TokenBucket, str]]) -> None:
    for bucket, caller in taken:
        await bucket.give_back(caller)


def _refused(field: str) -> Unauthenticated:
    return Unauthenticated("the API key is wrong, revoked or expired", field=field)
