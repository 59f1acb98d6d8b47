"""The declaration of a route: its action, input and reply. The authorization middleware, the OpenAPI document and the
tests of all routes read this declaration.

    @endpoint("POST", "/api/tables", action="tables.change", summary="Add a table", body=CreateTable, status=201,
              answer=View(table.ENTITY))
    async def create(request: Call) -> ASGIApp: ...
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from typing import Annotated, Any, TypeVar
from uuid import UUID

import msgspec
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct, field

from shared.entities.contract import SyncState, Time, in_range
from shared.entities.entity import Entity
from shared.errors import InvalidInput
from shared.http.field_rules import in_words
from shared.http.texts import tidied
from shared.security.permissions import ACTIONS

T = TypeVar("T")

MAX_LIMIT = 200
ANY_TEXT = "any text"
"""The key of `Meta.extra` for a query parameter that may have every character, because it is not stored."""
_ESCAPED_PLUS = re.compile(r"(T[0-9:.]+) ([0-9]{2}:?[0-9]{2})$")
_ERROR_PATH = re.compile(r" - at `\$?\.?(?P<path>[^`]*)`$")


class View(Struct, frozen=True):
    """A state as clients see it: its fields, `version`, `sync`, and after a write `visible` and `durability`."""

    entity: Entity
    more: Mapping[str, Any] = field(default_factory=dict)
    """Derived fields: name -> type."""


class Operation(Struct, frozen=True, kw_only=True):
    action: str
    """One of `shared.security.permissions.ACTIONS`."""
    summary: str
    tag: str
    description: str = ""
    body: Any = None
    query: Any = None
    """A Struct of query parameters, decoded from texts."""
    answer: Any = None
    """Type of `data`, or a View. For an event stream: the type of one event."""
    many: bool = False
    """`data` is a list of `answer`, with `pagination`."""
    bare: bool = False
    """The reply is `answer` alone, without the envelope."""
    status: int = 200
    errors: tuple[int, ...] = ()
    """Error statuses in addition to those that openapi.py lists for every route of this kind."""
    example: Any = None
    """An example of the body. The reply's example has its values, too."""
    reply_example: Any = None
    """An example of `data`, or of one entry of a list, if the example of the body is not enough."""
    headers: tuple[str, ...] = ()
    """Request headers that the route reads, such as Idempotency-Key."""
    media_type: str = "application/json"
    paths: Mapping[str, Any] = field(default_factory=dict)
    """Path parameters that are not UUIDs: name -> type."""
    not_modified: bool = False


class ListQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT)] = 50
    cursor: Annotated[str, Meta(max_length=200, description="next_cursor of the previous page")] | None = None
    fields: (
        Annotated[str, Meta(max_length=1_000, description="names separated by commas; id is always included")] | None
    ) = None
    include_deleted: Annotated[bool, Meta(description="only for admins")] = False
    created_from: Time | None = None
    created_to: Time | None = None
    sync_state: Annotated[SyncState, Meta(description="only entities with this sync state")] | None = None


def endpoint(method: str, path: str, **declared: Any) -> Callable[[Any], HTTPRouteHandler]:
    """Returns a decorator that declares a route. `declared`: the fields of Operation. Raises ValueError for an unknown
    action."""
    operation = Operation(**declared)
    if operation.action not in ACTIONS:
        raise ValueError(f"{method} {path}: no action {operation.action!r} in shared/security/permissions.py")
    return HTTPRouteHandler(
        path, http_method=[HttpMethod(method)], status_code=operation.status, opt={"operation": operation}
    )


def read_query(request: Any, type_: type[T]) -> T:
    """Returns the query parameters as a Struct. A parameter may be repeated if its field is a list. Raises InvalidInput
    with the name of the parameter."""
    names = _parameters(type_)  # type: ignore[arg-type]  # a type is hashable
    given: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        text = _ESCAPED_PLUS.sub(r"\1+\2", str(text))
        if name not in names:
            raise InvalidInput(f"unknown parameter; known parameters: {', '.join(names)}", field=name)
        if names[name].many:
            given.setdefault(name, []).append(text)
        elif name in given:
            raise InvalidInput("given twice; the parameter takes one value", field=name)
        else:
            given[name] = text
    try:
        found = tidied(msgspec.convert(given, type_, strict=False))
    except msgspec.ValidationError as error:
        message = str(error)
        path = where["path"] if (where := _ERROR_PATH.search(message)) else "query"
        message, details = in_words(_ERROR_PATH.sub("", message), path, type_)
        raise InvalidInput(message, field=path.partition("[")[0], **details) from error
    for name in given:
        value = getattr(found, names[name].field)
        if value is None:  # the text `null` would silently remove a filter
            raise InvalidInput("null is not a value; omit the parameter", field=name)
        # Without a colon it is a number, which msgspec accepts as a time.
        if isinstance(value, datetime) and (":" not in given[name] or not in_range(value)):
            raise InvalidInput(
                "must be a time with a zone, from 1970 to 2200, such as 2026-03-01T12:00:00Z", field=name
            )
        for one in value if names[name].many else (value,):
            if (
                isinstance(one, str)
                and not names[name].any_text
                and ("\x00" in one or any("\ud800" <= char <= "\udfff" for char in one))
            ):
                raise InvalidInput("contains characters that cannot be stored", field=name)
    return found


class _Parameter(Struct, frozen=True):
    field: str
    many: bool
    any_text: bool


@cache
def _parameters(type_: Any) -> dict[str, _Parameter]:
    """Returns the query parameters by name, as clients send it."""
    info = msgspec.inspect.type_info(type_)
    assert isinstance(info, msgspec.inspect.StructType)
    return {one.encode_name: _Parameter(one.name, _is_list(one.type), _takes_any_text(one.type)) for one in info.fields}


def _takes_any_text(node: msgspec.inspect.Type) -> bool:
    return isinstance(node, msgspec.inspect.Metadata) and ANY_TEXT in (node.extra or {})


def _is_list(node: msgspec.inspect.Type) -> bool:
    match node:
        case msgspec.inspect.Metadata():
            return _is_list(node.type)
        case msgspec.inspect.UnionType():
            return any(map(_is_list, node.types))
    return isinstance(node, msgspec.inspect.CollectionType)


def path_id(text: str, name: str) -> str:
    """Returns a UUID of the path in lower case. Raises InvalidInput."""
    try:
        return str(UUID(text))
    except ValueError as error:
        raise InvalidInput("must be a UUID", field=name) from error
