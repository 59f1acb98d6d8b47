"""Limits on sign-in over HTTP: they stop whoever guesses, and nobody else."""

import asyncio
import secrets
from uuid import uuid4

import httpx

from tests.rigs.sign_in import (
    CHANGES_PER_ADDRESS,
    FAILURE_WINDOW_SECONDS,
    FAILURES_PER_ACCOUNT,
    FAILURES_PER_ACCOUNT_AND_ADDRESS,
    FAILURES_PER_ADDRESS,
    PASSWORD,
    SESSIONS_PER_TABLE,
    RegisteredRestaurant,
    addresses,
    client,
    expect,
    new_email,
    registration,
    sign_in,
)
from tests.rigs.system import System

STAFF_AT_ONE_ADDRESS, WRONG_TRIES_AT_ONE_ADDRESS = 6, 53
TABLES, GUESTS = 7, 70


async def fail(url: str, email: str, address: str, times: int) -> list[int]:
    """Tries wrong passwords one after the other. Returns the statuses."""
    return [(await sign_in(url, email, f"wrong guess {n}", address=address)).status_code for n in range(times)]


async def test_owner_signs_in_while_somebody_else_guesses_the_password(
    url: str, registered: RegisteredRestaurant
) -> None:
    user, attacker = await registered.user(), next(addresses)
    guesses = await fail(url, user["email"], attacker, FAILURES_PER_ACCOUNT_AND_ADDRESS + 3)
    assert guesses == [401] * FAILURES_PER_ACCOUNT_AND_ADDRESS + [429] * 3
    # At the attacker's address even the right password is refused, in every spelling of the email.
    for email in (user["email"], user["email"].upper()):
        reply = await sign_in(url, email, address=attacker)
        assert expect(reply, 429)["code"] == "rate_limited"
        assert 1 <= int(reply.headers["retry-after"]) <= FAILURE_WINDOW_SECONDS
    expect(await sign_in(url, user["email"]))


async def test_staff_sign_in_behind_an_address_with_many_wrong_tries(
    url: str, registered: RegisteredRestaurant
) -> None:
    address = next(addresses)
    staff = [(await registered.user())["email"] for _ in range(STAFF_AT_ONE_ADDRESS)]
    tries = [staff[n % len(staff)] for n in range(WRONG_TRIES_AT_ONE_ADDRESS)]
    replies = [await sign_in(url, email, "a wrong password", address=address) for email in tries]
    assert {reply.status_code for reply in replies} == {401}
    for email in staff:
        expect(await sign_in(url, email, address=address))


async def test_many_guests_of_a_restaurant_scan_codes_at_one_address(registered: RegisteredRestaurant) -> None:
    address, tables = next(addresses), [await table_of(registered, f"T{n}") for n in range(TABLES)]
    replies = await asyncio.gather(*(scan(registered, tables[n % TABLES], address) for n in range(GUESTS)))
    assert {reply.status_code for reply in replies} == {201}
    # One table is limited, and the others are not.
    statuses = {(await scan(registered, tables[0], address)).status_code for _ in range(SESSIONS_PER_TABLE)}
    assert 429 in statuses
    expect(await scan(registered, tables[1], address), 201)


async def test_codes_of_unknown_tables_are_limited_by_address(registered: RegisteredRestaurant) -> None:
    address = next(addresses)
    replies = [await scan(registered, str(uuid4()), address) for _ in range(FAILURES_PER_ADDRESS + 1)]
    assert [reply.status_code for reply in replies] == [404] * FAILURES_PER_ADDRESS + [429]
    expect(await scan(registered, await table_of(registered, "Window"), address), 201)
    expect(await sign_in(registered.url, (await registered.user())["email"], address=address))


async def test_successful_sign_ins_are_not_counted(url: str, registered: RegisteredRestaurant) -> None:
    user, address = await registered.user(), next(addresses)
    replies = [await sign_in(url, user["email"], address=address) for _ in range(FAILURES_PER_ACCOUNT_AND_ADDRESS + 2)]
    assert {reply.status_code for reply in replies} == {200}
    # They gave back their tokens, so the count of failures begins at zero.
    assert set(await fail(url, user["email"], address, FAILURES_PER_ACCOUNT_AND_ADDRESS)) == {401}


async def test_failures_at_many_addresses_lock_an_account_only_where_it_was_never_signed_in(
    url: str, registered: RegisteredRestaurant
) -> None:
    user, other, home = await registered.user(), await registered.user(), next(addresses)
    expect(await sign_in(url, user["email"], address=home))
    guesses = [(await fail(url, user["email"], next(addresses), 1))[0] for _ in range(FAILURES_PER_ACCOUNT)]
    assert set(guesses) == {401}
    assert expect(await sign_in(url, user["email"]), 429)["code"] == "rate_limited"
    expect(await sign_in(url, user["email"], address=home))
    expect(await sign_in(url, other["email"]))


async def test_failures_of_many_accounts_lock_an_address_only_for_accounts_that_never_signed_in_there(
    url: str, registered: RegisteredRestaurant
) -> None:
    user, stranger, address = await registered.user(), await registered.user(), next(addresses)
    expect(await sign_in(url, user["email"], address=address))
    for _ in range(FAILURES_PER_ADDRESS):
        expect(await sign_in(url, new_email(), address=address), 401)
    expect(await sign_in(url, stranger["email"], address=address), 429)
    expect(await sign_in(url, user["email"], address=address))
    expect(await sign_in(url, stranger["email"]))


async def test_guesses_at_the_same_moment_get_no_more_tries(url: str, registered: RegisteredRestaurant) -> None:
    user, attacker = await registered.user(), next(addresses)
    replies = await asyncio.gather(
        *(sign_in(url, user["email"], f"guess {n}", address=attacker) for n in range(2 * FAILURES_PER_ACCOUNT))
    )
    statuses = [reply.status_code for reply in replies]
    assert statuses.count(401) == FAILURES_PER_ACCOUNT_AND_ADDRESS
    assert statuses.count(429) == len(statuses) - FAILURES_PER_ACCOUNT_AND_ADDRESS


async def test_addresses_of_one_ipv6_network_count_as_one(url: str) -> None:
    network, email = f"2001:db8:{secrets.randbelow(65_536):x}:{secrets.randbelow(65_536):x}", new_email()
    replies = [
        await sign_in(url, email, address=f"{network}:7::{n:x}") for n in range(FAILURES_PER_ACCOUNT_AND_ADDRESS)
    ]
    assert {reply.status_code for reply in replies} == {401}
    assert (await sign_in(url, email, address=f"{network}:8::1")).status_code == 429


async def test_answers_that_reveal_taken_emails_are_limited(url: str, registered: RegisteredRestaurant) -> None:
    """Without the limit, an admin could find out the emails of other accounts by trying to use them."""
    user, address = await registered.user(), next(addresses)
    async with client(url, registered.session["access_token"], address=address) as admin:
        asked = [
            await admin.put(f"/api/users/{user['id']}", json={"email": registered.email})
            for _ in range(CHANGES_PER_ADDRESS + 1)
        ]
        body = {"email": new_email(), "password": PASSWORD, "role": "staff"}
        expect(await admin.post("/api/users", json=body), 429)
        expect(await admin.post("/api/auth/register-restaurant", json=registration()), 429)
        # A change whose reply cannot show that an email is taken is not limited.
        expect(await admin.put(f"/api/users/{user['id']}", json={"name": "Kim"}))
    assert [reply.status_code for reply in asked] == [409] * CHANGES_PER_ADDRESS + [429]
    expect(await sign_in(url, user["email"], address=address))


async def test_unreachable_database_does_not_count_as_a_failed_sign_in(system: System) -> None:
    """Owners who try again during an outage are not locked out after it."""
    address = next(addresses)
    async with system.another_orders(
        "without-database",
        database_api_url="postgresql://ticketrail_api:ticketrail@127.0.0.1:1/none",
        sign_in_failures_per_account_and_address=2,
    ) as url:
        email = new_email()
        replies = [await sign_in(url, email, address=address) for _ in range(4)]
        assert {reply.status_code for reply in replies} == {503}


async def table_of(registered: RegisteredRestaurant, label: str) -> str:
    async with registered.client() as admin:
        return str(expect(await admin.post("/api/tables", json={"label": label, "seats": 2}), 201)["id"])


async def scan(registered: RegisteredRestaurant, table: str, address: str) -> httpx.Response:
    async with client(registered.url, address=address) as guest:
        return await guest.post("/api/auth/table-session", json={"slug": registered.slug, "table_id": table})
