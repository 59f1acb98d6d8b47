"""Authentication: issues JSON Web Tokens, verifies them and returns an `Identity`.

Claims: iss and aud (settings), iat, exp, userId, restaurantId, email, role (admin, staff, customer or operator), and
sessionId for customers. Operators may have no restaurantId. `epoch` and `family` name the session: when it ends, its
tokens are refused (revoked.py). token_clock.py says which clock decides that a token has expired.
"""

import hashlib
import hmac
from enum import StrEnum
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import OKPAlgorithm, RSAAlgorithm
from msgspec import Struct

from shared.entities.contract import Label
from shared.errors import Forbidden, Unauthenticated
from shared.security.revoked import RevokedTokens, Subject
from shared.security.token_clock import LEEWAY_SECONDS, TokenClock
from shared.security.weak_secrets import weakness
from shared.setting_fields import MIN_SECRET_BYTES, allowed_values, variable
from shared.settings import Settings
from shared.settings_loading import SettingsError

MIN_RSA_BITS = 2048
"""RS256 requires at least this size (RFC 7518, section 3.3)."""
_MAX_CACHED_TOKENS = 4096
_MAX_SECONDS = 253_370_764_800
"""The year 9999. Later times have no date in Python, and larger numbers perhaps no float."""
_AS_JWK: dict[str, Any] = {"RS256": RSAAlgorithm.to_jwk, "EdDSA": OKPAlgorithm.to_jwk}


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
    table_id: str | None = None
    """The table of a guest, who orders for this table alone and sees no other; None for everybody else."""
    scopes: frozenset[str] | None = None
    """The scopes of an API key, which limit its role; None for a token. `user_id` is then the id of the key."""

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


class Grant(Struct, frozen=True):
    """The rights that a verified token grants, with their owner and their end."""

    identity: Identity
    expires_at: float
    """Unix seconds, without leeway."""
    subjects: tuple[Subject, ...] = ()
    """The token is refused when one of these is revoked with a larger epoch."""


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
    """The grants of tokens whose signature was verified. The caller checks whether they have expired."""

    def __init__(self) -> None:
        self._found: dict[str, Grant] = {}

    def keep(self, token: str, grant: Grant) -> None:
        if len(self._found) >= _MAX_CACHED_TOKENS:
            self._found.clear()
        self._found[token] = grant

    def grant_of(self, token: str) -> Grant | None:
        return self._found.get(token)


class Tokens:
    """Issues and verifies tokens.

    Verified tokens are cached, because checking a signature costs more than pricing an order.

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
        revoked: RevokedTokens | None = None,
        issuer: str = "ticketrail",
        audience: str = "ticketrail",
    ) -> None:
        """`verified`: a cache that several objects share. By default each object has a cache of its own. `revoked`: the
        list of ended sessions; a command needs none, because it only issues tokens."""
        self._key = secret_key(secret) if isinstance(secret, str) else secret
        self._keys = {key.id: key for key in (previous, self._key) if key is not None}
        self._ttl = ttl_seconds
        self._verified = verified if verified is not None else VerifiedTokens()
        self._issuer = issuer
        self._audience = audience
        self.clock = TokenClock()
        self.revoked = revoked if revoked is not None else RevokedTokens()

    @classmethod
    def of(cls, settings: Settings, revoked: RevokedTokens | None = None) -> Self:
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
        return cls(
            key,
            ttl_seconds=settings.cli_token_ttl_seconds,
            previous=previous,
            revoked=revoked,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
        )

    def public_keys(self) -> list[dict[str, Any]]:
        """Returns the public keys that verify tokens, as JSON Web Keys (RFC 7517). A secret is never among them."""
        return [
            {**_AS_JWK[key.algorithm](key.verifying, as_dict=True), "kid": key.id, "alg": key.algorithm, "use": "sig"}
            for key in self._keys.values()
            if key.algorithm in _AS_JWK
        ]

    @property
    def signs(self) -> bool:
        """True if this service can sign tokens; False if it knows only the public key."""
        return self._key.signing is not None

    def require_signing(self) -> None:
        """Raises BadKey if only the public key is known."""
        if not self.signs:
            raise BadKey("TICKETRAIL_JWT_PRIVATE_KEY is needed to sign tokens; TICKETRAIL_JWT_PUBLIC_KEY only verifies")

    def derived_secret(self, purpose: str) -> bytes:
        """Returns a secret that every service with the same signing key derives. Raises BadKey if only the public key
        is known."""
        self.require_signing()
        signing = self._key.signing
        if not isinstance(signing, str):
            signing = signing.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode()
        return hmac.digest(signing.encode(), f"ticketrail/{purpose}".encode(), "sha256")

    def issue(self, identity: Identity, *, ttl_seconds: int | None = None, epoch: int = 0, family: str = "") -> str:
        """Returns a token for an `Authorization: Bearer` header. `epoch`: `token_epoch` of the user. `family`: the
        session, if the token belongs to one. Raises BadKey if only the public key is known."""
        self.require_signing()
        now = int(self.clock.issuing())
        claims: dict[str, Any] = {
            "iss": self._issuer,
            "aud": self._audience,
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
        if identity.table_id:
            claims["tableId"] = identity.table_id
        if epoch:
            claims["epoch"] = epoch
        if family:
            claims["family"] = family
        return jwt.encode(claims, self._key.signing, self._key.algorithm, headers={"kid": self._key.id})

    def verify(self, authorization: str | None) -> Identity:
        """Returns the caller of a request from its `Authorization` header. Raises Unauthenticated."""
        return self.grant(authorization).identity

    def grant(self, authorization: str | None) -> Grant:
        """Returns what the token in an `Authorization` header grants. Raises Unauthenticated, with the code
        `token_expired` or `session_ended` if a new sign-in helps."""
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip(" ")  # the scheme may be followed by several blanks (RFC 9110, section 11.4)
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("the request needs an Authorization header with a Bearer token")
        grant = self._verified.grant_of(token) or self._verify(token)
        if self.seconds_left(grant) <= -LEEWAY_SECONDS:
            raise Unauthenticated("the token has expired", code="token_expired")
        self.check_session(grant)
        return grant

    def seconds_left(self, grant: Grant) -> float:
        """Returns the time until the token expires. It is accepted LEEWAY_SECONDS longer, for clocks that differ."""
        return grant.expires_at - self.clock.earliest()

    def check_session(self, grant: Grant) -> None:
        """Raises Unauthenticated if the session of the grant has ended."""
        if self.revoked.refuses(grant.subjects):
            raise Unauthenticated("this session has ended: sign in again", code="session_ended")

    def _verify(self, token: str) -> Grant:
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
                issuer=self._issuer,
                audience=self._audience,
                # The times are checked by `clock`.
                options={
                    "require": ["exp", "userId", "iss", "aud"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
            begins_at = max(_time(claims, "nbf"), _time(claims, "iat") if self.clock.compared else 0.0)
            expires_at = _time(claims, "exp")
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(f"the token is not valid: {error}") from error
        if begins_at > self.clock.latest() + LEEWAY_SECONDS:
            raise Unauthenticated("the token is not valid yet", code="token_not_yet_valid")
        grant = Grant(_identity(claims), expires_at, _subjects(claims))
        self._verified.keep(token, grant)
        return grant


def _time(claims: dict[str, Any], name: str) -> float:
    """Returns a time in Unix seconds, or 0 if the token does not have it. Raises InvalidTokenError."""
    found = claims.get(name, 0)
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < _MAX_SECONDS:
        raise jwt.InvalidTokenError(f"{name} is not a time")
    return float(found)


def _subjects(claims: dict[str, Any]) -> tuple[Subject, ...]:
    epoch, family = claims.get("epoch", 0), claims.get("family", "")
    if not isinstance(epoch, int) or not isinstance(family, str):
        raise Unauthenticated("the token's epoch or family is not valid")
    user = (f"user:{claims['userId']}", epoch)
    return (user, (f"family:{family}", 0)) if family else (user,)


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
            table_id=str(UUID(claims["tableId"])) if claims.get("tableId") else None,
        )
        for name in (identity.user_id, identity.session_id or "-"):
            msgspec.convert(name, Label)  # orders store these ids
        # Half of a surrogate pair raises ValueError.
        f"{identity.user_id}{identity.session_id}{identity.email}".encode()
    except (ValueError, AttributeError, TypeError) as error:
        raise Unauthenticated("the token's role, userId, sessionId or restaurantId is not valid") from error
    if role is Role.CUSTOMER and not identity.session_id:
        raise Unauthenticated("a customer's token needs a sessionId")
    if role is not Role.OPERATOR and not identity.restaurant_id:
        raise Unauthenticated("the token needs a restaurantId")
    return identity
