"""Sign-in over HTTP, by accounts and by guests at a table."""

import asyncio
import hashlib
import json
import secrets
from typing import Any, cast
from uuid import uuid4

import httpx
import jwt
import pytest

from services.orders import sign_in as signing_in
from services.orders.accounts import Accounts
from services.orders.entity_reads import EntityReads
from services.orders.sign_in import SignIn
from shared.errors import Unauthenticated
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.security.passwords import fits, hash_password
from shared.security.tokens import Identity, Role, Tokens
from shared.settings import Settings
from tests.rigs.sign_in import (
    GUEST_TOKEN_TTL_SECONDS,
    PASSWORD,
    RegisteredRestaurant,
    addresses,
    client,
    expect,
    new_email,
    refresh,
    register,
    registration,
    sign_in,
)
from tests.rigs.system import System, eventually

# -- registration ------------------------------------------------------------------------------------------------


async def test_account_that_registers_a_restaurant_is_its_admin(system: System, url: str) -> None:
    registered = await register(
        system, url, currency="CHF", time_zone="Europe/Zurich", tax_basis_points=810, settings={"country": "CH"}
    )
    async with registered.client() as admin:
        me = expect(await admin.get("/api/auth/me"))
    assert (me["user_id"], me["role"], me["email"]) == (registered.admin_id, "admin", registered.email)
    restaurant = me["restaurant"]
    assert (restaurant["id"], restaurant["slug"], restaurant["currency"]) == (registered.id, registered.slug, "CHF")
    assert (restaurant["tax_basis_points"], restaurant["settings"]["country"]) == (810, "CH")
    async with system.database("ticketrail_owner") as connection:
        known = await connection.fetchval("select password_hash from users where id = $1", registered.admin_id)
    assert known.startswith("$argon2id$")
    assert "password" not in json.dumps(registered.session["user"])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"slug": "Not A Slug"}, "slug"),
        ({"slug": "slug\n"}, "slug"),
        ({"slug": "s" * 51}, "slug"),
        ({"email": "nobody"}, "email"),
        ({"email": "a\0b@x.example"}, "email"),
        ({"email": f"{'a' * 250}@x.example"}, "email"),
        ({"password": "too short"}, "password"),
        ({"password": "x" * 201}, "password"),
        ({"currency": "euro"}, "currency"),
        ({"currency": "EUR\n"}, "currency"),
        ({"time_zone": "Mars/Olympus"}, "time_zone"),
        ({"time_zone": "../etc/passwd"}, "time_zone"),
        ({"tax_basis_points": 10_001}, "tax_basis_points"),
        ({"cutoff_hour": 24}, "cutoff_hour"),
        ({"settings": {"country": "DE\n"}}, "settings.country"),
        ({"settings": {"colour": "red"}}, "settings.colour"),
        ({"role": "operator"}, "role"),
        ({"id": "3c098bcc-6892-4a83-aae2-8e86ffee663b"}, "id"),
    ],
    ids=str,
)
async def test_invalid_registration_is_refused_with_the_name_of_the_field(
    url: str, fields: dict[str, Any], field: str
) -> None:
    async with client(url) as anybody:
        error = expect(await anybody.post("/api/auth/register-restaurant", json=registration(**fields)), 422)
    assert error["details"]["field"] == field


async def test_slug_and_email_can_be_taken_only_once(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    async with client(url) as anybody:
        for fields, code in (
            ({"slug": registered.slug}, "slug_taken"),
            ({"email": registered.email}, "email_taken"),
            ({"email": registered.email.upper()}, "email_taken"),
        ):
            body = registration(**fields)
            error = expect(await anybody.post("/api/auth/register-restaurant", json=body), 409)
            assert error["code"] == code
            # The refused registration left nothing, so the slug is still free.
            if code == "email_taken":
                assert (await register(system, url, slug=body["slug"])).slug == body["slug"]
        body = registration()
        replies = await asyncio.gather(
            *(anybody.post("/api/auth/register-restaurant", json={**body, "slug": f"{body['slug']}-{n}"}) for n in "ab")
        )
    assert sorted(reply.status_code for reply in replies) == [201, 409]


# -- sessions ----------------------------------------------------------------------------------------------------


async def test_email_is_one_account_in_any_spelling(url: str, registered: RegisteredRestaurant) -> None:
    name = uuid4().hex[:8]
    user = await registered.user(email=f"Ada.{name}@People.EXAMPLE")
    for spelled in (f"ada.{name}@people.example", f" ADA.{name.upper()}@PEOPLE.example \t"):
        session = expect(await sign_in(url, spelled))
        assert session["user"]["id"] == user["id"]
    claims = jwt.decode(session["access_token"], options={"verify_signature": False})
    assert (claims["role"], claims["restaurantId"]) == ("staff", registered.id)
    assert claims["exp"] - claims["iat"] == session["expires_in"]


async def used_long_ago(system: System, *tokens: str) -> None:
    """Makes the first use of refresh tokens older than ten seconds, in which a second use gets the same successor."""
    async with system.database("ticketrail_owner") as connection:
        await connection.execute(
            "update refresh_tokens set used_at = used_at - interval '11 seconds' where token_sha256 = any($1)",
            [digest(token) for token in tokens],
        )


async def test_refresh_token_is_used_once(system: System, url: str, registered: RegisteredRestaurant) -> None:
    first = expect(await sign_in(url, (await registered.user())["email"]))
    second = expect(await refresh(url, first["refresh_token"]))
    assert second["refresh_token"] != first["refresh_token"]
    async with registered.client(second["access_token"]) as staff:
        assert expect(await staff.get("/api/auth/me"))["user_id"] == first["user"]["id"]
    third = expect(await refresh(url, second["refresh_token"]))
    await used_long_ago(system, first["refresh_token"], second["refresh_token"])
    # The first token is used again, so it or its successor was stolen. The whole session ends.
    for token, code in (
        (first["refresh_token"], "refresh_token_reused"),
        (third["refresh_token"], "refresh_token_invalid"),
        (second["refresh_token"], "refresh_token_reused"),
    ):
        assert expect(await refresh(url, token), 401)["code"] == code


async def test_tabs_that_refresh_at_once_get_the_same_successor_on_every_instance(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    user = await registered.user()
    token = expect(await sign_in(url, user["email"]))["refresh_token"]
    replies = await asyncio.gather(*(refresh(at, token) for at in (url, system.urls["orders"]) * 2))
    sessions = [expect(reply) for reply in replies]
    (successor,) = {session["refresh_token"] for session in sessions}
    for session in sessions:
        async with registered.client(session["access_token"]) as staff:
            assert expect(await staff.get("/api/auth/me"))["user_id"] == user["id"]
    # Each tab can continue with the successor.
    again = [expect(await refresh(url, successor))["refresh_token"] for _ in range(2)]
    assert again[0] == again[1] != successor


async def test_reused_token_does_not_end_other_sessions_of_the_user(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    user = await registered.user()
    stolen, other = [expect(await sign_in(url, user["email"]))["refresh_token"] for _ in range(2)]
    expect(await refresh(url, stolen))
    await used_long_ago(system, stolen)
    expect(await refresh(url, stolen), 401)
    expect(await refresh(url, other))


async def test_logout_ends_the_session_and_reveals_nothing_about_tokens(
    url: str, registered: RegisteredRestaurant
) -> None:
    first = expect(await sign_in(url, (await registered.user())["email"]))["refresh_token"]
    second = expect(await refresh(url, first))["refresh_token"]
    async with client(url) as anybody:
        # An old token of the session works too; a repeated and an unknown token get the same reply.
        for token in (first, first, "no-such-token"):
            assert expect(await anybody.post("/api/auth/logout", json={"refresh_token": token})) == {"logged_out": True}
    assert expect(await refresh(url, second), 401)["code"] == "refresh_token_invalid"


@pytest.mark.parametrize("token", ["unknown", "", "x" * 201, "a\0b", "line\n"])
async def test_invalid_refresh_token_is_refused(url: str, token: str) -> None:
    assert (await refresh(url, token)).status_code in (401, 422)


async def test_refresh_token_expires(system: System, url: str, registered: RegisteredRestaurant) -> None:
    token = expect(await sign_in(url, (await registered.user())["email"]))["refresh_token"]
    async with system.database("ticketrail_owner") as connection:
        await connection.execute("update refresh_tokens set expires_at = now() where token_sha256 = $1", digest(token))
    assert expect(await refresh(url, token), 401)["code"] == "refresh_token_invalid"


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


async def test_database_stores_no_usable_token(system: System, url: str, registered: RegisteredRestaurant) -> None:
    token = expect(await sign_in(url, (await registered.user())["email"]))["refresh_token"]
    async with system.database("ticketrail_owner") as connection:
        rows = await connection.fetch("select t::text as row from refresh_tokens t")
    assert any(digest(token).hex() in row["row"] for row in rows)
    assert not any(token in row["row"] for row in rows)


# -- guesses -----------------------------------------------------------------------------------------------------


async def test_unknown_email_and_wrong_password_get_the_same_answer(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    known, inactive, deleted = [await registered.user() for _ in range(3)]
    async with registered.client() as admin:
        expect(await admin.put(f"/api/users/{inactive['id']}", json={"is_active": False}))
        expect(await admin.delete(f"/api/users/{deleted['id']}"))
    without = new_email()
    async with system.database("ticketrail_owner") as connection:
        await connection.execute(
            "insert into users (id, restaurant_id, email, role) values (gen_random_uuid(), $1, $2, 'staff')",
            registered.id,
            without,
        )
    answers = []
    for email, password in (
        (known["email"], "a wrong one that is long"),
        (new_email(), PASSWORD),
        (inactive["email"], PASSWORD),
        (deleted["email"], PASSWORD),
        (without, PASSWORD),
        ("no email at all", ""),
    ):
        reply = await sign_in(url, email, password)
        assert reply.status_code == 401, email
        error = reply.json()["error"]
        assert error.pop("trace_id")
        answers.append((error, sorted(reply.headers)))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == {"message": "email or password is wrong", "code": "wrong_credentials", "details": {}}


async def test_unknown_email_costs_the_same_work_as_a_known_one(
    system: System, registered: RegisteredRestaurant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sign-in verifies one hash of the same cost."""
    verified: list[tuple[str, str]] = []
    really_fits = fits

    def counted(known: str, password: str) -> bool:
        verified.append((known.rpartition("$")[0].rpartition("$")[0], password))
        return really_fits(known, password)

    monkeypatch.setattr(signing_in, "fits", counted)
    user = await registered.user()
    settings = Settings(_env_file=None)
    postgres = Postgres(system.database_url("ticketrail_api"), settings)
    mirror = Mirror(system.redis.url, timeout=2.0, stale_seconds=2.0)
    tokens = Tokens(secrets.token_urlsafe(40), ttl_seconds=60)
    try:
        signs = SignIn(Accounts(postgres), cast(EntityReads, None), tokens, mirror, settings)
        for email, password in (
            (user["email"], PASSWORD),
            (user["email"], "a wrong one that is long"),
            (new_email(), "a wrong one that is long"),
            ("no account", ""),
        ):
            try:
                await signs.login(email, password, next(addresses))
            except Unauthenticated:
                assert password != PASSWORD
            else:
                assert password == PASSWORD
    finally:
        await mirror.close()
        await postgres.close()
    assert [password for _, password in verified] == [PASSWORD, *["a wrong one that is long"] * 2, ""]
    assert {cost for cost, _ in verified} == {"$argon2id$v=19$m=19456,t=2,p=1"}


@pytest.mark.parametrize("password", ["x" * 201, "ä" * 100_000], ids=["201", "200 KB"])
async def test_overlong_password_is_not_hashed(url: str, registered: RegisteredRestaurant, password: str) -> None:
    assert expect(await sign_in(url, registered.email, password), 422)["details"]["field"] == "password"


async def test_long_password_counts_to_its_last_character(url: str, registered: RegisteredRestaurant) -> None:
    """The hash must cover the whole password: also what follows the first 72 bytes or a NUL."""
    password = "\0" + "🍕🍝" * 99 + "!"
    user = await registered.user(password=password)
    expect(await sign_in(url, user["email"], password))
    expect(await sign_in(url, user["email"], password[:-1]), 401)
    expect(await sign_in(url, user["email"], password[:-1] + "🍔"), 401)


ROTATE = "select rotate_session($1, $2, interval '1 day', interval '1 hour')"


# -- races -------------------------------------------------------------------------------------------------------


async def waited_for(system: System, pid: int) -> bool:
    """Returns True if another backend waits for a lock of the backend `pid`."""
    async with system.database("ticketrail_owner") as connection:
        found: bool = await connection.fetchval(
            "select exists (select from pg_stat_activity where $1 = any(pg_blocking_pids(pid)))", pid
        )
    return found


async def test_new_password_ends_a_session_during_its_refresh(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    user = await registered.user()
    old, new = expect(await sign_in(url, user["email"]))["refresh_token"], secrets.token_urlsafe(32)
    async with system.database("ticketrail_api") as thief, registered.client() as admin:
        async with thief.transaction():
            await thief.execute(ROTATE, digest(old), digest(new))
            changing = asyncio.create_task(
                admin.put(f"/api/users/{user['id']}", json={"password": "another one that is good"})
            )
            await eventually(
                lambda: waited_for(system, thief.get_server_pid()), what="a change that waits for the refresh"
            )
        expect(await changing)
    expect(await refresh(url, new), 401)


async def test_reused_token_ends_a_session_during_its_refresh(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    first = expect(await sign_in(url, (await registered.user())["email"]))["refresh_token"]
    second, third = expect(await refresh(url, first))["refresh_token"], secrets.token_urlsafe(32)
    await used_long_ago(system, first)
    async with system.database("ticketrail_api") as thief:
        async with thief.transaction():
            await thief.execute(ROTATE, digest(second), digest(third))
            reusing = asyncio.create_task(refresh(url, first))
            await eventually(
                lambda: waited_for(system, thief.get_server_pid()), what="a reuse that waits for the refresh"
            )
        assert expect(await reusing, 401)["code"] == "refresh_token_reused"
    expect(await refresh(url, third), 401)


async def test_password_changed_during_its_check_starts_no_session(
    system: System, registered: RegisteredRestaurant
) -> None:
    user = await registered.user()
    begin = "select begin_session($1, $2, $3, interval '1 day')"
    async with system.database("ticketrail_owner") as connection:
        known = await connection.fetchval("select password_hash from users where id = $1", user["id"])
        assert await connection.fetchval(begin, secrets.token_bytes(32), user["id"], known)
        await connection.execute("update users set password_hash = $2 where id = $1", user["id"], hash_password("new"))
        assert not await connection.fetchval(begin, secrets.token_bytes(32), user["id"], known)


# -- guests at a table -------------------------------------------------------------------------------------------


async def table_of(registered: RegisteredRestaurant) -> str:
    async with registered.client() as admin:
        return str(expect(await admin.post("/api/tables", json={"label": "Window", "seats": 2}), 201)["id"])


async def scan(registered: RegisteredRestaurant, table: str, *, slug: str | None = None) -> httpx.Response:
    async with client(registered.url) as guest:
        body = {"slug": slug or registered.slug, "table_id": table}
        return await guest.post("/api/auth/table-session", json=body)


async def test_guest_gets_a_short_lived_token_with_its_own_session(url: str, registered: RegisteredRestaurant) -> None:
    table = await table_of(registered)
    first, second = [expect(await scan(registered, table), 201) for _ in range(2)]
    assert first["customer_session_id"] != second["customer_session_id"]
    claims = jwt.decode(first["access_token"], options={"verify_signature": False})
    assert (claims["role"], claims["restaurantId"]) == ("customer", registered.id)
    assert claims["sessionId"] == first["customer_session_id"]
    assert claims["exp"] - claims["iat"] == first["expires_in"] == GUEST_TOKEN_TTL_SECONDS
    async with registered.client() as admin:
        body = {"name": "Dosa", "price": 900, "category": "Mains"}
        dish = expect(await admin.post("/api/menu", json=body), 201)["id"]
    async with (
        registered.client(first["access_token"]) as guest,
        registered.client(second["access_token"]) as neighbour,
    ):
        me = expect(await guest.get("/api/auth/me"))
        assert me["customer_session_id"] == first["customer_session_id"]
        assert registered.email not in json.dumps(me)  # the email that the admin signs in with
        order = {"items": [{"menu_item_id": dish, "quantity": 1}], "table_id": table}
        placed = expect(await guest.post("/api/orders", json=order), 201)
        assert placed["customer_session_id"] == first["customer_session_id"]
        assert [one["id"] for one in expect(await guest.get("/api/orders"))] == [placed["id"]]
        assert expect(await neighbour.get("/api/orders")) == []
        expect(await neighbour.get(f"/api/orders/{placed['id']}"), 404)


async def test_guest_gets_no_token_without_a_table_of_the_restaurant(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    other = await register(system, url)
    deleted, theirs = await table_of(registered), await table_of(other)
    async with registered.client() as admin:
        expect(await admin.delete(f"/api/tables/{deleted}"))
    errors = [expect(await scan(registered, table), 404) for table in (str(uuid4()), deleted, theirs)]
    for error in errors:
        error.pop("trace_id")
    # The reply must not reveal whether another restaurant has the table, or whether it was deleted.
    assert errors[0] == errors[1] == errors[2]
    expect(await scan(registered, theirs, slug="no-such-registered"), 404)
    expect(await scan(registered, "1"), 422)


# -- me ----------------------------------------------------------------------------------------------------------


async def test_me_returns_the_identity_of_the_token(system: System, url: str) -> None:
    tokens = Tokens(system.env["TICKETRAIL_JWT_SECRET"], ttl_seconds=60)
    async with client(url, system.token("operator")) as operator:
        me = expect(await operator.get("/api/auth/me"))
        assert (me["role"], me["restaurant"]) == ("operator", None)
    nowhere = tokens.issue(Identity(str(uuid4()), Role.STAFF, str(uuid4())))
    async with client(url, nowhere) as lost:
        expect(await lost.get("/api/auth/me"), 404)
