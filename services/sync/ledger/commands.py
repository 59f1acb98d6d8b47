"""`ticketrail ledger`: shows the place of every accepted change, and the changes that are in no place."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.sync.command_options import Number, Since
from services.sync.command_output import console
from services.sync.command_session import run
from services.sync.ledger.balance import Balance, Count, Missing
from services.sync.ledger.ledger import Ledger, take_balance
from shared.entities.contract import encode
from shared.errors import Unavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.rail.assemble import mirror_of
from shared.settings import Settings

_COLUMNS = ("accepted", "synced", "queued", "retrying", "journaled", "dead", "unexplained")
_MAX_LISTED = 50
_EXIT_UNAVAILABLE = 2


@click.command("ledger")
@click.option(
    "--since",
    type=Since(),
    default="1h",
    show_default=True,
    help="the moment to count from: 90s, 15m, 2h, 7d, or a time in ISO 8601",
)
@click.option("--all", "everything", is_flag=True, help="count from the beginning of the change log")
@click.option("--watch", is_flag=True, help="repeat until Ctrl-C")
@click.option(
    "--interval",
    type=Number(0.2, 3_600),
    default=2.0,
    show_default=True,
    help="seconds between two balances, for --watch",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object; with --watch one per line")
@click.option("--timeout", type=Number(0, 31_536_000), help="seconds after which a missing change is unexplained")
def ledger_command(
    since: datetime, everything: bool, watch: bool, interval: float, as_json: bool, timeout: float | None
) -> None:
    """Show the place of every accepted change: accepted = synced + queued + retrying + journaled + dead + unexplained.

    The exit code is 1 if a change is unexplained, and 2 if the balance cannot be taken."""
    start = None if everything else since
    try:
        if watch:
            balance = _watch(start, interval, as_json, timeout)
        else:
            balance = run(_once(start, timeout))
            _show(balance, as_json)
    except click.ClickException as error:
        click.echo(f"Error: {error.message}", err=True)
        sys.exit(_EXIT_UNAVAILABLE)
    if balance is not None and balance.unexplained:
        sys.exit(1)


@asynccontextmanager
async def _backends() -> AsyncIterator[tuple[Settings, Postgres, Mirror]]:
    settings = Settings.load()
    postgres = Postgres(settings.database_ops_url, settings, size=2)
    mirror = mirror_of(settings)
    try:
        yield settings, postgres, mirror
    finally:
        await mirror.close()
        await postgres.close()


async def _once(since: datetime | None, timeout: float | None) -> Balance:
    async with _backends() as (settings, postgres, mirror):
        return await take_balance(settings, postgres, mirror, since=since, timeout_seconds=timeout)


def _watch(since: datetime | None, interval: float, as_json: bool, timeout: float | None) -> Balance | None:
    """Takes balances until Ctrl-C. Returns the last one."""
    last: list[Balance] = []

    async def watch() -> None:
        async with (
            _backends() as (settings, postgres, mirror),
            Ledger(settings, postgres, mirror, since=since, timeout_seconds=timeout) as ledger,
        ):
            with _Lines() if as_json else Live(console=console(), auto_refresh=False) as screen:
                while True:
                    try:
                        balance = await ledger.balance()
                    except Unavailable as error:
                        screen.update(Text(f"{error}; waiting", "bold yellow"), refresh=True)
                    else:
                        last[:] = [balance]
                        screen.update(encode(balance).decode() if as_json else _drawn(balance), refresh=True)
                    await asyncio.sleep(interval)

    with suppress(KeyboardInterrupt):
        run(watch())
    return last[0] if last else None


class _Lines:
    """A screen that prints each update as a line."""

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, line: Any, *, refresh: bool) -> None:
        click.echo(str(line), err=isinstance(line, Text))


def _show(balance: Balance, as_json: bool) -> None:
    if as_json:
        click.echo(encode(balance).decode())
        return
    drawn = _drawn(balance)
    # A table that does not fit becomes wider than the terminal, because a cut id or figure is useless.
    console(min_columns=console().measure(drawn.renderables[0]).maximum).print(drawn)


def _drawn(balance: Balance) -> Group:
    table = Table(box=None, pad_edge=False)
    table.add_column("restaurant", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for restaurant in balance.restaurants:
        table.add_row(restaurant.slug or restaurant.restaurant_id or "(none)", *_figures(restaurant))
    table.add_row("all", *_figures(balance), style="bold")
    lines = [Text(_window(balance))]
    lines += [Text(_missing_line(missing), "bold red") for missing in balance.missing[:_MAX_LISTED]]
    if len(balance.missing) > _MAX_LISTED:
        lines.append(Text(f"… and {len(balance.missing) - _MAX_LISTED} more; --json lists all of them", "bold red"))
    if balance.suspects:
        lines.append(
            Text(f"{balance.suspects} of the queued changes were not found; the ledger still searches for them")
        )
    if balance.dead_outcomes:
        lines.append(Text("dead: " + ", ".join(f"{n} {what}" for what, n in sorted(balance.dead_outcomes.items()))))
    for name, count in balance.journals.items():
        if count:
            lines.append(Text(f"{count} in {name}"))
    if balance.unreadable:
        lines.append(
            Text(f"{balance.unreadable} events in the log have no valid change id; they are among the dead letters")
        )
    for missing in balance.mirror_only[:_MAX_LISTED]:
        lines.append(
            Text(f"hint: only the mirror shows change {missing.change_id} of {missing.subject}, as pending", "yellow")
        )
    if balance.unavailable:
        lines.append(Text(f"unavailable: {', '.join(balance.unavailable)}", "yellow"))
    if balance.restarted:
        lines.append(Text("the change log lost its end; only the changes that it still has are counted", "yellow"))
    return Group(table, *lines)


def _figures(count: Count) -> list[Text]:
    figures = [Text(str(getattr(count, name))) for name in _COLUMNS]
    if count.unexplained:
        figures[-1].stylize("bold red")
    return figures


def _window(balance: Balance) -> str:
    begin = "the beginning of the log" if balance.since is None else _utc(balance.since)
    if balance.until is None:
        return f"from {begin}; not every lane has delivered a heartbeat yet"
    return f"from {begin}; every lane has delivered the heartbeats until {_utc(balance.until)}"


def _utc(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _missing_line(missing: Missing) -> str:
    at = f" accepted {_utc(missing.accepted_at)}" if missing.accepted_at else ""
    where = "" if missing.seen_in == "log" else f", from {missing.seen_in}"
    after = f"; its successor {missing.successor} is written" if missing.successor else ""
    return (
        f"unexplained: change {missing.change_id} of {missing.subject} version {missing.version},"
        f" {missing.lane},{at}{where}, trace {missing.trace_id or '-'}{after}"
    )


COMMANDS = (ledger_command,)
