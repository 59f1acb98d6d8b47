"""Tokens: issued, verified, and refused when they are forged, expired or incomplete."""

import time

import jwt
import pytest

from shared.errors import Unauthenticated
from shared.security.tokens import Identity, Role, Tokens, VerifiedTokens
from tests.rigs.builders import RESTAURANT

SECRET = "a-secret-for-tests-that-is-long-enough"
TOKENS = Tokens(SECRET, ttl_seconds=60)
STAFF = Identity("u1", Role.STAFF, RESTAURANT, "a@b.example")


def test_a_token_carries_the_identity_that_it_was_issued_to() -> None:
    for identity in (STAFF, Identity("u2", Role.CUSTOMER, RESTAURANT, "", "s1"), Identity("u3", Role.OPERATOR)):
        header = f"Bearer {TOKENS.issue(identity)}"
        assert TOKENS.verify(header) == TOKENS.verify(header) == identity


def claims(**changed: object) -> dict[str, object]:
    valid = {"userId": "u1", "restaurantId": RESTAURANT, "role": "staff", "exp": int(time.time()) + 60, **changed}
    return {name: value for name, value in valid.items() if value is not None}


@pytest.mark.parametrize(
    "token",
    [
        jwt.encode(claims(), "", algorithm="none"),
        jwt.encode(claims(), "another-secret-that-is-long-enough-too", algorithm="HS256"),
        jwt.encode(claims(), SECRET + SECRET, algorithm="HS512"),
        jwt.encode(claims(exp=int(time.time()) - 1), SECRET, algorithm="HS256"),
        jwt.encode(claims(exp=None), SECRET, algorithm="HS256"),
        jwt.encode(claims(role="owner"), SECRET, algorithm="HS256"),
        jwt.encode(claims(restaurantId=None), SECRET, algorithm="HS256"),
        jwt.encode(claims(restaurantId="x"), SECRET, algorithm="HS256"),
        jwt.encode(claims(role="customer"), SECRET, algorithm="HS256"),
        jwt.encode(claims(userId="u" * 201), SECRET, algorithm="HS256"),
        jwt.encode(claims(role="customer", sessionId="s\0"), SECRET, algorithm="HS256"),
        "garbage",
        "",
    ],
    ids=[
        "none",
        "key",
        "algorithm",
        "expired",
        "no-exp",
        "role",
        "no-tenant",
        "tenant",
        "no-session",
        "long-user",
        "nul-session",
        "no-jwt",
        "empty",
    ],
)
def test_an_invalid_token_is_refused(token: str) -> None:
    with pytest.raises(Unauthenticated):
        TOKENS.verify(f"Bearer {token}")


def test_a_cached_token_still_expires() -> None:
    verified = VerifiedTokens()
    tokens = Tokens(SECRET, ttl_seconds=60, verified=verified)
    expired, cached = Tokens(SECRET, ttl_seconds=-5).issue(STAFF), "verified before, so its signature is not checked"
    verified.keep(expired, STAFF, expires_at=time.time() - 5)
    verified.keep(cached, STAFF, expires_at=time.time() + 60)
    assert tokens.verify(f"Bearer {cached}") == STAFF
    with pytest.raises(Unauthenticated):
        tokens.verify(f"Bearer {expired}")


@pytest.mark.parametrize("header", [None, "", "Basic abc", "Bearer", "bearer "])
def test_a_header_without_a_bearer_token_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        TOKENS.verify(header)
