"""`ticketrail orders`: finds orders by number, id or the beginning of an id. `ticketrail trace` uses this module too.

The search reads PostgreSQL. An order that is not there yet can be found only by its whole id.
"""

import re
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any
from uuid import UUID

import click
from msgspec import Struct

from services.sync.command_options import OrderName, WholeNumber
from services.sync.command_output import TableColumn, ago, json_option, print_json, print_table
from services.sync.id_argument import RESTAURANT, only_candidate, prefix_range, whole_id
from services.sync.operator_session import ask
from shared.postgres.pool import Connection

_NUMBER_DIGITS = 4
_NUMBER = re.compile("([A-Za-z]{0,2})([0-9]+)")
_MAX_CANDIDATES = 11

# Selects per restaurant, so that the indexes on (restaurant, created at) and (restaurant, id) are used.
_SELECT = """
select o.id::text, o.order_number, r.id::text as restaurant_id, r.slug as restaurant, o.business_day, o.status,
    o.total, o.currency, o.created_at
from restaurants r cross join lateral (
    select * from orders where orders.restaurant_id = r.id and {condition}
    order by created_at desc, id desc limit $2
) o
where $1::uuid is null or r.id = $1
order by o.created_at desc, o.id desc limit $2
"""
_NEWEST = _SELECT.format(condition="deleted_at is null")
_BY_NUMBER = _SELECT.format(condition="order_number = any($3::text[])")
_BETWEEN = _SELECT.format(condition="id between $3 and $4")

_COLUMNS = (
    TableColumn("number", "id"),
    TableColumn("id", "id"),
    TableColumn("restaurant", "text", optional=1),
    TableColumn("day", optional=2),
    TableColumn("status", optional=3),
    TableColumn("total", optional=4, right=True),
    TableColumn("created", optional=5),
)


class OrderMatch(Struct, frozen=True, kw_only=True):
    id: str
    order_number: str
    restaurant_id: str
    restaurant: str
    """The slug of the restaurant."""
    business_day: date
    status: str
    total: int
    """The total in minor units."""
    currency: str
    created_at: datetime


@click.command("orders")
@click.argument("order", required=False, type=OrderName())
@click.option("--restaurant", type=RESTAURANT, help="id, prefix of an id, or slug")
@click.option("--limit", type=WholeNumber(1, 10_000), default=20, show_default=True)
@json_option
def orders_command(order: str | None, restaurant: str | None, limit: int, as_json: bool) -> None:
    """List the newest orders, or those that ORDER names: a number, an id, or the beginning of an id."""
    found = ask(lambda connection: find_orders(connection, order, restaurant, limit=limit))
    if as_json:
        print_json(found)
        return
    if order is not None and not found:
        raise click.ClickException(_unknown(order))
    rows = [
        (
            match.order_number,
            match.id,
            match.restaurant,
            match.business_day.isoformat(),
            match.status,
            f"{match.total} {match.currency}",
            ago(match.created_at),
        )
        for match in found
    ]
    print_table(_COLUMNS, rows)
    click.echo(
        f"{len(found)} order{'' if len(found) == 1 else 's'}"
        + (" (there may be more: --limit)" if len(found) == limit else "")
    )


async def find_orders(
    connection: Connection, order: str | None, restaurant: str | None, *, limit: int
) -> list[OrderMatch]:
    """Returns the orders that match, newest first. `order`: a number, an id or the beginning of an id; None for all
    orders. A text that is both a number and the beginning of an id counts as a number. `restaurant`: an id, or None for
    all restaurants. `connection`: a connection of the ops role."""
    if order is None:
        return _matches(await connection.fetch(_NEWEST, restaurant, limit))
    if (whole := whole_id(order)) is None:
        found = _matches(await connection.fetch(_BY_NUMBER, restaurant, limit, _numbers(order)))
        if found:
            return found
    bounds = (UUID(whole), UUID(whole)) if whole else prefix_range(order)
    return _matches(await connection.fetch(_BETWEEN, restaurant, limit, *bounds)) if bounds else []


def order_id_of(text: str, restaurant: str | None) -> str:
    """Returns the id of the order that `text` names. If several orders of one restaurant have this number, returns the
    newest one and says so on standard error. Raises ClickException if no order matches, or if orders of several
    restaurants match."""
    if (whole := whole_id(text)) is not None:
        return whole
    found = ask(lambda connection: find_orders(connection, text, restaurant, limit=_MAX_CANDIDATES))
    if not found:
        raise click.ClickException(_unknown(text))
    if found[0].order_number not in _numbers(text):
        return only_candidate(text, "order", [(match.id, _description(match)) for match in found])
    if len({match.restaurant_id for match in found}) > 1:
        lines = "".join(f"\n  {match.id}  {_description(match)}" for match in found)
        raise click.ClickException(f"several restaurants have an order {text}; choose one with --restaurant:{lines}")
    newest = found[0]
    if len(found) > 1:
        click.echo(f"several orders have this number; the newest is {newest.id}, {_description(newest)}", err=True)
    return newest.id


def _numbers(text: str) -> list[str]:
    """Returns the order numbers that `text` may mean: 42 may mean 0042, and a43 may mean A0043."""
    found = _NUMBER.fullmatch(text)
    padded = [found[1].upper() + found[2].zfill(_NUMBER_DIGITS)] if found else []
    return [text, text.upper(), *padded]


def _description(match: OrderMatch) -> str:
    return f"{match.order_number} of {match.business_day} at {match.restaurant}, {match.status}"


def _unknown(text: str) -> str:
    return (
        f"no order in PostgreSQL has the number {text} or an id that begins with {text}; an order that is not in"
        " PostgreSQL yet can be found only by its whole id"
    )


def _matches(rows: Sequence[Any]) -> list[OrderMatch]:
    return [OrderMatch(**row) for row in rows]


COMMANDS = (orders_command,)
