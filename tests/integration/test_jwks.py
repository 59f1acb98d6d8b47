"""`/.well-known/jwks.json`: how another system verifies our tokens."""

from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.rigs.http_client import http_client
from tests.rigs.sign_in import expect, register
from tests.rigs.system import System

JWKS = "/.well-known/jwks.json"


def private_pem() -> str:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


async def published(url: str) -> list[dict[str, Any]]:
    async with http_client(base_url=url) as anybody:
        reply = await anybody.get(JWKS)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/jwk-set+json")
    assert reply.headers["cache-control"] == "public, max-age=300"
    keys: list[dict[str, Any]] = reply.json()["keys"]
    return keys


@pytest.mark.parametrize("service", ["orders", "sync", "notifier"])
async def test_a_service_with_a_secret_publishes_no_key(system: System, service: str) -> None:
    assert "TICKETRAIL_JWT_SECRET" in system.env
    assert await published(system.urls[service]) == []


async def test_a_published_key_verifies_the_tokens_and_does_not_sign(system: System) -> None:
    pem = private_pem()
    async with system.another_orders("eddsa", jwt_private_key=pem) as url:
        (key,) = await published(url)
        token = (await register(system, url)).session["access_token"]
        async with http_client(base_url=url, headers={"Authorization": f"Bearer {token}"}) as admin:
            expect(await admin.get("/api/auth/me"))
    assert set(key) == {"kty", "crv", "x", "kid", "alg", "use"}  # no "d", the private part
    assert (key["kty"], key["crv"], key["alg"], key["use"]) == ("OKP", "Ed25519", "EdDSA", "sig")
    assert jwt.get_unverified_header(token)["kid"] == key["kid"]
    claims = jwt.decode(token, jwt.PyJWK(key).key, algorithms=["EdDSA"], audience="ticketrail", issuer="ticketrail")
    assert claims["role"] == "admin"


async def test_a_key_that_was_replaced_stays_published_and_a_secret_never_is(system: System) -> None:
    new, old = private_pem(), private_pem()
    for previous, count in ((old, 2), ("a-secret-that-signed-before-and-is-long-enough", 1)):
        async with system.another_orders("rotated", jwt_private_key=new, jwt_previous_key=previous) as url:
            keys = await published(url)
            assert len({key["kid"] for key in keys}) == len(keys) == count
            assert {key["kty"] for key in keys} == {"OKP"}
