"""Who calls: JSON Web Tokens in, an `Identity` out.

Claims: userId, restaurantId, email, role in {admin, staff, customer, operator}; for customers sessionId as well.
Operators may have no restaurant.
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
from shared.settings import Settings

LEAST_SECRET_BYTES = 32
LEAST_RSA_BITS = 2048
_REMEMBERED = 4096


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
    """What a customer is bound to: it creates and sees the orders of this session alone."""

    @property
    def tenant(self) -> str:
        if not self.restaurant_id:
            raise Forbidden("this token belongs to no restaurant")
        return self.restaurant_id


class BadKey(ValueError):
    """A setting holds no key that can be used."""


class Key(Struct, frozen=True):
    """`id` is derived from the key itself, so that every service calls it the same without being told."""

    id: str
    algorithm: str
    verifying: Any
    signing: Any = None
    """None where tokens are only verified."""


def secret_key(secret: str) -> Key:
    return Key(hashlib.sha256(b"kid:" + secret.encode()).hexdigest()[:16], "HS256", secret, secret)


def key_pair(algorithm: str, text: str) -> Key:
    """Of a PEM, private or public, or of the path of a file that holds it. Raises BadKey."""
    try:
        pem = text.encode() if "-----BEGIN" in text else Path(text).read_bytes()
        signing = None
        if b"PRIVATE KEY" in pem:
            signing = serialization.load_pem_private_key(pem, password=None)
        public = signing.public_key() if signing else serialization.load_pem_public_key(pem)
        jwt.get_algorithm_by_name(algorithm).prepare_key(public)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, jwt.InvalidKeyError) as error:
        raise BadKey(f"no key for {algorithm}: {error}") from error
    if isinstance(public, RSAPublicKey) and public.key_size < LEAST_RSA_BITS:
        raise BadKey(f"an RSA key of {public.key_size} bits: {LEAST_RSA_BITS} at least")
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Key(hashlib.sha256(der).hexdigest()[:16], algorithm, public, signing)


def _any_key(text: str) -> Key:
    """Whatever it is: the key before may have been of another kind. Raises BadKey."""
    if "-----BEGIN" not in text and not _is_file(text):
        if text.endswith((".pem", ".key", ".pub")):  # taken for a secret, the path would be one that can be guessed
            raise BadKey("TICKETRAIL_JWT_PREVIOUS_KEY is the path of a file that is not there")
        return secret_key(text)
    try:
        return key_pair("EdDSA", text)
    except BadKey:
        return key_pair("RS256", text)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a path
        return False


class Tokens:
    """Issues and verifies. A token that was verified is remembered until it expires: a signature costs more than an
    order's price.

    Two keys may be known at once, so that one can be replaced without signing anybody out: the first signs, both
    verify, and the token's `kid` says which. A token without one is tried with the first."""

    def __init__(self, secret: str | Key, *, ttl_seconds: int, previous: Key | None = None) -> None:
        self._key = secret_key(secret) if isinstance(secret, str) else secret
        self._keys = {key.id: key for key in (previous, self._key) if key is not None}
        self._ttl = ttl_seconds
        self._verified: dict[str, tuple[float, Identity]] = {}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Raises BadKey."""
        algorithm, before = settings.jwt_algorithm, settings.jwt_previous_key
        if algorithm == "HS256":
            key = secret_key(settings.jwt_secret)
        elif text := settings.jwt_private_key or settings.jwt_public_key:
            key = key_pair(algorithm, text)
        else:
            raise BadKey(f"TICKETRAIL_JWT_PRIVATE_KEY or TICKETRAIL_JWT_PUBLIC_KEY is needed for {algorithm}")
        previous = _any_key(before) if before else None
        if settings.environment != "development" and previous is not None and previous.algorithm == "HS256":
            if len(before.encode()) < LEAST_SECRET_BYTES:
                raise BadKey(f"TICKETRAIL_JWT_PREVIOUS_KEY is shorter than {LEAST_SECRET_BYTES} bytes")
            if wrong := weakness(before):
                raise BadKey(f"TICKETRAIL_JWT_PREVIOUS_KEY {wrong}")
        return cls(key, ttl_seconds=settings.jwt_ttl_seconds, previous=previous)

    @property
    def signs(self) -> bool:
        """False where only the public key is known."""
        return self._key.signing is not None

    def issue(self, identity: Identity, *, ttl_seconds: int | None = None) -> str:
        """Raises BadKey where only the public key is known."""
        if not self.signs:
            raise BadKey("this service has no private key: it only verifies")
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
        """Of an `Authorization` header; raises Unauthenticated."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("an Authorization header with a Bearer token is needed")
        known = self._verified.get(token)
        if known and known[0] > time.time():
            return known[1]
        try:
            # The algorithm is ours to say, not the token's: `none` and others are refused here.
            kid = jwt.get_unverified_header(token).get("kid", self._key.id)
            key = self._keys.get(str(kid))
            if key is None:
                raise Unauthenticated("the token was signed with a key that is not known here")
            claims = jwt.decode(
                token, key.verifying, algorithms=[key.algorithm], options={"require": ["exp", "userId"]}
            )
        except jwt.ExpiredSignatureError as error:
            raise Unauthenticated("the token has expired", code="token_expired") from error
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(f"the token is not valid: {error}") from error
        identity = _identity(claims)
        if len(self._verified) >= _REMEMBERED:
            self._verified.clear()
        self._verified[token] = (float(claims["exp"]), identity)
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
            msgspec.convert(name, Label)  # they are kept with the orders that they place
    except (ValueError, AttributeError, TypeError) as error:
        raise Unauthenticated("the token's role, userId, sessionId or restaurantId is not valid") from error
    if role is Role.CUSTOMER and not identity.session_id:
        raise Unauthenticated("a customer's token needs a sessionId")
    if role is not Role.OPERATOR and not identity.restaurant_id:
        raise Unauthenticated("the token needs a restaurantId")
    return identity
