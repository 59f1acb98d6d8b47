"""`ticketrail user`: operators, and people of a restaurant, where no admin can add them through the API."""

import sys
from typing import Any

import click

from services.sync.cli.user_accounts import add_user, set_password
from services.sync.command_session import connected, run
from shared.security.tokens import Role
from shared.settings import Settings

_SHORTEST = 10


@click.group("user")
def user_command() -> None:
    """Add users, operators above all, and set passwords. Passwords are asked for, or read from standard input."""


@user_command.command("add")
@click.argument("email")
@click.option("--role", type=click.Choice([role.value for role in Role]), default="operator", show_default=True)
@click.option("--restaurant", type=click.UUID, help="id of the restaurant; operators have none")
@click.option("--name", default="")
def add_command(email: str, role: str, restaurant: Any, name: str) -> None:
    """Add a user and print its id."""
    if (Role(role) is Role.OPERATOR) is (restaurant is not None):
        raise click.UsageError("--restaurant is needed for all roles but operator, which has none")
    if "@" not in email:
        raise click.UsageError("EMAIL is no address")

    async def add() -> str:
        async with connected(settings, settings.database_writer_url) as connection:
            return await add_user(
                connection,
                email=email,
                role=Role(role),
                password=password,
                restaurant=str(restaurant) if restaurant else None,
                name=name,
            )

    settings, password = Settings.load(), _password()
    click.echo(run(add()))


@user_command.command("password")
@click.argument("email")
def password_command(email: str) -> None:
    """Set a user's password, and end all its sessions."""

    async def change() -> None:
        async with connected(settings, settings.database_writer_url) as connection:
            await set_password(connection, email, password)

    settings, password = Settings.load(), _password()
    run(change())


def _password() -> str:
    if sys.stdin.isatty():
        found = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        found = sys.stdin.readline().rstrip("\n")
    if len(found) < _SHORTEST:
        raise click.UsageError(f"a password has {_SHORTEST} characters at least")
    return str(found)


COMMANDS = (user_command,)
