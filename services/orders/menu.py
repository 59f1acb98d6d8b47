"""Keeps the menus in memory, from which orders are priced.

A menu is loaded from PostgreSQL and the mirror, or from the one that answers. The guard decides which state of a dish
is newer. The reference log keeps the menu up to date. While all backends are unavailable, orders are priced from the
last known menu. The menu of a restaurant that is created after the start is loaded by the first request that needs it.
"""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from datetime import timedelta

import msgspec
import structlog
from msgspec import Struct

from shared.entities import menu_item, registry
from shared.entities.contract import BrokenContract, Head, decode_change, now, split_batch
from shared.entities.menu_item import MenuItem
from shared.errors import NotFound, Unavailable
from shared.lifecycle import BackgroundLoop
from shared.messaging.log import LogBatch, LogReader
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.restaurants import Restaurant, find_restaurant, list_restaurants

log = structlog.get_logger(__name__)

# The log is read from this long before the load, so that it includes changes that neither store had yet.
_OVERLAP = timedelta(seconds=60)


class MenuBook(Struct):
    restaurant: Restaurant
    heads: dict[str, Head]
    dishes: dict[str, MenuItem]

    def put(self, head: Head, dish: MenuItem) -> None:
        known = self.heads.get(dish.id)
        if known is None or head > known:
            self.heads[dish.id] = head
            self.dishes[dish.id] = dish

    @property
    def menu(self) -> Mapping[str, MenuItem]:
        return self.dishes


class Menus:
    def __init__(self, postgres: Postgres, mirror: Mirror, reader: LogReader) -> None:
        self._postgres = postgres
        self._mirror = mirror
        self.reader = reader
        self._books: dict[str, MenuBook] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        # Dishes from the log whose menu is being loaded. The stores may not have had them yet.
        self._arrived_while_loading: dict[str, list[tuple[Head, MenuItem]]] = {}
        self.loop = BackgroundLoop("menus", self._follow)
        self.loaded = False

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()

    async def book(self, restaurant_id: str) -> MenuBook:
        """Returns the menu of a restaurant. Raises NotFound if there is none, Unavailable if neither store answers."""
        book = self._books.get(restaurant_id)
        if book is None:
            async with self._loading.setdefault(restaurant_id, asyncio.Lock()):
                book = self._books.get(restaurant_id)
                if book is None:
                    self._arrived_while_loading[restaurant_id] = []
                    try:
                        book = await self._load(restaurant_id)
                    finally:
                        meanwhile = self._arrived_while_loading.pop(restaurant_id)
                    for head, dish in meanwhile:
                        book.put(head, dish)
                    self._books[restaurant_id] = book
            self._loading.pop(restaurant_id, None)
        return book

    def put(self, head: Head, dish: MenuItem) -> None:
        """Applies a dish that this instance has committed, without waiting for the log."""
        if (book := self._books.get(dish.restaurant_id)) is not None:
            book.put(head, dish)

    # -- loading -----------------------------------------------------------------------------------------------

    async def load_all(self) -> None:
        """Loads the menus of all restaurants. Waits until a store answers."""
        pause = 0.1
        while True:
            ids = await self._known_restaurants()
            if ids is not None:
                break
            log.warning("menus_wait_for_a_store")
            await asyncio.sleep(pause)
            pause = min(2.0, pause * 2)
        for restaurant_id in ids:
            try:
                await self.book(restaurant_id)
            except (NotFound, Unavailable) as error:
                log.warning("menu_not_loaded", restaurant_id=restaurant_id, error=str(error))
        self.loaded = True
        log.info("menus_loaded", restaurants=len(self._books))

    async def _known_restaurants(self) -> list[str] | None:
        try:
            async with self._postgres.connection() as connection:
                return [restaurant.id for restaurant in await list_restaurants(connection)]
        except UNAVAILABLE as error:
            log.warning("menus_without_postgres", error=str(error) or type(error).__name__)
        try:
            return await self._mirror.restaurant_ids()
        except (MirrorUnavailable, MirrorInDoubt):
            return None

    async def _load(self, restaurant_id: str) -> MenuBook:
        # The mirror is read first. A dish that leaves the mirror in between is then found in PostgreSQL.
        mirror_restaurant, dishes, warm = await self._from_mirror(restaurant_id)
        try:
            async with self._postgres.tenant(restaurant_id) as connection:
                restaurant = await find_restaurant(connection, restaurant_id)
                stored = await states.list_states(connection, menu_item.ENTITY, restaurant_id)
        except UNAVAILABLE as error:
            if not warm or mirror_restaurant is None:  # a cold mirror may have only a part of the menu
                raise Unavailable("the menu cannot be loaded now", retry_after=2.0) from error
            restaurant, stored = mirror_restaurant, []
        if restaurant is None:
            raise NotFound("no such restaurant")
        book = MenuBook(restaurant, {}, {})
        for found in stored:
            book.put(found.head, msgspec.json.decode(found.state, type=MenuItem))
        for head, dish in dishes:
            book.put(head, dish)
        return book

    async def _from_mirror(self, restaurant_id: str) -> tuple[Restaurant | None, list[tuple[Head, MenuItem]], bool]:
        try:
            encoded = await self._mirror.restaurant(restaurant_id)
            ids = await self._mirror.live_ids(restaurant_id, menu_item.ENTITY.name)
            warm, documents = await self._mirror.read(restaurant_id, menu_item.ENTITY.name, ids)
        except (MirrorUnavailable, MirrorInDoubt):
            return None, [], False
        restaurant = msgspec.json.decode(encoded, type=Restaurant) if encoded else None
        dishes = [
            (document.head, msgspec.json.decode(document.state, type=MenuItem))
            for document in documents
            if document is not None
        ]
        return restaurant, dishes, warm

    # -- following the log -------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        async with aclosing(self.reader.read(now() - _OVERLAP)) as batches:
            async for batch in batches:
                self._apply(batch)
                self.loop.turned()

    def _apply(self, batch: LogBatch) -> None:
        for entry in batch.entries:
            try:
                events = split_batch(entry.body)
            except BrokenContract as error:
                log.warning("menu_change_skipped", offset=entry.offset, error=str(error))
                continue
            for event in events:
                self._apply_one(event, entry.offset)

    def _apply_one(self, event: bytes, offset: int) -> None:
        try:
            change = decode_change(event)
            if change.entity != menu_item.ENTITY.name:
                return
            if (book := self._books.get(change.restaurantid)) is not None:
                book.put(change.head, registry.read(change)[1])
            elif (meanwhile := self._arrived_while_loading.get(change.restaurantid)) is not None:
                meanwhile.append((change.head, registry.read(change)[1]))
        except BrokenContract as error:
            # The PostgreSQL writer dead-letters the change; the other dishes must still be updated.
            log.warning("menu_change_skipped", offset=offset, reason=error.reason, error=str(error))
