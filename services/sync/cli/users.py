"""`ticketrail user`: adds users of every role, sets passwords, and deactivates users. No admin can add operators
through the API, or shut them out."""

import sys

import click
from msgspec import Struct

from services.sync.cli.user_accounts import add_user, set_active, set_password
from services.sync.command_session import connected, run
from services.sync.id_argument import RESTAURANT
from shared.http.bodies import read_fields
from shared.http.texts import Label
from shared.security.tokens import Role
from shared.settings import Settings


class _Named(Struct):
    name: Label | None = None


@click.group("user")
def user_command() -> None:
    """Add users, above all operators, set passwords, and deactivate users. A command that needs a password asks for it
    in a terminal, and otherwise reads it from standard input."""


@user_command.command("add")
@click.argument("email")
@click.option("--role", type=click.Choice([role.value for role in Role]), default="operator", show_default=True)
@click.option("--restaurant", type=RESTAURANT, help="id, prefix of an id, or slug; not for operators")
@click.option("--name")
def add_command(email: str, role: str, restaurant: str | None, name: str | None) -> None:
    """Add a user and print its id."""
    if (Role(role) is Role.OPERATOR) is (restaurant is not None):
        raise click.UsageError("every role except operator needs --restaurant; operator must not have it")

    async def add() -> str:
        async with connected(settings, settings.database_writer_url) as connection:
            return await add_user(
                connection,
                email=email,
                role=Role(role),
                password=password,
                restaurant=restaurant,
                name=named.name or "",
            )

    settings, named = Settings.load(), read_fields({"name": name}, _Named)
    password = read_password()
    click.echo(run(add()))


@user_command.command("password")
@click.argument("email")
def password_command(email: str) -> None:
    """Set the password of a user and end all sessions of the user."""

    async def change() -> None:
        async with connected(settings, settings.database_writer_url) as connection:
            await set_password(connection, email, password)

    settings, password = Settings.load(), read_password()
    run(change())


@user_command.command("deactivate")
@click.argument("email")
def deactivate_command(email: str) -> None:
    """Deactivate a user: within seconds every service refuses all its tokens, and its event streams end."""
    _set_active(email, active=False)


@user_command.command("activate")
@click.argument("email")
def activate_command(email: str) -> None:
    """Activate a user that was deactivated."""
    _set_active(email, active=True)


def _set_active(email: str, *, active: bool) -> None:
    async def change() -> None:
        async with connected(settings, settings.database_writer_url) as connection:
            await set_active(connection, email, active=active)

    settings = Settings.load()
    run(change())


def read_password() -> str:
    """Asks for a password in a terminal, and otherwise reads a line of standard input."""
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\n")


COMMANDS = (user_command,)
