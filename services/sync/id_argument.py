"""Arguments that are ids: a whole id, or the beginning of an id if it is unique.

A whole id is used without asking the database. A restaurant can also be given by its slug.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import click

from services.sync.operator_session import ask
from shared.postgres.pool import Connection

Candidate = tuple[str, str]
"""(id, short description)"""
FindIds = Callable[[Connection, UUID, UUID, int], Awaitable[Sequence[Candidate]]]
"""(connection of the ops role, first id, last id, limit) -> candidates whose ids are from the first to the last one, in
order."""

MIN_PREFIX_CHARS = 4
_MAX_LISTED = 10
_SHAPE = re.compile(r"[0-9a-f]{0,8}(-[0-9a-f]{0,4}){0,3}(-[0-9a-f]{0,12})?|[0-9a-f]{0,32}")

_RESTAURANTS_BETWEEN = "select id::text, slug from restaurants where id between $1 and $2 order by id limit $3"
_BY_SLUG = "select id::text from restaurants where slug = $1"
_SLUGS = "select id::text, slug from restaurants where id = any($1::uuid[])"


class IdArgument(click.ParamType[str]):
    """A UUID, or a unique beginning of it with at least four characters. `what`: the owner of the id, such as
    "dead letter"."""

    name = "id"

    def __init__(self, what: str, find: FindIds) -> None:
        self._what = what
        self._find = find

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if ctx is not None and ctx.resilient_parsing:
            return str(value)
        return full_id(str(value), self._what, self._find)


class RestaurantArgument(IdArgument):
    """An IdArgument for a restaurant, which also accepts a slug."""

    def __init__(self) -> None:
        super().__init__("restaurant", _restaurants_between)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip()
        if not text:
            self.fail("it is empty; give an id, the beginning of an id, or a slug", param, ctx)
        if whole_id(text) is None and not (ctx is not None and ctx.resilient_parsing):
            found = ask(lambda connection: connection.fetchval(_BY_SLUG, text))
            if found is not None:
                return str(found)
            if prefix_range(text) is None:
                raise click.ClickException(f"no restaurant has the slug {text}")
        return super().convert(value, param, ctx)


def full_id(text: str, what: str, find: FindIds, *, argument: str | None = None) -> str:
    """Returns the id that equals `text` or begins with it. `argument`: the name of the argument for the error, if click
    does not convert this argument itself. Raises BadParameter if no id can begin with `text`, and
    ClickException if no id or several ids begin with it."""
    if (whole := whole_id(text)) is not None:
        return whole
    if (bounds := prefix_range(text)) is None:
        raise click.BadParameter(
            f"{text!r} is neither an id nor the beginning of an id, which needs at least {MIN_PREFIX_CHARS} hexadecimal"
            " digits",
            param_hint=f"'{argument}'" if argument else None,
        )
    return only_candidate(text, what, ask(lambda connection: find(connection, *bounds, _MAX_LISTED + 1)))


def whole_id(text: str) -> str | None:
    """Returns the canonical form of a whole UUID, or None if `text` is not one."""
    try:
        return str(UUID(text)) if len(text) in (32, 36) else None
    except ValueError:
        return None


def prefix_range(text: str) -> tuple[UUID, UUID] | None:
    """Returns (first, last) of the ids that begin with `text`, or None if no id can begin with it. Pure."""
    text = text.lower()
    digits = text.replace("-", "")
    if len(digits) < MIN_PREFIX_CHARS or len(digits) > 32 or not _SHAPE.fullmatch(text):
        return None
    first, last = UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))
    return (first, last) if text == digits or str(first).startswith(text) else None


def only_candidate(text: str, what: str, candidates: Sequence[Candidate]) -> str:
    """Returns the id of the only candidate. Raises ClickException if there is none, or if there are several, which the
    message lists."""
    if not candidates:
        raise click.ClickException(f"no {what} has an id that begins with {text}")
    if len(candidates) == 1:
        return candidates[0][0]
    lines = "".join(f"\n  {id_}  {description}" for id_, description in candidates[:_MAX_LISTED])
    more = "\n  … and more" if len(candidates) > _MAX_LISTED else ""
    raise click.ClickException(f"more than one {what} has an id that begins with {text}:{lines}{more}")


async def restaurant_slugs(connection: Connection, ids: Sequence[str]) -> dict[str, str]:
    """Returns restaurant id -> slug."""
    return {row["id"]: row["slug"] for row in await connection.fetch(_SLUGS, list(ids))}


async def _restaurants_between(connection: Connection, first: UUID, last: UUID, limit: int) -> list[Candidate]:
    return [tuple(row) for row in await connection.fetch(_RESTAURANTS_BETWEEN, first, last, limit)]


RESTAURANT = RestaurantArgument()
