"""The audit of identity: `GET /api/audit` and the log show the events of users and API keys."""

import json
from typing import Any

import pytest

from tests.rigs.command_line import ticketrail
from tests.rigs.http_client import http_client
from tests.rigs.sign_in import (
    PASSWORD,
    RegisteredRestaurant,
    client,
    expect,
    refresh,
    register,
    sign_in,
)
from tests.rigs.system import System, eventually

NEW = "another one that is good"


@pytest.fixture
async def own(system: System, url: str) -> RegisteredRestaurant:
    return await register(system, url)


async def audited(own: RegisteredRestaurant, entity: str, id_: str) -> list[dict[str, Any]]:
    """Returns the events of one user or key, oldest first."""
    async with own.client() as admin:
        found = expect(await admin.get("/api/audit", params={"entity": entity, "entity_id": id_, "limit": "100"}))
    assert {(one["entity"], one["entity_id"]) for one in found} <= {(entity, id_)}
    return list(reversed(found))


def actions(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["type"].rpartition(".")[2], event["actor"]) for event in events]


def logged(system: System, event: str) -> list[dict[str, Any]]:
    """Returns the lines of the guarded instance's log with this event."""
    lines = (system.directory / "guarded.log").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line.get("event") == event]


async def test_life_of_a_user_is_audited(system: System, url: str, own: RegisteredRestaurant) -> None:
    user = await own.user(name="Kim")
    id_, email = user["id"], user["email"]
    path = f"/api/users/{id_}"
    expect(await sign_in(url, email, "a wrong password"), 401)
    session = expect(await sign_in(url, email))
    async with own.client() as admin, client(url) as anybody:
        assert expect(await anybody.post("/api/auth/logout", json={"refresh_token": session["refresh_token"]}))
        expect(await admin.put(path, json={"name": "Kim B."}))
        code = expect(await admin.post(f"{path}/password-reset"), 201)["code"]
        body = {"email": email, "code": code, "new_password": NEW}
        expect(await anybody.post("/api/auth/password-reset", json=body))
        expect(await admin.put(path, json={"is_active": False}))
        expect(await admin.put(path, json={"is_active": True}))
        expect(await admin.delete(path))
        expect(await admin.post(f"{path}/restore"))
    events = await audited(own, "user", id_)
    assert actions(events) == [
        ("created", own.email),
        ("sign_in_failed", email),
        ("signed_in", email),
        ("signed_out", email),
        ("changed", own.email),
        ("reset_code_made", own.email),
        ("password_changed", email),
        ("shut_out", own.email),
        ("changed", own.email),
        ("deleted", own.email),
        ("restored", own.email),
    ]
    assert events[4]["changed"] == {"name": {"before": "Kim", "after": "Kim B."}}
    assert not any("argon2" in json.dumps(event) for event in events)
    for event in ("sign_in_failed", "signed_in", "signed_out", "user_created", "user_changed", "password_reset"):
        assert logged(system, event), event
    text = (system.directory / "guarded.log").read_text()
    assert PASSWORD not in text
    assert code not in text
    # Another restaurant sees none of it, and the list of changes is as before.
    other = await register(system, url)
    async with other.client() as admin:
        assert expect(await admin.get("/api/audit", params={"entity": "user", "entity_id": id_})) == []
    async with own.client() as admin:
        assert all(one["entity"] != "user" for one in expect(await admin.get("/api/audit")))


async def test_audit_of_a_session_has_the_address_of_the_client(
    system: System, url: str, own: RegisteredRestaurant
) -> None:
    user = await own.user()
    email, there = user["email"], "203.0.113.77"
    # A client can write what it wants before the address that the trusted proxy adds.
    expect(await sign_in(url, email, "a wrong password", address=f"198.51.100.9, {there}"), 401)
    session = expect(await sign_in(url, email, address=there))
    async with client(url, address=there) as anybody:
        expect(await anybody.post("/api/auth/logout", json={"refresh_token": session["refresh_token"]}))
    again = expect(await sign_in(url, email, address=there))
    async with client(url, again["access_token"], address=there) as staff:
        body = {"current_password": PASSWORD, "new_password": NEW}
        expect(await staff.post("/api/auth/password", json=body))
    async with own.client() as admin, client(url, address=there) as anybody:
        code = expect(await admin.post(f"/api/users/{user['id']}/password-reset"), 201)["code"]
        body = {"email": email, "code": code, "new_password": PASSWORD}
        expect(await anybody.post("/api/auth/password-reset", json=body))
    # The shared system trusts no proxy, so the header says nothing there.
    expect(await sign_in(system.urls["orders"], email, address=there))
    events = await audited(own, "user", user["id"])
    assert [(name, event["address"]) for (name, _), event in zip(actions(events), events, strict=True)] == [
        ("created", None),
        ("sign_in_failed", there),
        ("signed_in", there),
        ("signed_out", there),
        ("signed_in", there),
        ("password_changed", there),
        ("reset_code_made", None),
        ("password_changed", there),
        ("signed_in", "127.0.0.1"),
    ]
    for event in ("sign_in_failed", "signed_in", "signed_out", "password_changed", "password_reset"):
        assert there in [line["address"] for line in logged(system, event)], event
    assert all(event["address"] for event in await audited(own, "user", own.admin_id))


async def test_reuse_of_a_refresh_token_is_audited(system: System, url: str, own: RegisteredRestaurant) -> None:
    user = await own.user()
    first = expect(await sign_in(url, user["email"]))
    expect(await refresh(url, first["refresh_token"]))
    async with system.database("ticketrail_owner") as connection:
        await connection.execute(
            "update refresh_tokens set used_at = used_at - interval '1 minute' where user_id = $1", user["id"]
        )
    expect(await refresh(url, first["refresh_token"]), 401)
    events = await audited(own, "user", user["id"])
    assert actions(events)[-1] == ("refresh_token_reused", user["email"])
    assert events[-1]["address"] not in (None, events[-2]["address"])
    assert logged(system, "refresh_token_reused")


async def test_life_of_a_key_is_audited(system: System, url: str, own: RegisteredRestaurant) -> None:
    async with own.client() as admin:
        key = expect(await admin.post("/api/api-keys", json={"name": "Shop", "scopes": ["menu:read"]}), 201)
        async with client(url, key["key"]) as shop:
            for _ in range(2):
                expect(await shop.get("/api/menu"))
        expect(await admin.delete(f"/api/api-keys/{key['id']}"))
    events = await audited(own, "api_key", key["id"])
    assert actions(events) == [("created", own.email), ("first_used", key["id"]), ("revoked", own.email)]
    for event in ("api_key_made", "api_key_first_used", "api_key_revoked"):
        assert logged(system, event), event
    assert key["key"][-43:] not in (system.directory / "guarded.log").read_text()


async def test_token_of_the_command_line_is_audited_and_can_be_revoked(
    system: System, url: str, own: RegisteredRestaurant
) -> None:
    user = await own.user()
    issued = await ticketrail(system, "token", "--restaurant", own.id, "--user", user["id"])
    assert issued.code == 0, issued.err
    token, family = issued.out.strip(), issued.err.split()[1].rstrip(";")
    async with http_client(base_url=url, headers={"Authorization": f"Bearer {token}"}) as staff:
        expect(await staff.get("/api/auth/me"))
        revoked = await ticketrail(system, "token", "--revoke", family)
        assert revoked.code == 0, revoked.err

        async def status() -> int:
            return (await staff.get("/api/auth/me")).status_code

        await eventually(status, what="a revoked token", until=lambda found: found == 401)
    events = await audited(own, "user", user["id"])
    assert [name for name, _ in actions(events)][-2:] == ["token_issued", "token_revoked"]
    unknown = await ticketrail(system, "token", "--revoke", user["id"])
    assert unknown.code != 0
