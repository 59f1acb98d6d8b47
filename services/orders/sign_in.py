"""Sign-in: passwords, sessions with rotating refresh tokens, and tokens for guests at a table.

An unknown email and a wrong password get the same reply after the same work, so that a reply does not reveal which
accounts exist. Attempts are limited for each account and each address. A refresh token is valid once. A second use
means that it was stolen, and ends the session.
"""

import asyncio
import hashlib
import math
import secrets
from functools import cache
from uuid import uuid4
from zoneinfo import available_timezones

from msgspec import Struct

from services.orders.accounts import Accounts, User
from services.orders.entity_reads import EntityReads
from shared.entities import table
from shared.errors import InvalidInput, NotFound, TooManyRequests, Unauthenticated
from shared.http.limits import Rate, TokenBucket, counted_as
from shared.mirror.mirror import Mirror
from shared.restaurants import Restaurant
from shared.security.emails import plain_email
from shared.security.passwords import fits, hash_password
from shared.security.tokens import Identity, Role, Tokens
from shared.settings import Settings

_ATTEMPTS_WINDOW_SECONDS = 300.0
_HASHING_CONCURRENCY = 2


class SignInSession(Struct, frozen=True):
    access_token: str
    refresh_token: str
    expires_in: int
    """The lifetime of the access token in seconds."""
    user: User
    token_type: str = "Bearer"  # noqa: S105


class TableSession(Struct, frozen=True):
    access_token: str
    expires_in: int
    customer_session_id: str
    restaurant_id: str
    table_id: str
    token_type: str = "Bearer"  # noqa: S105


class SignIn:
    def __init__(
        self, accounts: Accounts, reads: EntityReads, tokens: Tokens, mirror: Mirror, settings: Settings
    ) -> None:
        """Raises BadKey if `tokens` can only verify."""
        tokens.require_signing()
        self._accounts = accounts
        self._reads = reads
        self._tokens = tokens
        self._settings = settings
        self._unknown_account_hash = hash_password(secrets.token_urlsafe(16))
        self._hashing = asyncio.Semaphore(_HASHING_CONCURRENCY)
        of_account, of_address = settings.sign_in_attempts_per_account, settings.sign_in_attempts_per_address
        self._by_account = TokenBucket(mirror, "tries", Rate(of_account, of_account / _ATTEMPTS_WINDOW_SECONDS))
        self._by_address = TokenBucket(mirror, "tries-from", Rate(of_address, of_address / _ATTEMPTS_WINDOW_SECONDS))

    async def hash(self, password: str) -> str:
        async with self._hashing:
            return await asyncio.to_thread(hash_password, password)

    async def fits(self, stored_hash: str, password: str) -> bool:
        async with self._hashing:
            return await asyncio.to_thread(fits, stored_hash, password)

    async def register(
        self, restaurant: Restaurant, email: str, name: str, password: str, address: str
    ) -> SignInSession:
        """Registers a restaurant and its first admin. Raises Conflict, InvalidInput, TooManyRequests."""
        await self._count(self._by_address, counted_as(address))
        if restaurant.time_zone not in await asyncio.to_thread(_time_zones):
            raise InvalidInput("not a known time zone; an example is Europe/Berlin", field="time_zone")
        hashed, token, ttl = (
            await self.hash(password),
            secrets.token_urlsafe(32),
            self._settings.refresh_token_ttl_seconds,
        )
        user = await self._accounts.register(restaurant, email, name, hashed, _digest(token), ttl)
        return self._session(user, token)

    async def count_user(self, address: str) -> None:
        """Counts an attempt to create a user, or to change an email or password. Raises TooManyRequests. Such attempts
        are limited, because hashing is expensive and the reply reveals whether an email is in use."""
        await self._count(self._by_address, f"users:{counted_as(address)}")

    async def login(self, email: str, password: str, address: str) -> SignInSession:
        """Signs a user in. Raises Unauthenticated, TooManyRequests."""
        await self._count(self._by_address, counted_as(address))
        await self._count(self._by_account, hashlib.sha256(plain_email(email).encode()).hexdigest()[:32])
        found = await self._accounts.by_email(email)
        stored_hash = found[1] if found is not None and found[1] else None
        matches = await self.fits(stored_hash or self._unknown_account_hash, password)
        if found is None or stored_hash is None or not matches:
            raise Unauthenticated("email or password is wrong", code="wrong_credentials")
        token, ttl = secrets.token_urlsafe(32), self._settings.refresh_token_ttl_seconds
        if not await self._accounts.begin_session(_digest(token), found[0].id, stored_hash, ttl):
            # The password was changed or the user was deactivated after the lookup.
            raise Unauthenticated("email or password is wrong", code="wrong_credentials")
        return self._session(found[0], token)

    async def refresh(self, token: str) -> SignInSession:
        """Returns new tokens for a refresh token, which is then no longer valid. Raises Unauthenticated. A token that
        was used before ends its session."""
        new = secrets.token_urlsafe(32)
        rotated = await self._accounts.rotate_session(
            _digest(token), _digest(new), self._settings.refresh_token_ttl_seconds
        )
        if rotated.user is None:
            code = "refresh_token_reused" if rotated.outcome == "reused" else "refresh_token_invalid"
            raise Unauthenticated("this refresh token is no longer valid: sign in again", code=code)
        return self._session(rotated.user, new)

    async def logout(self, token: str) -> None:
        await self._accounts.end_session(_digest(token))

    async def at_table(self, slug: str, table_id: str, address: str) -> TableSession:
        """Returns a token for a guest at one table. Raises NotFound, TooManyRequests."""
        await self._count(self._by_address, f"table:{counted_as(address)}")
        restaurant = await self._accounts.find_restaurant_by_slug(slug)
        if restaurant is None:
            raise NotFound("no such restaurant", field="slug")
        found = await self._reads.one(table.ENTITY, restaurant.id, table_id)
        if found.access_fields().deleted_at is not None:
            raise NotFound("no such table")
        session, ttl = f"table-{table_id}-{secrets.token_urlsafe(12)}", self._settings.guest_token_ttl_seconds
        identity = Identity(str(uuid4()), Role.CUSTOMER, restaurant.id, "", session)
        return TableSession(self._tokens.issue(identity, ttl_seconds=ttl), ttl, session, restaurant.id, table_id)

    # -- helpers -----------------------------------------------------------------------------------------------

    async def _count(self, bucket: TokenBucket, caller: str) -> None:
        wait, _ = await bucket.take(caller)
        if wait:
            raise TooManyRequests("too many attempts; try again later", retry_after=math.ceil(wait))

    def _session(self, user: User, refresh_token: str) -> SignInSession:
        role, ttl = Role(user.role), self._settings.access_token_ttl_seconds
        session = user.id if role is Role.CUSTOMER else None
        identity = Identity(user.id, role, user.restaurant_id or "", user.email, session)
        return SignInSession(self._tokens.issue(identity, ttl_seconds=ttl), refresh_token, ttl, user)


@cache
def _time_zones() -> frozenset[str]:
    """Returns the names of all time zones. It reads hundreds of files, so call it in a thread."""
    return frozenset(available_timezones())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
