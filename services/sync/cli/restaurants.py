"""`ticketrail restaurant`: adds restaurants where registration is closed, and makes invitations."""

import getpass

import click

from services.sync.cli.user_accounts import add_invitation, add_restaurant
from services.sync.cli.users import read_password
from services.sync.command_options import WholeNumber
from services.sync.command_session import connected, run
from shared.http.bodies import read_fields
from shared.restaurants import NewRestaurant, Restaurant
from shared.security.emails import read_email
from shared.settings import Settings

_INVITATION_DAYS = 14


@click.group("restaurant")
def restaurant_command() -> None:
    """Add restaurants, and invite others to register one."""


@restaurant_command.command("add")
@click.argument("slug")
@click.option("--email", required=True, help="the email of the first admin")
@click.option("--name", help="the name of the restaurant  [default: SLUG]")
@click.option("--admin-name")
@click.option("--currency", default="EUR", show_default=True)
@click.option("--time-zone", default="UTC", show_default=True)
@click.option("--cutoff-hour", type=WholeNumber(0, 23), default=4, show_default=True)
@click.option("--tax-basis-points", type=WholeNumber(0, 10_000), default=500, show_default=True, help="500 means 5 %")
@click.option("--country", help="two letters, such as DE, for phone numbers without a country code")
def add_command(slug: str, email: str, name: str | None, country: str | None, **terms: object) -> None:
    """Add the restaurant SLUG and its first admin, and print its id.

    The command asks for the admin's password in a terminal, and otherwise reads it from standard input."""

    settings = Settings.load()
    new = read_fields(
        {"name": slug if name is None else name, "slug": slug, "settings": {"country": country}, **terms}, NewRestaurant
    )
    restaurant = Restaurant.of(new, email=read_email(email))
    password = read_password()

    async def add() -> str:
        async with connected(settings, settings.database_writer_url) as connection:
            await add_restaurant(connection, restaurant, email=email, name=new.admin_name or "", password=password)
        return restaurant.id

    click.echo(run(add()))


@restaurant_command.command("invite")
@click.option("--days", type=WholeNumber(1, 365), default=_INVITATION_DAYS, show_default=True)
def invite_command(days: int) -> None:
    """Print a code that registers one restaurant, for the field `invitation_code`."""

    async def invite() -> str:
        async with connected(settings, settings.database_writer_url) as connection:
            return await add_invitation(connection, days=days, maker=getpass.getuser())

    settings = Settings.load()
    click.echo(run(invite()))


COMMANDS = (restaurant_command,)
