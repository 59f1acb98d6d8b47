"""The limits of open streams, and the reasons for their end."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest

from shared.security.tokens import Identity, Role
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, order
from tests.rigs.notifier import TOKENS, Notifier, NotifierRig, Screen, token
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

OF_USER, OF_SESSION, OF_RESTAURANT, CONNECTIONS = 3, 2, 6, 10
"""The caps of these tests. 90 % of the connections are 9 streams."""


@pytest.fixture(scope="module")
async def rig(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NotifierRig]:
    rig = NotifierRig(servers, tmp_path_factory.mktemp("streams"))
    await rig.make()
    yield rig
    await rig.clean()


@pytest.fixture(scope="module")
async def notifier(rig: NotifierRig) -> Notifier:
    return await rig.notifier(
        streams_per_user=OF_USER,
        streams_per_guest_session=OF_SESSION,
        streams_per_restaurant=OF_RESTAURANT,
        client_connections=CONNECTIONS,
        cors_origins="https://pos.example",
    )


@pytest.fixture(autouse=True)
async def none_left(notifier: Notifier) -> None:
    await eventually(notifier.subscribers, until=lambda count: count == 0, what="no stream of an earlier test")


def token_of(user: str, *, restaurant: str = RESTAURANT, ttl_seconds: int = 600) -> str:
    return TOKENS.issue(Identity(user, Role.STAFF, restaurant), ttl_seconds=ttl_seconds)


async def ended(screen: Screen) -> str:
    """Waits for the end of a stream; returns the reason."""
    await screen.until(lambda: screen.ended)
    assert screen.events[-1].name == "closing", screen.events
    return str(screen.events[-1].data["reason"])


async def test_stream_ends_when_its_token_expires(rig: NotifierRig, notifier: Notifier) -> None:
    short = token_of("u-short", ttl_seconds=3)
    async with notifier.screen(by=short) as screen, notifier.screen() as colleague:
        expires_at = screen.events[0].data["expiresAt"]
        assert await ended(screen) == "expired"
        await rig.publish_each(change(order()))
        await colleague.first(1)
        assert screen.names == ["closing"]
    assert time.strftime("%Y-%m-%dT", time.gmtime()) in expires_at
    refused = await notifier.get(by=short)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "token_expired")


async def test_closing_moves_no_cursor(rig: NotifierRig, notifier: Notifier) -> None:
    """A client that resumes after `closing` continues behind the last event that it got."""
    async with notifier.screen(by=token_of("u-short", ttl_seconds=3)) as screen:
        await rig.publish_each(change(order()))
        (last,) = await screen.first(1)
        assert await ended(screen) == "expired"
        assert screen.last_event_id == last.id


async def test_a_second_stream_of_the_same_client_replaces_the_first_one(notifier: Notifier) -> None:
    async with notifier.screen(by=token_of("u-1"), clientId="tab-1") as first:
        assert first.events[0].data["clientId"] == "tab-1"
        async with (
            notifier.screen(by=token_of("u-1"), clientId="tab-2") as another,
            notifier.screen(by=token_of("u-2"), clientId="tab-1") as of_another_user,
            notifier.screen(by=token_of("u-1"), clientId="tab-1") as second,
        ):
            assert await ended(first) == "replaced"
            assert not (another.ended or of_another_user.ended or second.ended)
            assert await notifier.subscribers() == 3


async def test_streams_without_a_client_id_get_one_and_replace_nobody(notifier: Notifier) -> None:
    async with notifier.screen() as one, notifier.screen() as other:
        assert one.events[0].data["clientId"] != other.events[0].data["clientId"]
        assert not one.ended


@pytest.mark.parametrize("name", ["x" * 65, "a b", "ä"])
async def test_wrong_client_id_is_refused_by_name(notifier: Notifier, name: str) -> None:
    refused = await notifier.get(params={"clientId": name})
    assert (refused.status_code, refused.json()["error"]["details"]["field"]) == (422, "clientId")


async def test_a_user_may_not_have_more_streams_than_the_cap(notifier: Notifier) -> None:
    async with AsyncExitStack() as open_:
        screens = [
            await open_.enter_async_context(notifier.screen(by=token_of("u-1"), clientId=f"tab-{number}"))
            for number in range(OF_USER)
        ]
        refused = await notifier.get(by=token_of("u-1"))
        assert refused.status_code == 429
        assert refused.json()["error"]["details"]["limit"] == OF_USER
        assert int(refused.headers["retry-after"]) >= 1
        # Nobody was ended for the newcomer, a stream that replaces another one has room, and so has another user.
        assert not any(screen.ended for screen in screens)
        await open_.enter_async_context(notifier.screen(by=token_of("u-1"), clientId="tab-0"))
        await open_.enter_async_context(notifier.screen(by=token_of("u-2")))
        assert await ended(screens[0]) == "replaced"


async def test_a_stream_that_ended_makes_room(notifier: Notifier) -> None:
    async with AsyncExitStack() as open_:
        for _ in range(OF_USER):
            await open_.enter_async_context(notifier.screen(by=token_of("u-1")))
        assert (await notifier.get(by=token_of("u-1"))).status_code == 429
    await eventually(notifier.subscribers, until=lambda count: count == 0)
    async with notifier.screen(by=token_of("u-1")) as screen:
        assert not screen.ended


async def test_a_guest_session_and_a_restaurant_may_not_have_more_streams_than_their_caps(notifier: Notifier) -> None:
    guest, other_guest = (token(Role.CUSTOMER, session=f"table-{uuid4()}") for _ in range(2))
    async with AsyncExitStack() as open_:
        for by in [guest] * OF_SESSION + [other_guest] * OF_SESSION:
            await open_.enter_async_context(notifier.screen(by=by))
        assert (await notifier.get(by=guest)).status_code == 429
        for user in range(OF_RESTAURANT - 2 * OF_SESSION):
            await open_.enter_async_context(notifier.screen(by=token_of(f"u-{user}")))
        refused = await notifier.get(by=token_of("u-9"))
        assert refused.status_code == 429 and "restaurant" in refused.json()["error"]["message"]
        await open_.enter_async_context(notifier.screen(by=token_of("u-9", restaurant=OTHER_RESTAURANT)))


async def test_an_instance_keeps_a_tenth_of_its_connections_free(notifier: Notifier) -> None:
    async with AsyncExitStack() as open_:
        for user in range(9):
            restaurant = RESTAURANT if user < OF_RESTAURANT else OTHER_RESTAURANT
            await open_.enter_async_context(notifier.screen(by=token_of(f"u-{user}", restaurant=restaurant)))
        refused = await notifier.get(by=token_of("u-9", restaurant=OTHER_RESTAURANT))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_streams")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await notifier.health())[0] == 200


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://pos.example", True),
        ("own host", True),
        ("https://evil.example", False),
        ("https://pos.example.evil.example", False),
        ("http://pos.example", False),
        ("null", False),
        ("", False),
    ],
)
async def test_only_pages_of_allowed_origins_may_open_a_stream(notifier: Notifier, origin: str, allowed: bool) -> None:
    sent = notifier.base if origin == "own host" else origin
    reply = await notifier.get(headers={"Origin": sent})
    assert reply.status_code == (200 if allowed else 403)
    if not allowed:
        assert reply.json()["error"]["code"] == "origin_not_allowed"


async def test_sigterm_tells_clients_to_reconnect(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen() as screen:
        assert await asyncio.to_thread(notifier.child.terminate, 15.0), notifier.child.tail()
        assert await ended(screen) == "restart"
        assert screen.events[-1].data["retryAfter"] > 0
