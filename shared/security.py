"""Who calls: JSON Web Tokens in, an `Identity` out.

Claims: userId, restaurantId, email, role in {admin, staff, customer, operator}; for customers sessionId as well.
Operators may have no restaurant.
"""

import time
from enum import StrEnum
from typing import Any
from uuid import UUID

import jwt
import msgspec
from msgspec import Struct

from shared.entities.contract import Label
from shared.errors import Forbidden, Unauthenticated

_ALGORITHM = "HS256"
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


class Tokens:
    """Issues and verifies. A token that was verified is remembered until it expires: a signature costs more than an
    order's price."""

    def __init__(self, secret: str, *, ttl_seconds: int) -> None:
        self._secret = secret
        self._ttl = ttl_seconds
        self._verified: dict[str, tuple[float, Identity]] = {}

    def issue(self, identity: Identity) -> str:
        now = int(time.time())
        claims: dict[str, Any] = {
            "userId": identity.user_id,
            "role": identity.role.value,
            "email": identity.email,
            "iat": now,
            "exp": now + self._ttl,
        }
        if identity.restaurant_id:
            claims["restaurantId"] = identity.restaurant_id
        if identity.session_id:
            claims["sessionId"] = identity.session_id
        return jwt.encode(claims, self._secret, algorithm=_ALGORITHM)

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
            claims = jwt.decode(token, self._secret, algorithms=[_ALGORITHM], options={"require": ["exp", "userId"]})
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
