"""Tokens: issued, verified, and refused when they are forged, expired or incomplete."""

import time

import jwt
import pytest

from shared.errors import Unauthenticated
from shared.security.tokens import Grant, Identity, Role, Tokens, VerifiedTokens
from tests.rigs.builders import RESTAURANT

SECRET = "a-secret-for-tests-that-is-long-enough"
TOKENS = Tokens(SECRET, ttl_seconds=60)
STAFF = Identity("u1", Role.STAFF, RESTAURANT, "a@b.example")


def test_a_token_carries_the_identity_that_it_was_issued_to() -> None:
    for identity in (STAFF, Identity("u2", Role.CUSTOMER, RESTAURANT, "", "s1"), Identity("u3", Role.OPERATOR)):
        header = f"Bearer {TOKENS.issue(identity)}"
        assert TOKENS.verify(header) == TOKENS.verify(header) == identity


def claims(**changed: object) -> dict[str, object]:
    ours = {"iss": "ticketrail", "aud": "ticketrail"}
    valid = {
        **ours,
        "userId": "u1",
        "restaurantId": RESTAURANT,
        "role": "staff",
        "exp": int(time.time()) + 60,
        **changed,
    }
    return {name: value for name, value in valid.items() if value is not None}


@pytest.mark.parametrize(
    "token",
    [
        jwt.encode(claims(), "", algorithm="none"),
        jwt.encode(claims(), "another-secret-that-is-long-enough-too", algorithm="HS256"),
        jwt.encode(claims(), SECRET + SECRET, algorithm="HS512"),
        jwt.encode(claims(exp=int(time.time()) - 31), SECRET, algorithm="HS256"),
        jwt.encode(claims(exp=None), SECRET, algorithm="HS256"),
        jwt.encode(claims(exp="tomorrow"), SECRET, algorithm="HS256"),
        jwt.encode(claims(exp=float("inf")), SECRET, algorithm="HS256"),
        jwt.encode(claims(exp=10**400), SECRET, algorithm="HS256"),
        jwt.encode(claims(exp=253_402_300_800), SECRET, algorithm="HS256"),
        jwt.encode(claims(nbf=-(10**400)), SECRET, algorithm="HS256"),
        jwt.encode(claims(nbf=int(time.time()) + 3_600), SECRET, algorithm="HS256"),
        jwt.encode(claims(iss="https://elsewhere.example"), SECRET, algorithm="HS256"),
        jwt.encode(claims(iss=None), SECRET, algorithm="HS256"),
        jwt.encode(claims(aud="another"), SECRET, algorithm="HS256"),
        jwt.encode(claims(aud=None), SECRET, algorithm="HS256"),
        jwt.encode(claims(role="owner"), SECRET, algorithm="HS256"),
        jwt.encode(claims(restaurantId=None), SECRET, algorithm="HS256"),
        jwt.encode(claims(restaurantId="x"), SECRET, algorithm="HS256"),
        jwt.encode(claims(role="customer"), SECRET, algorithm="HS256"),
        jwt.encode(claims(userId="u" * 201), SECRET, algorithm="HS256"),
        jwt.encode(claims(userId="\ud800"), SECRET, algorithm="HS256"),
        jwt.encode(claims(email="\udfff"), SECRET, algorithm="HS256"),
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
        "exp-text",
        "exp-infinite",
        "exp-huge",
        "exp-year-10000",
        "nbf-huge",
        "nbf",
        "issuer",
        "no-issuer",
        "audience",
        "no-audience",
        "role",
        "no-tenant",
        "tenant",
        "no-session",
        "long-user",
        "surrogate-user",
        "surrogate-email",
        "nul-session",
        "no-jwt",
        "empty",
    ],
)
def test_an_invalid_token_is_refused(token: str) -> None:
    with pytest.raises(Unauthenticated):
        TOKENS.verify(f"Bearer {token}")


def test_the_claims_that_other_tests_change_are_valid_without_the_change() -> None:
    assert TOKENS.verify(f"Bearer {jwt.encode(claims(), SECRET, algorithm='HS256')}").user_id == "u1"


def test_clocks_may_differ_by_thirty_seconds() -> None:
    tokens = compared(0)
    for changed in ({"exp": -25}, {"nbf": 25}, {"iat": 25}):
        token = jwt.encode(claims(**at(**changed)), SECRET, algorithm="HS256")
        assert tokens.verify(f"Bearer {token}").user_id == "u1"
    for changed in ({"exp": -35}, {"nbf": 35}, {"iat": 35}):
        token = jwt.encode(claims(**at(**changed)), SECRET, algorithm="HS256")
        with pytest.raises(Unauthenticated):
            tokens.verify(f"Bearer {token}")


@pytest.mark.parametrize("postgres_ahead", [7_200, -7_200])
def test_one_clock_that_is_wrong_by_hours_refuses_nobody_who_has_signed_in(postgres_ahead: int) -> None:
    """The clock of this host or that of PostgreSQL is wrong. The token was issued by the right one, whichever it is."""
    tokens = compared(postgres_ahead)
    for right_now in (0, postgres_ahead):
        token = jwt.encode(claims(**at(iat=right_now - 5, exp=right_now + 60)), SECRET, algorithm="HS256")
        for _ in range(2):  # verified, and from the cache
            assert tokens.verify(f"Bearer {token}").user_id == "u1"
    for wrong in ({"exp": min(0, postgres_ahead) - 60}, {"iat": max(0, postgres_ahead) + 60, "exp": 9_000}):
        with pytest.raises(Unauthenticated):
            tokens.verify(f"Bearer {jwt.encode(claims(**at(**wrong)), SECRET, algorithm='HS256')}")


def test_a_host_whose_clock_is_wrong_issues_tokens_by_the_clock_of_postgres() -> None:
    issued = compared(7_200).issue(STAFF, ttl_seconds=60)
    issued_at = jwt.decode(issued, options={"verify_signature": False})["iat"]
    assert 7_100 < issued_at - time.time() < 7_300


def test_a_service_that_never_saw_postgres_does_not_check_when_a_token_was_issued() -> None:
    """A token from a host whose clock is right must be valid on a host whose clock is hours behind."""
    token = jwt.encode(claims(**at(iat=7_200, exp=9_000)), SECRET, algorithm="HS256")
    assert Tokens(SECRET, ttl_seconds=60).verify(f"Bearer {token}").user_id == "u1"


def compared(postgres_ahead: int) -> Tokens:
    tokens = Tokens(SECRET, ttl_seconds=60)
    tokens.clock.compare(time.time() + postgres_ahead)
    return tokens


def at(**seconds_from_now: int) -> dict[str, object]:
    return {name: int(time.time()) + seconds for name, seconds in seconds_from_now.items()}


def test_a_cached_token_still_expires() -> None:
    verified = VerifiedTokens()
    tokens = Tokens(SECRET, ttl_seconds=60, verified=verified)
    expired, cached = Tokens(SECRET, ttl_seconds=-60).issue(STAFF), "verified before, so its signature is not checked"
    verified.keep(expired, Grant(STAFF, time.time() - 60))
    verified.keep(cached, Grant(STAFF, time.time() + 60))
    assert tokens.verify(f"Bearer {cached}") == STAFF
    with pytest.raises(Unauthenticated):
        tokens.verify(f"Bearer {expired}")


@pytest.mark.parametrize("header", [None, "", "Basic abc", "Bearer", "bearer "])
def test_a_header_without_a_bearer_token_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        TOKENS.verify(header)
