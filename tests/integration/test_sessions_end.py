"""A session ends everywhere: every service refuses its tokens, and its event streams end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import jwt
import pytest
from click.testing import CliRunner
from msgspec import Struct

from services.sync.cli.main import main
from services.sync.cli.user_accounts import set_password
from shared.postgres.pool import Postgres
from shared.security.revoked import RevocationPoller, RevokedTokens
from shared.security.token_clock import LEEWAY_SECONDS, TokenClock
from shared.settings import Settings
from tests.rigs.notifier import Screen, screen_at
from tests.rigs.sign_in import RegisteredRestaurant, client, expect, refresh, register, sign_in
from tests.rigs.system import System, eventually
from tests.rigs.turns import whole_turn

REQUESTS = {"orders": "/api/auth/me", "sync": "/api/sync/status", "notifier": "/api/v1/sync/events"}


class SignedIn(Struct, frozen=True):
    user: dict[str, Any]
    session: dict[str, Any]
    screen: Screen

    @property
    def access_token(self) -> str:
        return str(self.session["access_token"])


async def status(system: System, service: str, token: str) -> int:
    async with (
        client(system.urls[service], token) as caller,
        caller.stream("GET", REQUESTS[service]) as reply,
    ):
        return reply.status_code


@asynccontextmanager
async def signed_in(restaurant: RegisteredRestaurant, *, user: dict[str, Any] | None = None) -> AsyncIterator[SignedIn]:
    """Yields a member of staff whose requests every service accepts, and who follows the events."""
    user = user or await restaurant.user()
    session = expect(await sign_in(restaurant.url, user["email"]))
    async with screen_at(restaurant.system.urls["notifier"], session["access_token"]) as screen:
        yield SignedIn(user, session, screen)


async def dismiss(restaurant: RegisteredRestaurant, one: SignedIn) -> None:
    async with restaurant.client() as admin:
        expect(await admin.put(f"/api/users/{one.user['id']}", json={"is_active": False}))


async def change_password(restaurant: RegisteredRestaurant, one: SignedIn) -> None:
    async with restaurant.client() as admin:
        expect(await admin.put(f"/api/users/{one.user['id']}", json={"password": "another one that is good"}))


async def change_password_by_command(restaurant: RegisteredRestaurant, one: SignedIn) -> None:
    async with restaurant.system.database() as connection:
        await set_password(connection, one.user["email"], "another one that is good")


async def log_out(restaurant: RegisteredRestaurant, one: SignedIn) -> None:
    async with client(restaurant.url) as anybody:
        expect(await anybody.post("/api/auth/logout", json={"refresh_token": one.session["refresh_token"]}))


async def reuse_refresh_token(restaurant: RegisteredRestaurant, one: SignedIn) -> None:
    token = one.session["refresh_token"]
    expect(await refresh(restaurant.url, token))
    async with restaurant.system.database("ticketrail_owner") as connection:
        await connection.execute(
            "update refresh_tokens set used_at = used_at - interval '11 seconds' where user_id = $1", one.user["id"]
        )
    expect(await refresh(restaurant.url, token), 401)


ENDINGS: list[Callable[[RegisteredRestaurant, SignedIn], Awaitable[None]]] = [
    dismiss,
    change_password,
    change_password_by_command,
    log_out,
    reuse_refresh_token,
]


@pytest.fixture
async def restaurant(system: System) -> RegisteredRestaurant:
    return await register(system, system.urls["orders"])


async def test_every_service_refuses_an_ended_session_and_its_streams_end(
    system: System, restaurant: RegisteredRestaurant
) -> None:
    async with AsyncExitStack() as open_, signed_in(restaurant) as colleague:
        ending = [await open_.enter_async_context(signed_in(restaurant)) for _ in ENDINGS]
        for one in [colleague, *ending]:
            assert [await status(system, service, one.access_token) for service in REQUESTS] == [200] * 3
        await asyncio.gather(*(end(restaurant, one) for end, one in zip(ENDINGS, ending, strict=True)))
        for end, one in zip(ENDINGS, ending, strict=True):
            await one.screen.until(lambda screen=one.screen: screen.ended)  # type: ignore[misc]
            last = one.screen.events[-1]
            assert (last.name, last.data) == ("closing", {"reason": "revoked", "retryAfter": 0.0}), end
            for service in REQUESTS:
                await eventually(
                    lambda one=one, service=service: status(system, service, one.access_token),  # type: ignore[misc]
                    until=lambda found: found == 401,
                    what=f"{service} refuses after {end.__name__}",
                )
        # Nobody else is signed out.
        assert [await status(system, service, colleague.access_token) for service in REQUESTS] == [200] * 3
        assert not colleague.screen.ended


async def test_a_new_sign_in_after_a_new_password_is_valid_everywhere(
    system: System, restaurant: RegisteredRestaurant
) -> None:
    async with signed_in(restaurant) as before:
        await change_password(restaurant, before)
        await before.screen.until(lambda: before.screen.ended)
    session = expect(await sign_in(restaurant.url, before.user["email"], "another one that is good"))
    for service in REQUESTS:
        assert await status(system, service, session["access_token"]) == 200


async def test_operator_who_is_deactivated_by_command_is_refused_until_activated_again(
    system: System, restaurant: RegisteredRestaurant
) -> None:
    """No admin can shut an operator out."""
    email = f"op-{uuid4().hex[:8]}@ops.example"

    async def user(*arguments: str) -> str:
        ended = await asyncio.to_thread(
            CliRunner().invoke, main, ["user", *arguments], input="a passphrase of Nadia\n", env=system.env
        )
        assert ended.exit_code == 0, ended.output
        return ended.output.strip()

    async def signed_in_again() -> dict[str, Any]:
        return dict(expect(await sign_in(restaurant.url, email, "a passphrase of Nadia")))

    id_ = await user("add", email)
    session = await signed_in_again()
    assert await status(system, "sync", session["access_token"]) == 200
    await user("deactivate", email.upper())
    await eventually(
        lambda: status(system, "sync", session["access_token"]),
        until=lambda found: found == 401,
        what="the sync API refuses a deactivated operator",
    )
    expect(await sign_in(restaurant.url, email, "a passphrase of Nadia"), 401)
    expect(await refresh(restaurant.url, session["refresh_token"]), 401)
    await user("activate", email)
    assert await status(system, "sync", (await signed_in_again())["access_token"]) == 200
    assert await status(system, "sync", session["access_token"]) == 401
    async with system.database("ticketrail_owner") as connection:
        noted = await connection.fetch("select action from identity_events where entity_id = $1 order by at", id_)
    assert [row["action"] for row in noted if row["action"] not in ("signed_in", "sign_in_failed")] == [
        "created",
        "shut_out",
        "changed",
    ]


async def test_a_service_that_starts_later_refuses_sessions_that_ended_before(
    system: System, restaurant: RegisteredRestaurant
) -> None:
    async with signed_in(restaurant) as one:
        await log_out(restaurant, one)
        async with system.another_orders("later") as later, client(later, one.access_token) as caller:
            assert expect(await caller.get("/api/auth/me"), 401)["code"] == "session_ended"


async def test_a_logout_is_kept_for_as_long_as_the_tokens_of_its_session_are_accepted(
    system: System, restaurant: RegisteredRestaurant
) -> None:
    """Not shorter, or a token would be accepted again. Not much longer, because every service keeps it in memory."""
    async with signed_in(restaurant) as one:
        claims = jwt.decode(one.access_token, options={"verify_signature": False})
        accepted_until = claims["exp"] + LEEWAY_SECONDS
        await log_out(restaurant, one)
    async with system.database("ticketrail_owner") as connection:
        until = await connection.fetchval(
            "select extract(epoch from until)::float8 from revocations where subject = $1", f"family:{claims['family']}"
        )
    assert accepted_until <= until < accepted_until + 60


async def test_the_last_list_holds_while_postgres_is_unavailable_and_after_it_lost_rows(system: System) -> None:
    ended, lost = (f"user:{uuid4()}" for _ in range(2))
    settings = Settings(_env_file=None)
    poller = RevocationPoller(
        Postgres(system.database_url("ticketrail_api"), settings, size=1),
        RevokedTokens(),
        TokenClock(),
        interval_seconds=0.01,
    )
    news: list[int] = []
    poller.listeners.append(lambda: news.append(len(poller.revoked)))
    insert = "insert into revocations (subject, epoch, until) values ($1, 3, now() + interval '1 hour')"
    async with system.database("ticketrail_owner") as connection:
        await connection.execute(insert, ended)
        await poller.start()
        try:
            assert poller.revoked.refuses([(ended, 2)]) and not poller.revoked.refuses([(ended, 3)])
            await connection.execute(insert, lost)
            await whole_turn(poller.loop)
            assert poller.revoked.refuses([(lost, 0)])
            told = len(news)
            assert told >= 2
            await connection.execute("delete from revocations where subject = $1", lost)
            await whole_turn(poller.loop)
            assert poller.revoked.refuses([(lost, 0)])
        finally:
            await poller.stop()
    away = RevocationPoller(
        Postgres("postgresql://nobody:x@127.0.0.1:1/none", settings, size=1),
        poller.revoked,
        TokenClock(),
        interval_seconds=0.01,
    )
    await away.start()
    try:
        await whole_turn(away.loop)
        assert away.revoked.refuses([(ended, 2), (lost, 0)])
    finally:
        await away.stop()
