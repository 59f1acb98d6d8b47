"""The setting decides who may register a restaurant: everybody, people with an invitation, or operators alone."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from click.testing import CliRunner

from services.sync.cli.main import main
from tests.rigs.sign_in import PASSWORD, client, expect, new_email, register, registration, sign_in
from tests.rigs.system import System


@pytest.fixture(scope="module")
async def by_invitation(system: System) -> AsyncIterator[str]:
    async with system.another_orders("by-invitation", registration="invitation") as url:
        yield url


@pytest.fixture(scope="module")
async def closed(system: System) -> AsyncIterator[str]:
    async with system.another_orders("closed", registration="closed") as url:
        yield url


async def test_closed_registration_refuses_everybody(closed: str) -> None:
    async with client(closed) as anybody:
        for fields in ({}, {"invitation_code": "any"}):
            reply = await anybody.post("/api/auth/register-restaurant", json=registration(**fields))
            assert expect(reply, 403)["code"] == "registration_closed"


async def test_invitation_registers_one_restaurant(system: System, by_invitation: str) -> None:
    code = (await system.cli("restaurant", "invite", "--days", "2")).strip()
    async with client(by_invitation) as anybody:

        async def attempt(status: int, **fields: str) -> str:
            reply = await anybody.post("/api/auth/register-restaurant", json=registration(**fields))
            return str(expect(reply, status).get("code"))

        assert await attempt(403) == "invitation_required"
        assert await attempt(403, invitation_code="wrong") == "invitation_invalid"
        # A registration that is refused for another reason leaves the code as it was.
        assert await attempt(409, invitation_code=code, slug="demo-bistro") == "slug_taken"
        await attempt(201, invitation_code=code)
        assert await attempt(403, invitation_code=code) == "invitation_invalid"


async def test_reset_code_is_not_accepted_as_an_invitation(system: System, by_invitation: str) -> None:
    owner = await register(system, system.urls["orders"])
    async with owner.client() as admin, client(by_invitation) as anybody:
        code = expect(await admin.post(f"/api/users/{owner.admin_id}/password-reset"), 201)["code"]
        reply = await anybody.post("/api/auth/register-restaurant", json=registration(invitation_code=code))
        assert expect(reply, 403)["code"] == "invitation_invalid"
        body = {"email": owner.email, "code": code, "new_password": "another one that is good"}
        expect(await anybody.post("/api/auth/password-reset", json=body))


async def test_expired_invitation_is_refused(system: System, by_invitation: str) -> None:
    code = (await system.cli("restaurant", "invite")).strip()
    async with system.database("ticketrail_owner") as connection:
        await connection.execute("update one_time_codes set expires_at = now() where purpose = 'invitation'")
    async with client(by_invitation) as anybody:
        reply = await anybody.post("/api/auth/register-restaurant", json=registration(invitation_code=code))
    assert expect(reply, 403)["code"] == "invitation_invalid"


async def add(system: System, *arguments: str, password: str = PASSWORD) -> tuple[int, str]:
    """Runs `ticketrail restaurant add`. Returns (exit code, output)."""
    ended = await asyncio.to_thread(
        CliRunner().invoke, main, ["restaurant", "add", *arguments], input=f"{password}\n", env=system.env
    )
    return ended.exit_code, ended.output


async def test_operator_adds_a_restaurant_whose_admin_signs_in(system: System, closed: str) -> None:
    slug, email = f"added-{uuid4().hex[:8]}", new_email()
    code, out = await add(
        system, slug, "--email", f" {email.upper()}", "--currency", "CHF", "--time-zone", "Europe/Zurich"
    )
    assert code == 0, out
    session = expect(await sign_in(closed, email))
    assert (session["user"]["role"], session["user"]["restaurant_id"]) == ("admin", out.strip())
    async with client(closed, session["access_token"]) as admin:
        restaurant = expect(await admin.get("/api/auth/me"))["restaurant"]
        assert (restaurant["slug"], restaurant["currency"]) == (slug, "CHF")
        expect(await admin.post("/api/tables", json={"label": "1", "seats": 2}), 201)
    for arguments, password, words in (
        ((slug, "--email", new_email()), PASSWORD, "slug is taken"),
        ((f"{slug}-2", "--email", email), PASSWORD, "email is taken"),
        ((f"{slug}-2", "--email", "nobody"), PASSWORD, "not an email address"),
        ((f"{slug}-2", "--email", new_email()), "password1234", "too common"),
        ((f"{slug}-2", "--email", new_email(), "--time-zone", "Mars/Olympus"), PASSWORD, "not a known time zone"),
        (("No Slug", "--email", new_email()), PASSWORD, "slug: must have 1 to 50 lower-case letters"),
        ((f"{slug}-2", "--email", new_email(), "--currency", "ZZZ"), PASSWORD, "currency: must be a currency code"),
        ((f"{slug}-2", "--email", new_email(), "--country", "UK"), PASSWORD, "settings.country: must be a country"),
        ((f"{slug}-2", "--email", new_email(), "--name", " "), PASSWORD, "name: must not be blank"),
        ((f"{slug}-2", "--email", new_email(), "--admin-name", "\u200b"), PASSWORD, "admin_name: must not be blank"),
    ):
        code, out = await add(system, *arguments, password=password)
        assert code != 0
        assert words in out, out
        assert "regex" not in out
    async with system.database("ticketrail_owner") as connection:
        assert not await connection.fetchval("select count(*) from restaurants where slug = $1", f"{slug}-2")
