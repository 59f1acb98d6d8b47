"""Creates the demo restaurant: a menu, tables and one user for each role. A second seeding adds no change to the log.

Users are plain rows in PostgreSQL. Dishes and tables are committed as changes through the rail. All ids are derived
from names, so that a second seeding finds the entities of the first one.
"""

import contextlib
import hashlib
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from services.sync.cli.user_accounts import add_user, token_epoch
from shared.entities import menu_item, table
from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.entities.menu_item import MenuItem
from shared.entities.table import DiningTable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Connection, Postgres
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Heads
from shared.rail.idempotency import Creations
from shared.rail.outcomes import ClaimLost, Committed
from shared.restaurants import Restaurant
from shared.security.api_key_text import derived_key
from shared.security.permissions import Scope
from shared.security.tokens import Identity, Role, Tokens

_NAMESPACE = uuid5(NAMESPACE_URL, "https://ticketrail.example/demo")

_RESTAURANT = Restaurant(
    id=str(uuid5(_NAMESPACE, "restaurant")), slug="demo-bistro", name="Demo Bistro", time_zone="Europe/Berlin"
)
_MENU = {
    "Starters": [
        ("Tomato soup", 620),
        ("Garlic bread", 450),
        ("Beetroot carpaccio", 890),
        ("Smoked trout", 1090),
        ("Green salad", 590),
        ("Onion tart", 790),
    ],
    "Mains": [
        ("Margherita", 980),
        ("Lasagne", 1290),
        ("Mushroom risotto", 1350),
        ("Roast chicken", 1590),
        ("Pike-perch with fennel", 1990),
        ("Rib-eye steak", 2890),
        ("Lentil curry", 1180),
        ("Cheese dumplings", 1240),
    ],
    "Desserts": [("Crème brûlée", 690), ("Apple strudel", 650), ("Lemon sorbet", 480), ("Chocolate cake", 720)],
    "Drinks": [
        ("Still water", 290),
        ("Sparkling water", 290),
        ("Elderflower spritz", 590),
        ("House red", 620),
        ("Pilsner", 430),
        ("Espresso", 260),
    ],
}
_TABLES = [("1", 2), ("2", 2), ("3", 4), ("4", 4), ("5", 4), ("6", 6), ("Window", 2), ("Terrace", 8)]
_USERS = {role: f"{role}@demo-bistro.example" for role in Role}

_INSERT_RESTAURANT = (
    "insert into restaurants (id, slug, name, currency, time_zone, cutoff_hour, tax_basis_points)"
    " values ($1, $2, $3, $4, $5, $6, $7) on conflict (id) do nothing"
)
_INSERT_TERMINAL = "insert into terminals (id, restaurant_id, name) values ($1, $2, $3) on conflict (id) do nothing"
_INSERT_KEY = (
    "insert into api_keys (id, restaurant_id, prefix, key_sha256, name, scopes, terminal_id, created_by)"
    " values ($1, $2, $3, $4, $5, $6, $7, 'seed') on conflict (id) do update"
    " set prefix = excluded.prefix, key_sha256 = excluded.key_sha256, revoked_at = null, revoked_by = null"
)
_TOKEN_SECONDS = 7 * 24 * 3600
_KEYS = {
    "terminal": (Scope.TERMINAL,),
    "sync": (Scope.SYNC_WRITE,),
    "web-shop": (Scope.MENU_READ, Scope.ORDERS_WRITE),
}


def _derived_secret(secret: str, purpose: str, length: int) -> str:
    return "demo-" + hashlib.sha256(f"{secret}/{purpose}".encode()).hexdigest()[:length]


def _id(*names: str) -> str:
    return str(uuid5(_NAMESPACE, "/".join(names)))


class Seeder:
    def __init__(self, postgres: Postgres, mirror: Mirror, rail: Rail, tokens: Tokens) -> None:
        """`postgres`: a pool of the writer role. The API keys and the users' password of the demo are derived from
        the key that signs tokens, so every seeding gives the same ones. Raises BadKey if `tokens` can only verify."""
        secret = tokens.derived_secret("demo").hex()
        self._postgres = postgres
        self._mirror = mirror
        self._heads = Heads(mirror, lambda _: postgres.connection())
        self._creations = Creations(rail, self._heads)
        self._tokens = tokens
        self._keys = {name: derived_key(secret, f"demo-{name}") for name in _KEYS}
        self._password = _derived_secret(secret, "demo-password", 20)

    async def seed(self) -> dict[str, Any]:
        """Creates the demo restaurant. Returns the ids and tokens that a script needs to use it."""
        restaurant, terminal = _RESTAURANT, _id("terminal")
        async with self._postgres.connection() as connection:
            await self._insert_accounts(connection, restaurant, terminal)
            epochs = {role: await token_epoch(connection, _id("user", role)) for role in Role}
        # If this fails, the mirror writer adds the restaurant the next time that it fills the mirror.
        with contextlib.suppress(MirrorUnavailable, MirrorInDoubt):
            await self._mirror.keep_restaurant(restaurant.id, encode(restaurant))
        at = datetime(2026, 1, 1, tzinfo=UTC)
        dishes = [
            MenuItem(
                id=_id("dish", name),
                restaurant_id=restaurant.id,
                name=name,
                price=price,
                category=category,
                created_at=at,
                updated_at=at,
            )
            for category, dishes in _MENU.items()
            for name, price in dishes
        ]
        tables = [
            DiningTable(
                id=_id("table", label),
                restaurant_id=restaurant.id,
                label=label,
                seats=seats,
                created_at=at,
                updated_at=at,
            )
            for label, seats in _TABLES
        ]
        created = sum([await self._create(menu_item.ENTITY, dish) for dish in dishes])
        created += sum([await self._create(table.ENTITY, dining_table) for dining_table in tables])
        return {
            "created": created,
            "restaurant_id": restaurant.id,
            "restaurant_slug": restaurant.slug,
            "tokens": {
                role.value: self._tokens.issue(self._identity_of(role), epoch=epochs[role], ttl_seconds=_TOKEN_SECONDS)
                for role in Role
            },
            "emails": {role.value: email for role, email in _USERS.items()},
            "password": self._password,
            "terminal": {"id": terminal, "api_key": self._keys["terminal"].text},
            "sync_token": self._keys["sync"].text,
            "web_shop_key": self._keys["web-shop"].text,
            "menu_item_ids": [dish.id for dish in dishes],
            "table_ids": [dining_table.id for dining_table in tables],
        }

    async def _insert_accounts(self, connection: Connection, restaurant: Restaurant, terminal: str) -> None:
        async with connection.transaction():
            await connection.execute(
                _INSERT_RESTAURANT,
                restaurant.id,
                restaurant.slug,
                restaurant.name,
                restaurant.currency,
                restaurant.time_zone,
                restaurant.cutoff_hour,
                restaurant.tax_basis_points,
            )
            for role, email in _USERS.items():
                tenant = None if role is Role.OPERATOR else restaurant.id
                await add_user(
                    connection,
                    email=email,
                    role=role,
                    password=self._password,
                    restaurant=tenant,
                    name=f"Demo {role}",
                    id_=_id("user", role),
                )
            await connection.execute(_INSERT_TERMINAL, terminal, restaurant.id, "Demo terminal")
            for name, key in self._keys.items():
                of_terminal = terminal if name == "terminal" else None
                scopes = [scope.value for scope in _KEYS[name]]
                await connection.execute(
                    _INSERT_KEY,
                    _id("api-key", name),
                    restaurant.id,
                    key.prefix,
                    key.digest,
                    f"Demo {name}",
                    scopes,
                    of_terminal,
                )

    def _identity_of(self, role: Role) -> Identity:
        return Identity(
            user_id=_id("user", role),
            role=role,
            restaurant_id="" if role is Role.OPERATOR else _RESTAURANT.id,
            email=_USERS[role],
            session_id="demo-session" if role is Role.CUSTOMER else None,
        )

    async def _create(self, entity: Entity, state: Any) -> bool:
        """Creates the entity. Returns False if the entity exists already, in any version."""
        # The commit would accept the same creation again as a repeat of the first one, and publish it again.
        if await self._heads.earlier(entity, state.restaurant_id, state.id) is not None:
            return False
        draft = Draft(
            entity=entity,
            event="created",
            state=state,
            base=None,
            at=now(),
            source="import",
            keyed=True,
        )
        try:
            return isinstance(await self._creations.create(draft), Committed)
        except ClaimLost:
            return False
