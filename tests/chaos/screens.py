"""One screen for each restaurant, which follows the event stream. It reconnects with its cursor until the run ends."""

import asyncio
import contextlib
import json
from collections import Counter
from typing import Any

import httpx

from tests.chaos.rig import ChaosRig
from tests.rigs.http_client import http_client

# Keep-alives come every 15 seconds: a connection that is silent for longer is dead.
_TIMEOUTS = httpx.Timeout(5.0, read=20.0)
_RETRY_PAUSE_SECONDS = 0.5


class Screens:
    def __init__(self, rig: ChaosRig) -> None:
        system, other = rig.system, rig.other_restaurant
        self._url = f"{system.urls['notifier']}/api/v1/sync/events"
        self._tokens = {system.restaurant_id: system.token("admin"), other["id"]: other["token"]}
        self._tasks: list[asyncio.Task[None]] = []
        self.pushed: dict[str, Counter[str]] = {restaurant: Counter() for restaurant in self._tokens}
        """Restaurant -> change -> number of pushes."""
        self.resyncs = 0
        self.wrong: list[str] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow(*one)) for one in self._tokens.items()]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, restaurant: str, token: str) -> None:
        cursor = ""
        async with http_client(timeout=_TIMEOUTS, headers={"Authorization": f"Bearer {token}"}) as client:
            while True:
                headers = {"Last-Event-ID": cursor} if cursor else {}
                with contextlib.suppress(httpx.HTTPError):
                    async with client.stream("GET", self._url, headers=headers) as reply:
                        if 400 <= reply.status_code < 500:
                            self.wrong.append(f"a screen was refused: {reply.status_code} {await reply.aread()!r}")
                        async for line in reply.aiter_lines():
                            if line.startswith("id: "):
                                cursor = line[4:]
                            elif line.startswith("data: "):
                                self.take(restaurant, json.loads(line[6:]))
                await asyncio.sleep(_RETRY_PAUSE_SECONDS)

    def take(self, restaurant: str, event: dict[str, Any]) -> None:
        """Records one event that the screen of `restaurant` received."""
        if "changeId" not in event:  # the event `connected` or a resync
            self.resyncs += event.get("reason") is not None
            if event.get("restaurantId", restaurant) != restaurant:
                self.wrong.append(f"the screen of {restaurant} was connected as {event['restaurantId']}")
            return
        self.pushed[restaurant][event["changeId"]] += 1
        if event["data"]["restaurant_id"] != restaurant:
            self.wrong.append(f"an order of {event['data']['restaurant_id']} was pushed to {restaurant}")
