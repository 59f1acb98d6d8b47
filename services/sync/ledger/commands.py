"""`ticketrail ledger`: where every accepted change is, and which changes are nowhere."""

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

from services.sync.command_options import Since
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
@click.option("--since", type=Since(), default="1h", show_default=True, help="90s, 15m, 2h, 7d, or a time in ISO 8601")
@click.option("--all", "everything", is_flag=True, help="from the beginning of the change log")
@click.option("--watch", is_flag=True, help="repeat until Ctrl-C")
@click.option(
    "--interval", type=click.FloatRange(0.2, 3_600), default=2.0, show_default=True, help="seconds, for --watch"
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object; with --watch one per line")
@click.option("--timeout", type=click.FloatRange(0), help="seconds after which a missing change is unexplained")
def ledger_command(
    since: datetime, everything: bool, watch: bool, interval: float, as_json: bool, timeout: float | None
) -> None:
    """Show where every accepted change is: accepted = synced + queued + retrying + journaled + dead + unexplained.

    Exit code 1 if a change is unexplained, 2 if the balance cannot be taken."""
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
                        balance = await ledger.look()
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
    """Prints lines instead of drawing a screen."""

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
    # A table that does not fit is wider than the terminal, because a cut id or figure is worth nothing.
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
    lines += [Text(_named(one), "bold red") for one in balance.missing[:_MAX_LISTED]]
    if len(balance.missing) > _MAX_LISTED:
        lines.append(Text(f"… and {len(balance.missing) - _MAX_LISTED} more; --json names all", "bold red"))
    if balance.suspects:
        lines.append(
            Text(f"{balance.suspects} of the queued were not found anywhere; the ledger still searches for them")
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
    for one in balance.mirror_only[:_MAX_LISTED]:
        lines.append(Text(f"hint: only the mirror shows change {one.change_id} of {one.subject}, as pending", "yellow"))
    if balance.away:
        lines.append(Text(f"unavailable: {', '.join(balance.away)}", "yellow"))
    if balance.restarted:
        lines.append(Text("the change log was created again; only later changes are counted", "yellow"))
    return Group(table, *lines)


def _figures(count: Count) -> list[Text]:
    figures = [Text(str(getattr(count, name))) for name in _COLUMNS]
    if count.unexplained:
        figures[-1].stylize("bold red")
    return figures


def _window(balance: Balance) -> str:
    begin = "the beginning of the log" if balance.since is None else _utc(balance.since)
    if balance.until is None:
        return f"from {begin}; no heartbeat has come out of every lane yet"
    return f"from {begin}; the last heartbeat out of every lane is of {_utc(balance.until)}"


def _utc(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _named(one: Missing) -> str:
    at = f" accepted {_utc(one.accepted_at)}" if one.accepted_at else ""
    where = "" if one.seen_in == "log" else f", from {one.seen_in}"
    after = f"; its successor {one.successor} is written" if one.successor else ""
    return (
        f"unexplained: change {one.change_id} of {one.subject} version {one.version}, {one.lane},{at}{where},"
        f" trace {one.trace_id or '-'}{after}"
    )


COMMANDS = (ledger_command,)
