"""The command `ticketrail`, for operators and scripts. Each command connects, does its work and prints the result."""

import asyncio
import contextlib
import json
import time
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import click
from aio_pika.abc import AbstractConnection
from rich.live import Live

from services.sync.cli import journal, orders, restaurants, status_screen, users, waterfall
from services.sync.cli.menu import dishes_between, edit_dish
from services.sync.cli.orders import order_id_of
from services.sync.cli.seed import Seeder
from services.sync.cli.trace_search import find_traces
from services.sync.cli.user_accounts import note_token, revoke_token, users_between
from services.sync.command_options import Number, OrderName, WholeNumber
from services.sync.command_output import console
from services.sync.command_session import CommandSession, refusal, run
from services.sync.command_system import ASKS_FOR_HELP, follow_system, system_label
from services.sync.conflicts import commands as conflict_commands
from services.sync.dead_letters import commands as dead_letter_commands
from services.sync.id_argument import RESTAURANT, IdArgument, full_id
from services.sync.imports import commands as import_commands
from services.sync.ledger import commands as ledger_commands
from services.sync.maintenance import commands as maintenance_commands
from services.sync.mirror import commands as mirror_commands
from shared.entities.contract import encode
from shared.errors import TicketrailError
from shared.messaging import asyncapi, declare
from shared.messaging.management import make_service_users, make_watcher
from shared.messaging.recovery import BrokerNotReady, until_ready, when_ready
from shared.postgres.migrate import migrate
from shared.security.tokens import Identity, Role, Tokens
from shared.settings import Settings
from shared.settings_loading import SettingsError
from shared.version import VERSION

_BROKER_READY_SECONDS = 60.0
_MANAGEMENT_READY_SECONDS = 10.0


class _Commands(click.Group):
    """A command group that reports an invalid setting or argument in one sentence, for every command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise click.ClickException(str(error)) from None
        except TicketrailError as error:
            raise refusal(error) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        ctx.meta[ASKS_FOR_HELP] = bool({"-h", "--help"} & set(args))
        return super().resolve_command(ctx, args)


@click.group("ticketrail", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="ticketrail")
@click.option("--system", "requested", metavar="PATH|NAME", help="the system of `make run` to connect to")
@click.pass_context
def main(context: click.Context, requested: str | None) -> None:
    """Ticketrail: the order backbone of restaurants and points of sale."""
    follow_system(context, requested)


@main.command("migrate")
def migrate_command() -> None:
    """Create or update the schema in PostgreSQL and the queues in RabbitMQ. The command can be repeated."""
    run(migrate_servers(Settings.load()))


async def migrate_servers(settings: Settings) -> None:
    """Creates or updates the schema in PostgreSQL and the queues in RabbitMQ, and prints what it did. It can be
    repeated."""
    applied = await migrate(settings)
    click.echo(f"schema: {', '.join(applied) if applied else 'up to date'}")
    created = await when_ready(
        settings.rabbitmq_url, lambda broker: _declare_topology(broker, settings), within=_BROKER_READY_SECONDS
    )
    click.echo(f"topology: {'change log created' if created else 'up to date'}")
    if settings.rabbitmq_service_urls:
        # Unlike the read-only user below, the services need these users.
        await until_ready(
            lambda: asyncio.to_thread(
                make_service_users, settings.rabbitmq_management_url, settings.rabbitmq_service_urls
            ),
            within=_BROKER_READY_SECONDS,
            what="the management API of RabbitMQ",
        )
        click.echo(f"users of RabbitMQ: {', '.join(settings.rabbitmq_service_urls)}")
    if settings.rabbitmq_management_url:
        try:
            await until_ready(
                lambda: asyncio.to_thread(
                    make_watcher, settings.rabbitmq_management_url, settings.rabbitmq_watcher_url, settings.rabbitmq_url
                ),
                within=_MANAGEMENT_READY_SECONDS,
                what="the management API of RabbitMQ",
            )
        except BrokerNotReady as error:  # without the read-only user, operators see depths but no rates
            click.echo(f"{error}: its read-only user was not created", err=True)


async def _declare_topology(broker: AbstractConnection, settings: Settings) -> bool:
    """Declares the exchange, the queues and the logs. Returns whether the change log was created."""
    await declare.declare(broker, settings)
    created = not await declare.log_exists(broker)
    await declare.declare_logs(broker, settings)
    return created


@main.command("seed")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def seed_command(as_json: bool) -> None:
    """Create the demo restaurant: a menu, tables and a user for each role. The command can be repeated."""
    settings = Settings.load()
    seeded = run(_seed(settings))
    if as_json:
        click.echo(json.dumps(seeded))
    else:
        click.echo(
            f"{seeded['restaurant_slug']}: {seeded['created']} created; it has {len(seeded['menu_item_ids'])} dishes"
        )
        click.echo(f"and {len(seeded['table_ids'])} tables; restaurant id {seeded['restaurant_id']}")


async def _seed(settings: Settings) -> dict[str, Any]:
    tokens = Tokens.of(settings)
    async with CommandSession(settings) as session:
        seeder = Seeder(session.postgres, session.mirror, session.rail, tokens)
        return await seeder.seed()


@main.command("token")
@click.option("--role", type=click.Choice([role.value for role in Role]), default="staff", show_default=True)
@click.option("--restaurant", type=RESTAURANT, help="id, prefix of an id, or slug; not for operators")
@click.option("--user", type=IdArgument("user", users_between), help="id of the user, or its prefix; default: a new id")
@click.option("--email", default="")
@click.option("--session", help="id of the customer's session")
@click.option("--revoke", "revoked", type=click.UUID, metavar="ID", help="revoke a token by the id printed with it")
def token_command(
    role: str, restaurant: str | None, user: str | None, email: str, session: str | None, revoked: UUID | None
) -> None:
    """Print a token that the services accept, for at most 24 hours. The audit notes it, and --revoke ends it."""
    settings = Settings.load()
    if revoked is not None:
        run(revoke_token(settings, str(revoked)))
        return
    identity = Identity(user or str(uuid4()), Role(role), restaurant or "", email, session)
    if identity.role is not Role.OPERATOR and restaurant is None:
        raise click.UsageError("every role except operator needs --restaurant")
    if identity.role is Role.CUSTOMER and not session:
        raise click.UsageError("the role customer needs --session")
    tokens = Tokens.of(settings)
    tokens.require_signing()
    epoch, family = run(note_token(settings, identity))
    click.echo(f"token {family}; revoke it with: ticketrail token --revoke {family}", err=True)
    click.echo(tokens.issue(identity, epoch=epoch, family=family))


@main.command("dish")
@click.argument("restaurant", type=RESTAURANT)
@click.argument("dish")
@click.option("--price", type=WholeNumber(0, 10**12), help="the price in minor units")
@click.option("--available/--unavailable", default=None, help="whether guests can order the dish")
def dish_command(restaurant: str, dish: str, price: int | None, available: bool | None) -> None:
    """Change a dish: its price, or whether guests can order it.

    RESTAURANT is an id, the beginning of an id, or a slug; DISH is an id or the beginning of one."""
    if price is None and available is None:
        raise click.UsageError("give --price, --available or --unavailable")
    dish_id = full_id(dish, "dish", partial(dishes_between, restaurant), argument="DISH")
    changed = run(_edit_dish(Settings.load(), restaurant, dish_id, price, available))
    click.echo(changed.decode())


async def _edit_dish(
    settings: Settings, restaurant: str, dish: str, price: int | None, available: bool | None
) -> bytes:
    async with CommandSession(settings) as session:
        return await edit_dish(
            session.postgres, session.mirror, session.rail, restaurant, dish, price=price, available=available
        )


@main.command("status")
@click.option("--watch", is_flag=True, help="repeat until Ctrl-C")
@click.option("--interval", type=Number(0.2, 60), default=2.0, show_default=True, help="seconds")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def status_command(watch: bool, interval: float, as_json: bool) -> None:
    """Show the state of every service: rates, lags, depths, retries, connections."""
    urls = status_screen.urls_of(Settings.load())
    system = system_label()
    if not as_json:
        click.echo(f"system: {system}")
    before = status_screen.sample_services(urls)
    if not watch:
        time.sleep(min(interval, 1.0))
        found = status_screen.facts(before, status_screen.sample_services(urls))
        if as_json:
            click.echo(encode({"system": system, **found}).decode())
        else:
            console().print(status_screen.screen(found))
        return
    with Live(status_screen.screen({}), auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(interval)
            after = status_screen.sample_services(urls)
            live.update(status_screen.screen(status_screen.facts(before, after)), refresh=True)
            before = after


@main.command("trace")
@click.argument("order", type=OrderName())
@click.option("--restaurant", type=RESTAURANT, help="the restaurant if ORDER is a number: id, prefix of an id, or slug")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def trace_command(order: str, restaurant: str | None, as_json: bool) -> None:
    """Show the trace of each change of ORDER, with the time that it waited in queues.

    ORDER is an order number, an id, or the beginning of an id."""
    order_id = order_id_of(order, restaurant)
    found = run(find_traces(Settings.load(), order_id))
    if not (found.changes or found.dead_letters or found.spans):
        for text in found.missing:
            click.echo(text, err=True)
        raise click.ClickException(
            "this order has no change, no dead letter and no trace; `ticketrail ledger` counts changes that are not in"
            " PostgreSQL yet"
        )
    if as_json:
        click.echo(encode(waterfall.as_json(order_id, found)).decode())
    else:
        screen = console()
        screen.print(waterfall.render(order_id, found, screen.width))


@main.command("asyncapi")
def asyncapi_command() -> None:
    """Print the AsyncAPI document of all events and queues."""
    click.echo(json.dumps(asyncapi.document(Settings.load()), indent=2, ensure_ascii=False))


for command in (
    *conflict_commands.COMMANDS,
    *dead_letter_commands.COMMANDS,
    *import_commands.COMMANDS,
    *journal.COMMANDS,
    *ledger_commands.COMMANDS,
    *maintenance_commands.COMMANDS,
    *mirror_commands.COMMANDS,
    *orders.COMMANDS,
    *restaurants.COMMANDS,
    *users.COMMANDS,
):
    main.add_command(command)
