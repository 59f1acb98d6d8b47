"""Passwords over HTTP: which ones are accepted, the change of one's own, and the reset with an admin's code."""

import unicodedata
from typing import Any

import httpx
import pytest

from shared.security.tokens import Role
from tests.rigs.restaurant import register_restaurant
from tests.rigs.sign_in import (
    FAILURES_PER_ACCOUNT_AND_ADDRESS,
    PASSWORD,
    RegisteredRestaurant,
    addresses,
    client,
    expect,
    new_email,
    refresh,
    register,
    sign_in,
)
from tests.rigs.system import System

NEW = "an other \ufb01ne one"  # the ligature "fi" has another form in NFKC


@pytest.mark.parametrize(
    ("password", "code"),
    [("password1234", "password_common"), ("short", "invalid_input"), ("{email}", "password_is_email")],
)
async def test_bad_password_is_refused_wherever_one_is_set(
    system: System, url: str, registered: RegisteredRestaurant, password: str, code: str
) -> None:
    user = await registered.user()
    bad = password.format(email=user["email"])
    token = expect(await sign_in(url, user["email"]))["access_token"]
    new_user = new_email()
    async with registered.client() as admin, registered.client(token) as own, client(url) as anybody:
        reset = expect(await admin.post(f"/api/users/{user['id']}/password-reset"), 201)["code"]
        body = {"email": new_user, "password": password.format(email=new_user), "role": "staff"}
        replies = [
            (await admin.post("/api/users", json=body), "password"),
            (await admin.put(f"/api/users/{user['id']}", json={"password": bad}), "password"),
            (
                await own.post("/api/auth/password", json={"current_password": PASSWORD, "new_password": bad}),
                "new_password",
            ),
            (await set_with_code(anybody, user["email"], reset, bad), "new_password"),
        ]
    for reply, field in replies:
        error = expect(reply, 422)
        assert (error["code"], error["details"]["field"]) == (code, field)
    expect(await sign_in(url, user["email"]))


async def test_user_changes_its_own_password_and_all_its_sessions_end(
    url: str, registered: RegisteredRestaurant
) -> None:
    user = await registered.user()
    first, second = [expect(await sign_in(url, user["email"])) for _ in range(2)]
    async with registered.client(first["access_token"]) as own:
        body = {"current_password": "not this one", "new_password": NEW}
        error = expect(await own.post("/api/auth/password", json=body), 422)
        assert (error["code"], error["details"]["field"]) == ("wrong_password", "current_password")
        expect(await own.post("/api/auth/password", json={**body, "current_password": PASSWORD}))
    for session in (first, second):
        expect(await refresh(url, session["refresh_token"]), 401)
    expect(await sign_in(url, user["email"]), 401)
    expect(await sign_in(url, user["email"], unicodedata.normalize("NFKD", NEW)))


async def test_guesses_of_the_current_password_are_limited(url: str, registered: RegisteredRestaurant) -> None:
    """A stolen token must not reveal the password."""
    user = await registered.user()
    token = expect(await sign_in(url, user["email"]))["access_token"]
    async with client(url, token, address=next(addresses)) as thief:
        statuses = [
            (
                await thief.post("/api/auth/password", json={"current_password": f"g{n}", "new_password": NEW})
            ).status_code
            for n in range(FAILURES_PER_ACCOUNT_AND_ADDRESS + 1)
        ]
    assert statuses == [422] * FAILURES_PER_ACCOUNT_AND_ADDRESS + [429]


async def test_guest_at_a_table_has_no_password(system: System, url: str) -> None:
    restaurant = await register_restaurant(system)
    async with client(url, restaurant.token_of(Role.CUSTOMER, session="s")) as guest:
        body = {"current_password": PASSWORD, "new_password": NEW}
        expect(await guest.post("/api/auth/password", json=body), 404)


async def set_with_code(anybody: httpx.AsyncClient, email: str, code: str, password: str) -> httpx.Response:
    body: dict[str, Any] = {"email": email, "code": code, "new_password": password}
    return await anybody.post("/api/auth/password-reset", json=body)


async def test_code_of_an_admin_sets_a_password_once_and_ends_all_sessions(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    user, other = await registered.user(), await registered.user()
    session = expect(await sign_in(url, user["email"]))
    async with registered.client() as admin, client(url) as anybody:
        path = f"/api/users/{user['id']}/password-reset"
        first, second = [expect(await admin.post(path), 201) for _ in range(2)]
        # The old password stays until the code is used. A new code replaces the first one, and belongs to one user.
        expect(await sign_in(url, user["email"]))
        for email, code in (
            (user["email"], first["code"]),
            (other["email"], second["code"]),
            (new_email(), second["code"]),
            (user["email"], "garbage"),
        ):
            assert expect(await set_with_code(anybody, email, code, NEW), 401)["code"] == "wrong_reset_code"
        expect(await set_with_code(anybody, f" {user['email'].upper()} ", second["code"], NEW))
        assert expect(await set_with_code(anybody, user["email"], second["code"], PASSWORD), 401)
    expect(await refresh(url, session["refresh_token"]), 401)
    expect(await sign_in(url, user["email"]), 401)
    expect(await sign_in(url, user["email"], NEW))
    async with system.database("ticketrail_writer") as connection:
        rows = await connection.fetch("select c::text as row from one_time_codes c")
    assert rows
    assert not any(second["code"] in row["row"] for row in rows)


async def test_expired_code_sets_no_password(system: System, url: str, registered: RegisteredRestaurant) -> None:
    user = await registered.user()
    async with registered.client() as admin, client(url) as anybody:
        code = expect(await admin.post(f"/api/users/{user['id']}/password-reset"), 201)["code"]
        async with system.database("ticketrail_owner") as connection:
            await connection.execute("update one_time_codes set expires_at = now() where user_id = $1", user["id"])
        expect(await set_with_code(anybody, user["email"], code, NEW), 401)


async def test_admin_makes_codes_for_its_own_active_users_only(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    other = await register(system, url)
    theirs, ours = await other.user(), await registered.user()
    async with registered.client() as admin:
        expect(await admin.post(f"/api/users/{theirs['id']}/password-reset"), 404)
        expect(await admin.put(f"/api/users/{ours['id']}", json={"is_active": False}))
        expect(await admin.post(f"/api/users/{ours['id']}/password-reset"), 404)
