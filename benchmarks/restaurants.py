"""Creates the 50 restaurants that every benchmark uses, with their menus and the tokens of their staff."""

import json
from uuid import NAMESPACE_URL, uuid5

import asyncpg
from msgspec import Struct

from benchmarks.created_changes import created
from services.sync.writer.upsert import DecodedChange, write_batch
from shared.entities import menu_item
from shared.entities.contract import Lane, now
from shared.entities.menu_item import MenuItem
from shared.security.tokens import Identity, Role, Tokens

_RESTAURANTS = 50
_DISHES = 12
_TAX_BASIS_POINTS = 700
_TOKEN_TTL_SECONDS = 24 * 3600
_MENU_TIMEOUT_SECONDS = 5.0
"""The time limit for writing the menu of one restaurant."""
_INSERT = (
    "insert into restaurants (id, slug, name, currency, time_zone, cutoff_hour, tax_basis_points)"
    " values ($1, $2, $3, 'EUR', 'Europe/Berlin', 4, $4)"
)


class SeededRestaurant(Struct, frozen=True):
    id: str
    token: str
    """Access token of a staff account."""
    menu_item_ids: list[str]
    table_id: str


async def seed(database_url: str, secret: str) -> tuple[list[SeededRestaurant], bytes]:
    """Writes the restaurants and their menus into PostgreSQL, and signs their tokens with `secret`.

    Returns the restaurants, and the same restaurants, dishes and secret as JSON for the peers.
    """
    tokens = Tokens(secret, ttl_seconds=_TOKEN_TTL_SECONDS)
    seeded, descriptions = [], []
    async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        for number in range(_RESTAURANTS):
            id_ = _id("restaurant", number)
            await connection.execute(_INSERT, id_, f"bench-{number}", f"Restaurant {number}", _TAX_BASIS_POINTS)
            dishes = [(_id("dish", number, place), f"Dish {place}", 500 + 75 * place) for place in range(_DISHES)]
            async with connection.transaction():
                await write_batch(
                    connection, [_dish(id_, *dish) for dish in dishes], timeout_seconds=_MENU_TIMEOUT_SECONDS
                )
            token = tokens.issue(Identity(_id("user", number), Role.STAFF, id_, "bench@example.org"))
            seeded.append(SeededRestaurant(id_, token, [dish for dish, _, _ in dishes], _id("table", number)))
            descriptions.append({"id": id_, "dishes": [list(dish) for dish in dishes]})
    return seeded, json.dumps({"restaurants": descriptions, "secret": secret}).encode()


def _dish(restaurant: str, id_: str, name: str, price: int) -> DecodedChange:
    """Returns the change that an import of the menu would have recorded. `price` is in minor units."""
    at = now()
    dish = MenuItem(
        id=id_, restaurant_id=restaurant, name=name, price=price, category="Mains", created_at=at, updated_at=at
    )
    return DecodedChange(Lane.NORMAL, menu_item.ENTITY, created(menu_item.ENTITY, dish, source="import"), dish)


def _id(*names: object) -> str:
    return str(uuid5(NAMESPACE_URL, "/".join(map(str, ("ticketrail-bench", *names)))))
