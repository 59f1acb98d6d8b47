"""Keeps the menus in memory, from which orders are priced.

A menu is loaded from PostgreSQL and the mirror, or from the one that answers. The guard decides which state of a dish
is newer. The reference log keeps the menu up to date. While all backends are unavailable, orders are priced from the
last known menu. The menu of a restaurant that is created after the start is loaded by the first request that needs it.

Guarantee: no change of a dish is missed. The menus are loaded after the reader has attached to the log and met its
mark: a change before the mark is in a store, and a change after it comes from the log. They are loaded again when that
may not hold:

| event                                         | why                                                                |
|-----------------------------------------------|--------------------------------------------------------------------|
| the reader attaches after the first load      | a change between them is in neither                                |
| the log does not prove the reader's position  | the reader has missed entries, or the log has lost some            |
| the mirror turns warm                         | while it was cold, PostgreSQL alone was read, and may be behind    |

Between a record and its reveal, a change is in no store yet. The log is therefore read from some time before the mark.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
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
from shared.messaging.log import LogBatch, LogReader, Start
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.restaurants import Restaurant, find_restaurant, list_restaurants

log = structlog.get_logger(__name__)

# The log is read from this long before the load, so that it includes changes that neither store had yet.
_OVERLAP = timedelta(seconds=60)
_LOOK_AT_MIRROR_SECONDS = 1.0
"""The interval at which the menus look whether the mirror has turned warm. A mirror that was lost stays cold longer."""


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
        self._early: dict[str, dict[str, tuple[Head, MenuItem]]] = {}
        """Restaurant -> dish id -> dish from the log, for menus that are not loaded. The stores may not have had it."""
        self._attached = asyncio.Event()
        self._load_began = False
        self._load_at_mark = True
        self._load_due = asyncio.Event()
        self._mirror_was_warm = False
        self.loop = BackgroundLoop("menus", self._follow)
        self.load_loop = BackgroundLoop("menus-load", self._load_again)
        self.loaded = False

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        await self.load_loop.stop()
        await self.loop.stop()

    async def book(self, restaurant_id: str) -> MenuBook:
        """Returns the menu of a restaurant. Raises NotFound if there is none, Unavailable if neither store answers."""
        book = self._books.get(restaurant_id)
        if book is None:
            async with self._loading.setdefault(restaurant_id, asyncio.Lock()):
                book = self._books.get(restaurant_id)
                if book is None:
                    book = await self._load(restaurant_id)
                    for head, dish in self._early.pop(restaurant_id, {}).values():
                        book.put(head, dish)
                    self._books[restaurant_id] = book
            self._loading.pop(restaurant_id, None)
        return book

    def put(self, head: Head, dish: MenuItem) -> None:
        """Applies a dish that this instance has committed, without waiting for the log."""
        if (book := self._books.get(dish.restaurant_id)) is not None:
            book.put(head, dish)

    # -- loading -----------------------------------------------------------------------------------------------

    async def load_all(self, *, attach_seconds: float = 0.0) -> None:
        """Loads the menus of all restaurants. Waits at most `attach_seconds` until the reader has attached to the log,
        and then until a store answers."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(attach_seconds):
                await self._attached.wait()
        self._load_began = True
        self._mirror_was_warm = await self._mirror_is_warm()
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
        self.load_loop.start()

    async def _load_again(self) -> None:
        while True:
            # In this order: a mirror that turns warm after this look is seen by the next one.
            warm = await self._mirror_is_warm()
            if warm and not self._mirror_was_warm:
                self._load_due.set()
            self._mirror_was_warm = warm
            if self._load_due.is_set():
                self._load_due.clear()
                if not await self._update_all():
                    self._load_due.set()
                    await asyncio.sleep(_LOOK_AT_MIRROR_SECONDS)
            self.load_loop.turned()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AT_MIRROR_SECONDS):
                    await self._load_due.wait()

    async def _update_all(self) -> bool:
        """Loads all menus again, and puts the newer states into the books. Returns False if a menu cannot be loaded
        now."""
        ids = await self._known_restaurants()
        if ids is None:
            return False
        complete = True
        for restaurant_id in {*ids, *self._books}:
            try:
                found, book = await self._load(restaurant_id), await self.book(restaurant_id)
            except NotFound:
                continue
            except Unavailable as error:
                log.warning("menu_not_loaded", restaurant_id=restaurant_id, error=str(error))
                complete = False
                continue
            book.restaurant = found.restaurant
            for dish_id, head in found.heads.items():
                book.put(head, found.dishes[dish_id])
        log.info("menus_loaded_again", restaurants=len(self._books), complete=complete)
        return complete

    async def _mirror_is_warm(self) -> bool:
        try:
            return await self._mirror.is_warm()
        except (MirrorUnavailable, MirrorInDoubt):
            return False

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
        async with aclosing(self.reader.read(now() - _OVERLAP, fallbacks=self._fallbacks)) as batches:
            async for batch in batches:
                self._apply(batch)
                self._load_at_mark = self._load_at_mark or batch.broken is not None
                if batch.caught_up and self._load_at_mark:
                    self._load_at_mark = False
                    self._attached.set()
                    if self._load_began:
                        self._load_due.set()
                self.loop.turned()

    async def _fallbacks(self) -> Sequence[Start]:
        return (now() - _OVERLAP,)

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
            head, dish = change.head, registry.read(change)[1]
            if (book := self._books.get(change.restaurantid)) is not None:
                book.put(head, dish)
            else:
                early = self._early.setdefault(change.restaurantid, {})
                if dish.id not in early or head > early[dish.id][0]:
                    early[dish.id] = (head, dish)
        except BrokenContract as error:
            # The PostgreSQL writer dead-letters the change; the other dishes must still be updated.
            log.warning("menu_change_skipped", offset=offset, reason=error.reason, error=str(error))
