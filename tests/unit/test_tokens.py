"""Keys of tokens: three algorithms, two keys at the same time, and forged tokens."""

import base64
import hashlib
import hmac
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from pydantic import ValidationError

from shared.errors import Unauthenticated
from shared.security.tokens import BadKey, Identity, Role, Tokens
from shared.settings import Settings
from tests.rigs.builders import RESTAURANT
from tests.rigs.system import ROOT

STAFF = Identity("u1", Role.STAFF, RESTAURANT, "a@b.example")
OURS = {"iss": "ticketrail", "aud": "ticketrail", "restaurantId": RESTAURANT}
SECRET, OTHER_SECRET = (secrets.token_urlsafe(40) for _ in range(2))


def pems(key: Any) -> tuple[str, str]:
    """Returns the PEM texts of the private and the public key."""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


RSA, RSA_PUBLIC = pems(generate_private_key(65537, 2048))
OTHER_RSA, _ = pems(generate_private_key(65537, 2048))
ED, ED_PUBLIC = pems(Ed25519PrivateKey.generate())
KEYS: dict[str, dict[str, str]] = {
    "HS256": {"jwt_secret": SECRET},
    "RS256": {"jwt_private_key": RSA},
    "EdDSA": {"jwt_private_key": ED},
}
PUBLIC = {"HS256": SECRET, "RS256": RSA_PUBLIC, "EdDSA": ED_PUBLIC}


def tokens(algorithm: str = "HS256", **chosen: str) -> Tokens:
    return Tokens.of(settings(algorithm, **{**KEYS[algorithm], **chosen}))


def settings(algorithm: str = "HS256", **chosen: str) -> Settings:
    values: dict[str, Any] = {"jwt_algorithm": algorithm, **chosen}
    return Settings(_env_file=None, **values)


def bearer(token: str) -> str:
    return f"Bearer {token}"


def forged(header: dict[str, Any], secret: bytes, **claims: Any) -> str:
    """A token signed by HMAC with `secret`. PyJWT refuses a public key as the secret, so it is built by hand."""
    content = {**OURS, "userId": "u1", "role": "admin", "exp": int(time.time()) + 60, **claims}
    parts = [
        base64.urlsafe_b64encode(json.dumps(one).encode()).rstrip(b"=") for one in ({"typ": "JWT", **header}, content)
    ]
    signature = hmac.new(secret, b".".join(parts), hashlib.sha256).digest()
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_names_its_algorithm_and_its_key(algorithm: str) -> None:
    token = tokens(algorithm).issue(STAFF)
    header = jwt.get_unverified_header(token)
    assert header["alg"] == algorithm
    # Another process derives the same key id from the same key.
    assert header["kid"] == jwt.get_unverified_header(tokens(algorithm).issue(STAFF))["kid"]
    assert tokens(algorithm).verify(bearer(token)) == STAFF


def test_a_token_of_a_host_whose_clock_is_ahead_is_valid() -> None:
    ahead = int(time.time()) + 7_200
    content = {**OURS, "userId": "u1", "role": "staff", "iat": ahead, "exp": ahead + 60}
    assert tokens().verify(bearer(jwt.encode(content, SECRET, "HS256"))).user_id == "u1"


@pytest.mark.parametrize("algorithm", ["RS256", "EdDSA"])
def test_a_service_with_the_public_key_verifies_and_cannot_issue(algorithm: str) -> None:
    public = Tokens.of(settings(algorithm, jwt_public_key=PUBLIC[algorithm]))
    assert public.verify(bearer(tokens(algorithm).issue(STAFF))) == STAFF
    assert not public.signs
    with pytest.raises(BadKey):
        public.issue(STAFF)


def test_a_key_pair_makes_eddsa_the_algorithm() -> None:
    for chosen in ({"jwt_private_key": ED}, {"jwt_public_key": ED_PUBLIC}):
        assert Settings(_env_file=None, **chosen).jwt_algorithm == "EdDSA"  # type: ignore[arg-type]
    assert Settings(_env_file=None).jwt_algorithm == "HS256"
    assert Settings(_env_file=None, jwt_private_key=RSA, jwt_algorithm="RS256").jwt_algorithm == "RS256"


@pytest.mark.parametrize("algorithm", ["RS256", "EdDSA"])
def test_published_keys_verify_tokens_of_the_current_and_the_previous_key(algorithm: str) -> None:
    previous = {"RS256": ED_PUBLIC, "EdDSA": RSA_PUBLIC}[algorithm]
    ours = tokens(algorithm, jwt_previous_key=previous)
    published = {key["kid"]: key for key in ours.public_keys()}
    assert {key["alg"] for key in published.values()} == {"RS256", "EdDSA"}
    assert not any(private in key for key in published.values() for private in ("d", "p", "q", "k"))
    for issuing in (ours, tokens({"RS256": "EdDSA", "EdDSA": "RS256"}[algorithm])):
        token = issuing.issue(STAFF)
        header = jwt.get_unverified_header(token)
        key = jwt.PyJWK(published[header["kid"]])
        found = jwt.decode(token, key.key, algorithms=[header["alg"]], audience="ticketrail", issuer="ticketrail")
        assert found["userId"] == STAFF.user_id


def test_a_secret_is_never_published() -> None:
    assert tokens(jwt_previous_key=OTHER_SECRET).public_keys() == []


def test_issuer_and_audience_can_be_chosen() -> None:
    ours = tokens(jwt_issuer="https://pos.example", jwt_audience="pos")
    assert ours.verify(bearer(ours.issue(STAFF))) == STAFF
    for other in (tokens(), tokens(jwt_issuer="https://pos.example"), tokens(jwt_audience="pos")):
        with pytest.raises(Unauthenticated):
            other.verify(bearer(ours.issue(STAFF)))


def test_a_key_can_be_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text(ED)
    read = Tokens.of(settings("EdDSA", jwt_private_key=str(tmp_path / "key.pem")))
    assert tokens("EdDSA").verify(bearer(read.issue(STAFF))) == STAFF


@pytest.mark.parametrize("after", KEYS)
@pytest.mark.parametrize("before", KEYS)
def test_a_key_can_be_replaced_without_signing_users_out(before: str, after: str) -> None:
    new = {
        "HS256": {"jwt_secret": OTHER_SECRET},
        "RS256": {"jwt_private_key": OTHER_RSA},
        "EdDSA": {"jwt_private_key": pems(Ed25519PrivateKey.generate())[0]},
    }[after]
    old_token = tokens(before).issue(STAFF)
    both = tokens(after, jwt_previous_key=PUBLIC[before], **new)
    assert both.verify(bearer(old_token)) == STAFF
    new_token = both.issue(STAFF)
    assert jwt.get_unverified_header(new_token)["kid"] != jwt.get_unverified_header(old_token)["kid"]
    assert jwt.get_unverified_header(new_token)["alg"] == after
    # Once the old key is removed, tokens that it signed are refused.
    alone = tokens(after, **new)
    assert alone.verify(bearer(new_token)) == STAFF
    with pytest.raises(Unauthenticated):
        alone.verify(bearer(old_token))


def test_the_previous_key_only_verifies() -> None:
    both = tokens(jwt_secret=OTHER_SECRET, jwt_previous_key=ED)
    assert jwt.get_unverified_header(both.issue(STAFF))["alg"] == "HS256"
    # The public half is enough.
    assert tokens(jwt_previous_key=ED_PUBLIC).verify(bearer(tokens("EdDSA").issue(STAFF))) == STAFF


def test_a_token_without_a_kid_is_verified_with_the_current_key_only() -> None:
    content = {**OURS, "userId": "u1", "role": "staff", "exp": int(time.time()) + 60}
    both = tokens(jwt_secret=OTHER_SECRET, jwt_previous_key=SECRET)
    assert both.verify(bearer(jwt.encode(content, OTHER_SECRET, "HS256"))).user_id == "u1"
    with pytest.raises(Unauthenticated):
        both.verify(bearer(jwt.encode(content, SECRET, "HS256")))


@pytest.mark.parametrize("algorithm", ["RS256", "EdDSA"])
@pytest.mark.parametrize("with_kid", [True, False])
def test_a_token_signed_with_the_public_key_as_its_secret_is_refused(algorithm: str, with_kid: bool) -> None:
    ours = tokens(algorithm)
    header = {"alg": "HS256"}
    if with_kid:
        header["kid"] = jwt.get_unverified_header(ours.issue(STAFF))["kid"]
    for secret in (PUBLIC[algorithm], PUBLIC[algorithm].strip()):
        with pytest.raises(Unauthenticated):
            ours.verify(bearer(forged(header, secret.encode())))


def test_the_previous_key_is_never_used_with_the_algorithm_of_the_current_key() -> None:
    ours = tokens("HS256", jwt_previous_key=RSA_PUBLIC)
    kid = jwt.get_unverified_header(tokens("RS256").issue(STAFF))["kid"]
    with pytest.raises(Unauthenticated):
        ours.verify(bearer(forged({"alg": "HS256", "kid": kid}, RSA_PUBLIC.encode())))


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_that_declares_no_signature_is_refused(algorithm: str) -> None:
    ours = tokens(algorithm)
    kid = jwt.get_unverified_header(ours.issue(STAFF))["kid"]
    for alg in ("none", "None", "NONE", "nOnE", "", None):
        for header in ({"alg": alg}, {"alg": alg, "kid": kid}):
            head, content, _ = forged(header, b"x").split(".")
            for token in (f"{head}.{content}.", f"{head}.{content}"):
                with pytest.raises(Unauthenticated):
                    ours.verify(bearer(token))


@pytest.mark.parametrize("kid", ["another", "", "../../etc/passwd", "' or 1=1 --", 7, None, ["x"], {"x": 1}])
def test_an_unknown_kid_is_refused(kid: Any) -> None:
    ours = tokens()
    with pytest.raises(Unauthenticated):
        ours.verify(bearer(forged({"alg": "HS256", "kid": kid}, b"" if kid is None else SECRET.encode())))


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_changed_after_signing_is_refused(algorithm: str) -> None:
    ours = tokens(algorithm)
    head, content, signature = ours.issue(STAFF).split(".")
    claims = json.loads(base64.urlsafe_b64decode(content + "=="))
    other = base64.urlsafe_b64encode(json.dumps({**claims, "role": "admin"}).encode()).rstrip(b"=").decode()
    with pytest.raises(Unauthenticated):
        ours.verify(bearer(f"{head}.{other}.{signature}"))


# -- keys that are refused at the start --------------------------------------------------------------------------


def outside_development(**chosen: str) -> Settings:
    """Returns settings of production with their checks left out, because these tests only check the keys."""
    return settings(**{"jwt_secret": SECRET, **chosen}).model_copy(update={"environment": "production"})


@pytest.mark.parametrize("environment", ["development", "production"])
def test_a_secret_under_32_bytes_is_refused(environment: str) -> None:
    assert Tokens.of(settings(jwt_secret="ä" * 16)).signs
    with pytest.raises(ValidationError, match="it is shorter than 32 bytes"):
        settings(jwt_secret=secrets.token_urlsafe(40)[:31], environment=environment)


@pytest.mark.parametrize("name", ["jwt_private_key", "jwt_public_key"])
@pytest.mark.parametrize("wrong", ["/no/such/file.pem", "no key at all"])
def test_a_wrong_key_is_refused_even_if_the_algorithm_does_not_use_it(name: str, wrong: str) -> None:
    for algorithm, chosen in (("HS256", {}), ("EdDSA", {"jwt_private_key": ED})):
        if name not in chosen:
            with pytest.raises(BadKey, match=f"TICKETRAIL_{name.upper()} .* empty or a .* key as PEM") as refused:
                Tokens.of(settings(algorithm, **{**chosen, name: wrong}))
            assert wrong not in str(refused.value)
    assert Tokens.of(settings(**{name: RSA})).signs


@pytest.mark.parametrize(
    "before", ["vnW-K5s0Y0XUdJw2d5dq7EvwhSlWuFA", "x" * 40, "change-me-to-at-least-thirty-two-bytes"]
)
def test_a_weak_previous_secret_is_refused_outside_development(before: str) -> None:
    assert Tokens.of(settings(jwt_previous_key=before)).signs
    with pytest.raises(BadKey, match="TICKETRAIL_JWT_PREVIOUS_KEY"):
        Tokens.of(outside_development(jwt_previous_key=before))
    assert Tokens.of(outside_development(jwt_previous_key=OTHER_SECRET)).signs


def test_a_path_without_a_file_is_not_used_as_a_secret() -> None:
    """An attacker could guess the path."""
    for path in ("/run/secrets/ticketrail-before.pem", "keys/before.key", "before.pub"):
        with pytest.raises(BadKey, match="TICKETRAIL_JWT_PREVIOUS_KEY holds the path of a file that does not exist"):
            Tokens.of(settings(jwt_previous_key=path))


def test_a_secret_longer_than_the_longest_path_is_used_as_a_secret() -> None:
    long = secrets.token_urlsafe(400)
    assert Tokens.of(settings(jwt_previous_key=long)).verify(bearer(tokens(jwt_secret=long).issue(STAFF))) == STAFF


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ("RS256", ED),
        ("EdDSA", RSA),
        ("RS256", "-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----"),
        ("RS256", "/no/such/file.pem"),
        ("EdDSA", "no key at all"),
        ("RS256", pems(generate_private_key(65537, 1024))[0]),
        (
            "EdDSA",
            Ed25519PrivateKey.generate()
            .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
            .decode(),
        ),
    ],
    ids=["other-kind", "other-kind-2", "garbage", "no-file", "text", "short", "encrypted"],
)
def test_a_key_that_does_not_fit_the_algorithm_is_refused(algorithm: str, key: str) -> None:
    with pytest.raises(BadKey):
        Tokens.of(settings(algorithm, jwt_private_key=key))


def test_services_do_not_start_with_weak_or_unsuitable_keys(tmp_path: Path) -> None:
    short = {"ENVIRONMENT": "production", "JWT_SECRET": secrets.token_urlsafe(40)[:31]}
    too_short = "TICKETRAIL_JWT_SECRET has a value that is not allowed: it must be a text of at least 32 bytes"
    cases: list[tuple[list[str], dict[str, str], str]] = [
        (["services.orders"], short, too_short),
        (["services.sync", "api"], short, too_short),
        (["services.notifier"], short, too_short),
        (["services.notifier"], {"JWT_ALGORITHM": "RS256"}, "is needed for RS256"),
        (["services.sync", "api"], {"JWT_ALGORITHM": "EdDSA", "JWT_PUBLIC_KEY": "none.pem"}, "JWT_PUBLIC_KEY holds no"),
        # The orders service signs people in, so it needs the private key.
        (["services.orders"], {"JWT_ALGORITHM": "EdDSA", "JWT_PUBLIC_KEY": ED_PUBLIC}, "TICKETRAIL_JWT_PRIVATE_KEY"),
    ]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=ROOT,
            env={
                **plain,
                "TICKETRAIL_HOME": str(tmp_path / str(place)),
                **{f"TICKETRAIL_{name}": value for name, value in chosen.items()},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place, (module, chosen, _) in enumerate(cases)
    ]
    for process, (_, chosen, expected) in zip(started, cases, strict=True):
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 1
        assert expected in output
        assert len(output.splitlines()) == 1, output
        assert chosen.get("JWT_SECRET", SECRET) not in output
