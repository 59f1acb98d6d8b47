"""The users of a restaurant over HTTP: creation, the last admin, and changes that revoke sessions."""

import asyncio
from typing import Any

import asyncpg
import httpx
import pytest

from tests.rigs.sign_in import (
    PASSWORD,
    RegisteredRestaurant,
    expect,
    new_email,
    refresh,
    register,
    sign_in,
)
from tests.rigs.system import System


async def test_users_are_created_listed_changed_deleted_and_restored(url: str, system: System) -> None:
    registered = await register(system, url)
    kim, lou = await registered.user(name="Kim"), await registered.user("customer", name="Lou")
    async with registered.client() as admin:
        assert expect(await admin.get(f"/api/users/{kim['id']}")) == kim
        found: list[str] = []
        cursor: str | None = None
        while True:
            query = {"limit": "2", **({"cursor": cursor} if cursor else {})}
            page = (await admin.get("/api/users", params=query)).json()
            found += [one["id"] for one in page["data"]]
            cursor = page["pagination"]["next_cursor"]
            if cursor is None:
                break
        assert found == [lou["id"], kim["id"], registered.admin_id]
        of_role = await admin.get("/api/users", params={"role": "customer"})
        assert [one["id"] for one in expect(of_role)] == [lou["id"]]
        assert "argon2" not in of_role.text
        changed = expect(await admin.put(f"/api/users/{kim['id']}", json={"name": "Kim B.", "role": "admin"}))
        assert (changed["name"], changed["role"], changed["email"]) == ("Kim B.", "admin", kim["email"])
        expect(await admin.put(f"/api/users/{kim['id']}", json={"email": lou["email"].upper()}), 409)

        assert expect(await admin.delete(f"/api/users/{kim['id']}"))["deleted_at"]
        for method, path in (("GET", ""), ("PUT", ""), ("DELETE", "")):
            body: dict[str, Any] | None = {} if method == "PUT" else None
            expect(await admin.request(method, f"/api/users/{kim['id']}{path}", json=body), 404)
        assert kim["id"] not in [one["id"] for one in expect(await admin.get("/api/users"))]
        with_deleted = expect(await admin.get("/api/users", params={"include_deleted": "true"}))
        assert kim["id"] in [one["id"] for one in with_deleted]
        expect(await sign_in(url, kim["email"]), 401)
        assert expect(await admin.post(f"/api/users/{kim['id']}/restore"))["deleted_at"] is None
        assert expect(await admin.post(f"/api/users/{kim['id']}/restore"), 409)["code"] == "not_deleted"
    expect(await sign_in(url, kim["email"]))


async def test_email_of_a_deleted_user_is_free_for_another_user(url: str, registered: RegisteredRestaurant) -> None:
    user = await registered.user()
    async with registered.client() as admin:
        expect(await admin.delete(f"/api/users/{user['id']}"))
        await registered.user(email=user["email"])
        assert expect(await admin.post(f"/api/users/{user['id']}/restore"), 409)["code"] == "email_taken"


@pytest.mark.parametrize(
    "change", [{"role": "staff"}, {"is_active": False}, None], ids=["demoted", "shut-out", "deleted"]
)
async def test_last_admin_of_a_restaurant_cannot_be_removed(
    system: System, url: str, change: dict[str, Any] | None
) -> None:
    registered = await register(system, url)
    await registered.user()

    async def without(admin: httpx.AsyncClient, id_: str) -> httpx.Response:
        path = f"/api/users/{id_}"
        return await (admin.delete(path) if change is None else admin.put(path, json=change))

    async with registered.client() as admin:
        assert expect(await without(admin, registered.admin_id), 409)["code"] == "last_admin"
        expect(await admin.get("/api/users"))
        second = await registered.user("admin")
        # Two admins remove each other at the same moment: one of them stays.
        token = expect(await sign_in(url, second["email"]))["access_token"]
        async with registered.client(token) as other:
            replies = await asyncio.gather(without(admin, second["id"]), without(other, registered.admin_id))
        assert sorted(reply.status_code for reply in replies) in ([200, 401], [200, 409])
    async with system.database("ticketrail_owner") as connection:
        count = await connection.fetchval(
            "select count(*) from users"
            " where restaurant_id = $1 and role = 'admin' and is_active and deleted_at is null",
            registered.id,
        )
    assert count == 1


@pytest.mark.parametrize(
    "change",
    [{"is_active": False}, {"password": "another one that is good"}, {"role": "admin"}, None],
    ids=["shut-out", "password", "role", "deleted"],
)
async def test_reduced_access_or_a_new_password_revokes_all_sessions(
    url: str, registered: RegisteredRestaurant, change: dict[str, Any] | None
) -> None:
    user = await registered.user()
    sessions = [expect(await sign_in(url, user["email"])) for _ in range(2)]
    async with registered.client() as admin:
        path = f"/api/users/{user['id']}"
        expect(await admin.put(path, json={"name": "Still the same"}))
        sessions[0] = expect(await refresh(url, sessions[0]["refresh_token"]))
        expect(await (admin.delete(path) if change is None else admin.put(path, json=change)))
    for session in sessions:
        assert expect(await refresh(url, session["refresh_token"]), 401)["code"] == "refresh_token_invalid"
    signed_in = await sign_in(url, user["email"], (change or {}).get("password", PASSWORD))
    assert signed_in.status_code == (200 if change and "is_active" not in change else 401)


@pytest.mark.parametrize(
    "change", [{"role": "staff"}, {"is_active": False}, None], ids=["demoted", "shut-out", "deleted"]
)
async def test_former_admin_cannot_manage_users_with_its_old_token(
    url: str, registered: RegisteredRestaurant, change: dict[str, Any] | None
) -> None:
    former = await registered.user("admin")
    token = expect(await sign_in(url, former["email"]))["access_token"]
    async with registered.client() as admin, registered.client(token) as left:
        expect(await left.get("/api/users"))
        path = f"/api/users/{former['id']}"
        expect(await (admin.delete(path) if change is None else admin.put(path, json=change)))
        body = {"email": new_email(), "password": PASSWORD, "role": "admin"}
        for reply in (
            await left.post("/api/users", json=body),
            await left.get("/api/users"),
            await left.get(path),
            await left.put(path, json={"is_active": True}),
            await left.delete(f"/api/users/{registered.admin_id}"),
            await left.post(f"{path}/restore"),
        ):
            # Its session has ended too. This service learns that within seconds.
            assert expect(reply, 401)["code"] in {"not_admin_any_more", "session_ended"}


async def test_admin_cannot_grant_more_access_than_its_own(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    other = await register(system, url)
    theirs, ours = await other.user(), await registered.user()
    async with registered.client() as admin:
        for body, field in (
            ({"role": "operator"}, "role"),
            ({"restaurant_id": other.id}, "restaurant_id"),
            ({"id": theirs["id"]}, "id"),
            ({"password_hash": "x"}, "password_hash"),
            ({"deleted_at": None}, "deleted_at"),
        ):
            new = {"email": new_email(), "password": PASSWORD, "role": "staff", **body}
            assert expect(await admin.post("/api/users", json=new), 422)["details"]["field"] == field
            changed = await admin.put(f"/api/users/{ours['id']}", json=body)
            assert expect(changed, 422)["details"]["field"] == field
        # The admin can neither see nor change the users of another restaurant: the API answers that they do not exist.
        path = f"/api/users/{theirs['id']}"
        for reply in (
            await admin.get(path),
            await admin.put(path, json={"role": "admin", "password": "now it is mine, mine"}),
            await admin.delete(path),
            await admin.post(f"{path}/restore"),
        ):
            assert expect(reply, 404)["code"] == "not_found"
        listed = await admin.get("/api/users", params={"include_deleted": "true"})
        assert theirs["email"] not in listed.text
    async with other.client() as them:
        assert expect(await them.get(path)) == theirs


async def test_database_itself_keeps_users_of_tenants_apart(
    system: System, url: str, registered: RegisteredRestaurant
) -> None:
    """The database refuses these statements even if the API has a bug."""
    other = await register(system, url)
    add = "insert into users (id, restaurant_id, email, role) values (gen_random_uuid(), '{}', 'x' || random(), '{}')"
    async with system.database("ticketrail_api") as connection:
        assert await connection.fetchval("select count(id) from users") == 0
        for statement in (
            add.format(registered.id, "operator"),
            add.format(other.id, "staff"),
            f"update users set restaurant_id = '{other.id}'",
            "update users set role = 'operator'",
            "select password_hash from users",
            "select * from refresh_tokens",
            "delete from users",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with connection.transaction():
                    await connection.execute("select set_config('app.tenant', $1, true)", registered.id)
                    await connection.execute(statement)
        async with connection.transaction():
            await connection.execute("select set_config('app.tenant', $1, true)", registered.id)
            assert await connection.execute("update users set name = '' where id = $1", other.admin_id) == "UPDATE 0"
        # A function that runs with the rights of the owner must not use a table that the caller made.
        await connection.execute(
            "create temporary table users (id uuid, restaurant_id uuid, email text, name text, role text,"
            " password_hash text, is_active boolean, deleted_at timestamptz)"
        )
        assert await connection.fetchval("select id from sign_in_user($1)", registered.email) == registered.admin_id
