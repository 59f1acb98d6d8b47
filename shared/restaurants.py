"""Restaurants: plain rows in PostgreSQL, without changes. The mirror has a copy, so that the orders service can price
orders while PostgreSQL is unavailable."""

from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4
from zoneinfo import ZoneInfo

import asyncpg
import msgspec
from msgspec import Meta, Struct

from shared.entities.contract import SENTENCE
from shared.errors import InvalidInput
from shared.http.texts import END, Country, Currency, Label

if TYPE_CHECKING:
    from shared.postgres.pool import Connection

_COLUMNS = "id::text, slug, name, currency, time_zone, cutoff_hour, tax_basis_points, email, settings::text as settings"
_INSERT = (
    "insert into restaurants (id, slug, name, currency, time_zone, cutoff_hour, tax_basis_points, email, settings)"
    " values ($1, $2, $3, $4, $5, $6, $7, $8, $9::text::jsonb)"
)
_ALL = f"select {_COLUMNS} from restaurants"  # noqa: S608  (a constant)


class RestaurantSettings(Struct, frozen=True):
    country: Annotated[str, Meta(pattern="^[A-Z]{2}$", max_length=2, examples=["DE"])] | None = None
    """The ISO 3166 code of the country to which a phone number without a country code belongs."""
    minor_units_per_point: Annotated[int, Meta(ge=1, le=10**6)] = 100
    """The payment that gives one loyalty point, in minor units."""


class NewRestaurantSettings(RestaurantSettings, frozen=True, forbid_unknown_fields=True):
    country: Country | None = None


Slug = Annotated[
    str,
    Meta(
        pattern=rf"^[a-z0-9](?:[a-z0-9-]{{0,48}}[a-z0-9])?{END}",
        extra={SENTENCE: "must have 1 to 50 lower-case letters, digits or hyphens, and no hyphen at its ends"},
    ),
]


class NewRestaurant(Struct, kw_only=True, forbid_unknown_fields=True):
    """`tax_basis_points`: 500 means 5 %. A sale before `cutoff_hour` belongs to the previous business day."""

    name: Label
    slug: Slug
    currency: Currency = "EUR"
    time_zone: Label = "UTC"
    cutoff_hour: Annotated[int, Meta(ge=0, le=23)] = 4
    tax_basis_points: Annotated[int, Meta(ge=0, le=10_000)] = 500
    admin_name: Label | None = None
    settings: NewRestaurantSettings = NewRestaurantSettings()


class Restaurant(Struct, frozen=True, kw_only=True):
    id: str
    slug: str
    name: str
    currency: str = "EUR"
    time_zone: str = "UTC"
    cutoff_hour: int = 4
    tax_basis_points: int = 500
    email: str | None = None
    settings: RestaurantSettings = RestaurantSettings()

    @classmethod
    def of(cls, new: NewRestaurant, *, email: str) -> "Restaurant":
        """Returns a new restaurant with an id of its own."""
        fields = {name: getattr(new, name) for name in NewRestaurant.__struct_fields__ if name != "admin_name"}
        return cls(id=str(uuid4()), email=email, **fields)

    def business_day(self, at: datetime) -> date:
        """Returns the business day of a time. Before the cutoff hour this is the previous day."""
        return (at.astimezone(ZoneInfo(self.time_zone)) - timedelta(hours=self.cutoff_hour)).date()


def _restaurant(row: asyncpg.Record) -> Restaurant:
    return Restaurant(**{**row, "settings": msgspec.json.decode(row["settings"], type=RestaurantSettings)})


async def insert_restaurant(connection: "Connection", restaurant: Restaurant) -> None:
    """Adds a row. Raises asyncpg's UniqueViolationError for a slug in use, and InvalidInput for a time zone that the
    database does not know."""
    try:
        await connection.execute(
            _INSERT,
            restaurant.id,
            restaurant.slug,
            restaurant.name,
            restaurant.currency,
            restaurant.time_zone,
            restaurant.cutoff_hour,
            restaurant.tax_basis_points,
            restaurant.email,
            msgspec.json.encode(restaurant.settings).decode(),
        )
    except asyncpg.InvalidParameterValueError as error:
        raise InvalidInput("not a known time zone; an example is Europe/Berlin", field="time_zone") from error


async def list_restaurants(connection: "Connection") -> list[Restaurant]:
    return [_restaurant(row) for row in await connection.fetch(_ALL)]


async def find_restaurant(connection: "Connection", restaurant_id: str) -> Restaurant | None:
    row = await connection.fetchrow(f"{_ALL} where id = $1", restaurant_id)
    return _restaurant(row) if row else None


async def find_restaurant_by_slug(connection: "Connection", slug: str) -> Restaurant | None:
    row = await connection.fetchrow(f"{_ALL} where slug = $1", slug)
    return _restaurant(row) if row else None
