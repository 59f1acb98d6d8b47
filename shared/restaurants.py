"""Restaurants: plain rows in PostgreSQL, without changes. The mirror has a copy, so that the orders service can price
orders while PostgreSQL is unavailable."""

from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Meta, Struct

if TYPE_CHECKING:
    import asyncpg

    from shared.postgres.pool import Connection

_COLUMNS = "id::text, slug, name, currency, time_zone, cutoff_hour, tax_basis_points, email, settings::text as settings"
_ALL = f"select {_COLUMNS} from restaurants"  # noqa: S608  (a constant)


class RestaurantSettings(Struct, frozen=True):
    country: Annotated[str, Meta(pattern="^[A-Z]{2}$", max_length=2, examples=["DE"])] | None = None
    """The ISO 3166 code of the country to which a phone number without a country code belongs."""
    minor_units_per_point: Annotated[int, Meta(ge=1, le=10**6)] = 100
    """The payment that gives one loyalty point, in minor units."""


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

    def business_day(self, at: datetime) -> date:
        """Returns the business day of a time. Before the cutoff hour this is the previous day."""
        return (at.astimezone(ZoneInfo(self.time_zone)) - timedelta(hours=self.cutoff_hour)).date()


def _restaurant(row: "asyncpg.Record") -> Restaurant:
    return Restaurant(**{**row, "settings": msgspec.json.decode(row["settings"], type=RestaurantSettings)})


async def list_restaurants(connection: "Connection") -> list[Restaurant]:
    return [_restaurant(row) for row in await connection.fetch(_ALL)]


async def find_restaurant(connection: "Connection", restaurant_id: str) -> Restaurant | None:
    row = await connection.fetchrow(f"{_ALL} where id = $1", restaurant_id)
    return _restaurant(row) if row else None


async def find_restaurant_by_slug(connection: "Connection", slug: str) -> Restaurant | None:
    row = await connection.fetchrow(f"{_ALL} where slug = $1", slug)
    return _restaurant(row) if row else None
