"""Authentication: issues JSON Web Tokens, verifies them and returns an `Identity`.

Claims: userId, restaurantId, email, role (admin, staff, customer or operator), and sessionId for customers. Operators
may have no restaurantId.
"""

import hashlib
import time
from enum import StrEnum
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from msgspec import Struct

from shared.entities.contract import Label
from shared.errors import Forbidden, Unauthenticated
from shared.security.weak_secrets import weakness
from shared.setting_fields import MIN_SECRET_BYTES, allowed_values, variable
from shared.settings import Settings
from shared.settings_loading import SettingsError

MIN_RSA_BITS = 2048
"""RS256 requires at least this size (RFC 7518, section 3.3)."""
_MAX_CACHED_TOKENS = 4096


class Role(StrEnum):
    ADMIN = "admin"
    STAFF = "staff"
    CUSTOMER = "customer"
    OPERATOR = "operator"


class Identity(Struct, frozen=True):
    user_id: str
    role: Role
    restaurant_id: str = ""
    email: str = ""
    session_id: str | None = None
    """The session of a customer, who creates and sees only the orders of this session; None for other roles."""

    @property
    def tenant(self) -> str:
        """The id of the restaurant. Raises Forbidden if the token names no restaurant."""
        if not self.restaurant_id:
            raise Forbidden("this token belongs to no restaurant")
        return self.restaurant_id

    @property
    def actor(self) -> str:
        """The name under which the audit records this caller: the email, or the user id if the token has no email."""
        return self.email or self.user_id


class BadKey(SettingsError):
    """A setting contains no usable key."""


class Key(Struct, frozen=True):
    """A key that signs or verifies tokens. `id` is derived from the key, so every service computes the same id."""

    id: str
    algorithm: str
    verifying: Any
    signing: Any = None
    """The private key; None if only the public key is known, which can only verify."""


def secret_key(secret: str) -> Key:
    return Key(hashlib.sha256(b"kid:" + secret.encode()).hexdigest()[:16], "HS256", secret, secret)


def key_pair(algorithm: str, text: str) -> Key:
    """Reads a private or public key.

    `text` is a PEM or the path of a file with a PEM. Raises BadKey, which does not repeat `text`.
    """
    try:
        pem = text.encode() if "-----BEGIN" in text else Path(text).read_bytes()
        signing = None
        if b"PRIVATE KEY" in pem:
            signing = serialization.load_pem_private_key(pem, password=None)
        public = signing.public_key() if signing else serialization.load_pem_public_key(pem)
        jwt.get_algorithm_by_name(algorithm).prepare_key(public)
    except OSError as error:
        # The error's text contains `text`, which must not be printed: a key without its first line is taken for a path.
        raise BadKey(f"no file with a key for {algorithm}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm, jwt.InvalidKeyError) as error:
        raise BadKey(f"no key for {algorithm}: {error}") from error
    if isinstance(public, RSAPublicKey) and public.key_size < MIN_RSA_BITS:
        raise BadKey(f"an RSA key of {public.key_size} bits; it must have at least {MIN_RSA_BITS}")
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Key(hashlib.sha256(der).hexdigest()[:16], algorithm, public, signing)


def _any_key(text: str) -> Key:
    """Reads a secret, or a key of either algorithm: the previous key may be of another kind than the current one.
    Raises BadKey."""
    if "-----BEGIN" not in text and not _is_file(text):
        if text.endswith((".pem", ".key", ".pub")):  # a path that is used as a secret is easy to guess
            raise BadKey("the path of a file that does not exist")
        return secret_key(text)
    return _pair_of_any_algorithm(text)


def _pair_of_any_algorithm(text: str) -> Key:
    try:
        return key_pair("EdDSA", text)
    except BadKey:
        return key_pair("RS256", text)


def _key_in(setting: str, text: str, algorithm: str) -> Key:
    try:
        return key_pair(algorithm, text)
    except BadKey as error:
        raise BadKey(f"{variable(setting)} holds {error}") from error


def _check_key_in(setting: str, text: str) -> None:
    """Checks a key that the algorithm may not use, because a wrong one would show only after a change of the algorithm.
    Raises BadKey."""
    if not text:
        return
    try:
        _pair_of_any_algorithm(text)
    except BadKey:
        raise BadKey(
            f"{variable(setting)} has a value that is not allowed: "
            f"it must be {allowed_values(Settings.model_fields[setting])}"
        ) from None


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # the text is too long for a path
        return False


class VerifiedTokens:
    """The identities of tokens whose signature was verified. Each identity is kept until its token expires. Times are
    Unix seconds."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, Identity]] = {}

    def keep(self, token: str, identity: Identity, *, expires_at: float) -> None:
        if len(self._found) >= _MAX_CACHED_TOKENS:
            self._found.clear()
        self._found[token] = (expires_at, identity)

    def identity_of(self, token: str) -> Identity | None:
        """Returns the identity of a token, or None if the token was not verified yet or has expired."""
        known = self._found.get(token)
        return known[1] if known and known[0] > time.time() else None


class Tokens:
    """Issues and verifies tokens.

    Verified tokens are cached until they expire, because checking a signature costs more than pricing an order.

    A key can be replaced without signing out any user: the current key signs, the current and the previous key
    verify, and `kid` in the header of the token selects between them. Without a `kid` the current key is used.
    """

    def __init__(
        self,
        secret: str | Key,
        *,
        ttl_seconds: int,
        previous: Key | None = None,
        verified: VerifiedTokens | None = None,
    ) -> None:
        """`verified`: a cache that several objects share. By default each object has a cache of its own."""
        self._key = secret_key(secret) if isinstance(secret, str) else secret
        self._keys = {key.id: key for key in (previous, self._key) if key is not None}
        self._ttl = ttl_seconds
        self._verified = verified if verified is not None else VerifiedTokens()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Reads the keys from the settings. Raises BadKey, which names the setting."""
        algorithm, before = settings.jwt_algorithm, settings.jwt_previous_key
        if algorithm == "HS256":
            key = secret_key(settings.jwt_secret)
        elif settings.jwt_private_key:
            key = _key_in("jwt_private_key", settings.jwt_private_key, algorithm)
        elif settings.jwt_public_key:
            key = _key_in("jwt_public_key", settings.jwt_public_key, algorithm)
        else:
            raise BadKey(f"TICKETRAIL_JWT_PRIVATE_KEY or TICKETRAIL_JWT_PUBLIC_KEY is needed for {algorithm}")
        for setting in ("jwt_private_key", "jwt_public_key"):
            _check_key_in(setting, getattr(settings, setting))
        try:
            previous = _any_key(before) if before else None
        except BadKey as error:
            raise BadKey(f"TICKETRAIL_JWT_PREVIOUS_KEY holds {error}") from error
        if settings.environment != "development" and previous is not None and previous.algorithm == "HS256":
            if len(before.encode()) < MIN_SECRET_BYTES:
                raise BadKey(f"TICKETRAIL_JWT_PREVIOUS_KEY is shorter than {MIN_SECRET_BYTES} bytes")
            if wrong := weakness(before):
                raise BadKey(f"TICKETRAIL_JWT_PREVIOUS_KEY {wrong}")
        return cls(key, ttl_seconds=settings.cli_token_ttl_seconds, previous=previous)

    @property
    def signs(self) -> bool:
        """True if this service can sign tokens; False if it knows only the public key."""
        return self._key.signing is not None

    def require_signing(self) -> None:
        """Raises BadKey if only the public key is known."""
        if not self.signs:
            raise BadKey("TICKETRAIL_JWT_PRIVATE_KEY is needed to sign tokens; TICKETRAIL_JWT_PUBLIC_KEY only verifies")

    def issue(self, identity: Identity, *, ttl_seconds: int | None = None) -> str:
        """Returns a token for an `Authorization: Bearer` header. Raises BadKey if only the public key is known."""
        self.require_signing()
        now = int(time.time())
        claims: dict[str, Any] = {
            "userId": identity.user_id,
            "role": identity.role.value,
            "email": identity.email,
            "iat": now,
            "exp": now + (ttl_seconds or self._ttl),
        }
        if identity.restaurant_id:
            claims["restaurantId"] = identity.restaurant_id
        if identity.session_id:
            claims["sessionId"] = identity.session_id
        return jwt.encode(claims, self._key.signing, self._key.algorithm, headers={"kid": self._key.id})

    def verify(self, authorization: str | None) -> Identity:
        """Returns the caller of a request from its `Authorization` header. Raises Unauthenticated."""
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip(" ")  # the scheme may be followed by several blanks (RFC 9110, section 11.4)
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("the request needs an Authorization header with a Bearer token")
        if (known := self._verified.identity_of(token)) is not None:
            return known
        try:
            # The key determines the algorithm. The algorithm in the token is not trusted, because an attacker could
            # choose `none`.
            kid = jwt.get_unverified_header(token).get("kid", self._key.id)
            key = self._keys.get(str(kid))
            if key is None:
                raise Unauthenticated("the token was signed with an unknown key")
            claims = jwt.decode(
                token,
                key.verifying,
                algorithms=[key.algorithm],
                # Another host may have issued the token, and its clock may be ahead of this one.
                options={"require": ["exp", "userId"], "verify_iat": False},
            )
        except jwt.ExpiredSignatureError as error:
            raise Unauthenticated("the token has expired", code="token_expired") from error
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(f"the token is not valid: {error}") from error
        identity = _identity(claims)
        self._verified.keep(token, identity, expires_at=float(claims["exp"]))
        return identity


def _identity(claims: dict[str, Any]) -> Identity:
    try:
        role = Role(str(claims.get("role")))
        restaurant = claims.get("restaurantId")
        identity = Identity(
            user_id=str(claims["userId"]),
            role=role,
            restaurant_id=str(UUID(restaurant)) if restaurant else "",
            email=str(claims.get("email") or ""),
            session_id=str(claims["sessionId"]) if claims.get("sessionId") else None,
        )
        for name in (identity.user_id, identity.session_id or "-"):
            msgspec.convert(name, Label)  # orders store these ids
    except (ValueError, AttributeError, TypeError) as error:
        raise Unauthenticated("the token's role, userId, sessionId or restaurantId is not valid") from error
    if role is Role.CUSTOMER and not identity.session_id:
        raise Unauthenticated("a customer's token needs a sessionId")
    if role is not Role.OPERATOR and not identity.restaurant_id:
        raise Unauthenticated("the token needs a restaurantId")
    return identity
