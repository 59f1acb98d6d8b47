"""Sign-in: passwords, sessions with rotating refresh tokens, and tokens for guests at a table.

An unknown email and a wrong password get the same reply after the same work, so that a reply does not reveal which
accounts exist. sign_in_limits.py limits the failures. A refresh token is valid once. Its
successor is derived from it, so two tabs that use it within ten seconds get the same one. A later second use means that
it was stolen, and ends the session.
"""

import asyncio
import hashlib
import hmac
import secrets
from base64 import urlsafe_b64encode
from functools import cache
from uuid import uuid4
from zoneinfo import available_timezones

import structlog
from msgspec import Struct

from services.orders.accounts import Accounts, Session, User
from services.orders.entity_reads import EntityReads
from services.orders.sign_in_limits import SignInLimits, account_of
from shared.entities import table
from shared.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from shared.mirror.mirror import Mirror
from shared.restaurants import Restaurant
from shared.security.one_time_codes import RESET_SECONDS, code_digest, new_code
from shared.security.passwords import check_new_password, fits, hash_password
from shared.security.token_clock import LEEWAY_SECONDS
from shared.security.tokens import Identity, Role, Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)

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
        # A token that begins now is accepted for its lifetime and the leeway.
        self._access_tokens_last_seconds = settings.access_token_ttl_seconds + LEEWAY_SECONDS
        self._successor_key = tokens.derived_secret("refresh-token")
        self._unknown_account_hash = hash_password(secrets.token_urlsafe(16))
        self._hashing = asyncio.Semaphore(_HASHING_CONCURRENCY)
        self.limits = SignInLimits(mirror, settings)

    async def hash_new(self, password: str, email: str, *, field: str = "password") -> str:
        """Returns the hash of a new password of the user with this email. Raises InvalidInput."""

        def work() -> str:
            check_new_password(password, email, field=field)
            return hash_password(password)

        async with self._hashing:
            return await asyncio.to_thread(work)

    async def hash(self, text: str) -> str:
        async with self._hashing:
            return await asyncio.to_thread(hash_password, text)

    async def fits(self, stored_hash: str, password: str) -> bool:
        async with self._hashing:
            return await asyncio.to_thread(fits, stored_hash, password)

    async def register(
        self,
        restaurant: Restaurant,
        email: str,
        name: str,
        password: str,
        address: str,
        *,
        invitation_code: str | None = None,
    ) -> SignInSession:
        """Registers a restaurant and its first admin. Raises Forbidden, Conflict, InvalidInput, TooManyRequests."""
        invitation = self._invitation(invitation_code)
        await self.limits.count_account_change(address)
        if restaurant.time_zone not in await asyncio.to_thread(_time_zones):
            raise InvalidInput("not a known time zone; an example is Europe/Berlin", field="time_zone")
        hashed, token, ttl = (
            await self.hash_new(password, email),
            secrets.token_urlsafe(32),
            self._settings.refresh_token_ttl_seconds,
        )
        user, session = await self._accounts.register(
            restaurant, email, name, hashed, _digest(token), ttl, address, invitation_sha256=invitation
        )
        return self._session(user, session, token)

    def _invitation(self, code: str | None) -> bytes | None:
        """Returns the digest of the invitation that a registration must use up, or None if it needs none."""
        if self._settings.registration == "open":
            return None
        if self._settings.registration == "closed":
            raise Forbidden(
                "registration is closed; an operator adds restaurants with `ticketrail restaurant add`",
                code="registration_closed",
            )
        if not code:
            raise Forbidden("registration needs an invitation", code="invitation_required", field="invitation_code")
        return code_digest(code)

    async def login(self, email: str, password: str, address: str) -> SignInSession:
        """Signs a user in. Raises Unauthenticated, TooManyRequests."""
        try:
            async with self.limits.attempt(email, address):
                session = await self._login(email, password, address)
        except Unauthenticated:
            log.warning("sign_in_failed", account=account_of(email), address=address)
            await self._accounts.note_failed_sign_in(email, address)
            raise
        log.info("signed_in", user=session.user.id, restaurant=session.user.restaurant_id, address=address)
        return session

    async def _login(self, email: str, password: str, address: str) -> SignInSession:
        found = await self._accounts.by_email(email)
        stored_hash = found[1] if found is not None and found[1] else None
        matches = await self.fits(stored_hash or self._unknown_account_hash, password)
        if found is None or stored_hash is None or not matches:
            raise Unauthenticated("email or password is wrong", code="wrong_credentials")
        token, ttl = secrets.token_urlsafe(32), self._settings.refresh_token_ttl_seconds
        session = await self._accounts.begin_session(_digest(token), found[0].id, stored_hash, ttl, address)
        if session is None:
            # The password was changed or the user was deactivated after the lookup.
            raise Unauthenticated("email or password is wrong", code="wrong_credentials")
        return self._session(found[0], session, token)

    async def refresh(self, token: str, address: str) -> SignInSession:
        """Returns new tokens for a refresh token, which is then no longer valid. Raises Unauthenticated. A token that
        was used before, more than ten seconds ago, ends its session."""
        new = self._successor(token)
        rotated = await self._accounts.rotate_session(
            _digest(token),
            _digest(new),
            self._settings.refresh_token_ttl_seconds,
            self._access_tokens_last_seconds,
            address,
        )
        if rotated.found is None:
            code = "refresh_token_reused" if rotated.outcome == "reused" else "refresh_token_invalid"
            if rotated.outcome == "reused":
                log.warning("refresh_token_reused", address=address)
            raise Unauthenticated("this refresh token is no longer valid: sign in again", code=code)
        return self._session(*rotated.found, new)

    async def logout(self, token: str, address: str) -> None:
        """Ends the session of a refresh token. Its access tokens are refused within seconds."""
        await self._accounts.end_session(_digest(token), self._access_tokens_last_seconds, address)
        log.info("signed_out", address=address)

    async def change_password(self, user_id: str, current: str, new: str, address: str) -> None:
        """Changes the password of the caller and ends all its sessions. Raises InvalidInput, Conflict, TooManyRequests,
        and NotFound for a guest, who has no account."""
        found = await self._accounts.email_and_password_of(user_id)
        if found is None:
            raise NotFound("this token belongs to no account with a password")
        email, known = found
        try:
            async with self.limits.attempt(email, address):
                if not await self.fits(known, current):
                    raise Unauthenticated("wrong password")
        except Unauthenticated as error:
            # A 401 would make clients throw the token away, which is valid.
            raise InvalidInput("wrong password", field="current_password", code="wrong_password") from error
        hashed = await self.hash_new(new, email, field="new_password")
        if not await self._accounts.change_password(user_id, known, hashed, address):
            raise Conflict("the password was changed meanwhile", code="password_changed")
        log.info("password_changed", user=user_id, address=address)

    async def make_reset_code(self, restaurant: str, user_id: str, *, actor: str) -> tuple[str, int]:
        """Returns (code, lifetime in seconds): the user sets a new password with it, once. Raises NotFound."""
        code = new_code()
        await self._accounts.make_reset_code(restaurant, user_id, code_digest(code), RESET_SECONDS, actor=actor)
        log.info("reset_code_made", user=user_id, restaurant=restaurant)
        return code, RESET_SECONDS

    async def reset_password(self, email: str, code: str, new: str, address: str) -> None:
        """Sets a password with a code and ends all sessions of the user. Raises Unauthenticated, which says nothing
        about the email, InvalidInput, TooManyRequests."""
        async with self.limits.attempt(email, address):
            hashed = await self.hash_new(new, email, field="new_password")
            if not await self._accounts.reset_password(email, code_digest(code), hashed, address):
                raise Unauthenticated("email or code is wrong, or the code is used or expired", code="wrong_reset_code")
        log.info("password_reset", account=account_of(email), address=address)

    async def at_table(self, slug: str, table_id: str, address: str) -> TableSession:
        """Returns a token for a guest at one table. Raises NotFound, TooManyRequests."""
        try:
            restaurant = await self._restaurant_of_table(slug, table_id)
        except NotFound:
            await self.limits.count_unknown_table(address)
            raise
        await self.limits.count_table_session(table_id, address)
        session, ttl = f"table-{table_id}-{secrets.token_urlsafe(12)}", self._settings.guest_token_ttl_seconds
        identity = Identity(str(uuid4()), Role.CUSTOMER, restaurant.id, "", session, table_id)
        return TableSession(self._tokens.issue(identity, ttl_seconds=ttl), ttl, session, restaurant.id, table_id)

    # -- parts -------------------------------------------------------------------------------------------------

    async def _restaurant_of_table(self, slug: str, table_id: str) -> Restaurant:
        restaurant = await self._accounts.find_restaurant_by_slug(slug)
        if restaurant is None:
            raise NotFound("no such restaurant", field="slug")
        found = await self._reads.one(table.ENTITY, restaurant.id, table_id)
        if found.access_fields().deleted_at is not None:
            raise NotFound("no such table")
        return restaurant

    def _successor(self, token: str) -> str:
        """Returns the refresh token that follows `token`. Every instance derives the same one from the signing
        key."""
        return urlsafe_b64encode(hmac.digest(self._successor_key, token.encode(), "sha256")).rstrip(b"=").decode()

    def _session(self, user: User, session: Session, refresh_token: str) -> SignInSession:
        role, ttl = Role(user.role), self._settings.access_token_ttl_seconds
        customer_session = user.id if role is Role.CUSTOMER else None
        identity = Identity(user.id, role, user.restaurant_id or "", user.email, customer_session)
        access_token = self._tokens.issue(identity, ttl_seconds=ttl, epoch=session.epoch, family=session.family)
        return SignInSession(access_token, refresh_token, ttl, user)


@cache
def _time_zones() -> frozenset[str]:
    """Returns the names of all time zones. It reads hundreds of files, so call it in a thread."""
    return frozenset(available_timezones())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
