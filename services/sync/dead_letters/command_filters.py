"""The parts that the commands of `ticketrail dlq` share: the argument that names a dead letter, and filters that select
many."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import click
from msgspec import structs

from services.sync.command_options import Since
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.requests import DeadLetterFilter
from services.sync.dead_letters.store import DeadLetterQuery, FullDeadLetter
from services.sync.id_argument import RESTAURANT, IdArgument
from services.sync.operator_session import ask

DEAD_LETTER = IdArgument("dead letter", dead_letter_store.ids_between)


def filters(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--queue", help="the dead-letter queue"),
        click.option("--fingerprint", help="the fingerprint, as `dlq groups` shows it"),
        click.option("--reason", help="the reason, such as contract_broken"),
        click.option("--entity", help="the entity, such as order"),
        click.option("--restaurant", type=RESTAURANT, help="id, prefix of an id, or slug"),
        click.option("--status", type=click.Choice(dead_letter_store.STATUSES), multiple=True),
        click.option("--since", type=Since(), help="only failures since then: 90s, 15m, 2h, 7d, ISO 8601"),
        click.option("--text", help="a text in the error, the place or the body"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def query_of(status: Sequence[str], since: datetime | None, ids: Sequence[str] = (), **filters: Any) -> DeadLetterQuery:
    """Builds a query with the filter of the API. Unlike the API, the command line accepts several statuses."""
    filters["restaurant_id"] = filters.pop("restaurant")
    query = DeadLetterFilter(from_=since, **filters).query(tuple(ids))
    return structs.replace(query, statuses=tuple(status))


def counted(n: int, kind: str = "") -> str:
    return f"{n} {kind}dead letter{'' if n == 1 else 's'}"


def current(dead_letter: str) -> FullDeadLetter:
    """Returns the dead letter with its current revision, which the action must name."""
    found = ask(lambda connection: dead_letter_store.one(connection, dead_letter))
    if found is None:
        raise click.ClickException("no such dead letter")
    return found
