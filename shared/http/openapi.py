"""The OpenAPI 3.1 document of a service, made from the declarations of its routes. api_docs.py shows it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from shared.entities.contract import SyncState
from shared.entities.internal_fields import INTERNAL_FIELDS
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.endpoint import Operation, View
from shared.http.openapi_examples import example_of
from shared.security.permissions import ACTIONS, PUBLIC, scopes_for
from shared.version import VERSION

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+):\w+\}")
_ERRORS = {
    400: "The request cannot be read",
    401: "The token is missing or invalid",
    403: "The role may not do this",
    404: "It does not exist, or belongs to another restaurant",
    408: "The body did not arrive in time",
    409: "Another change came first, or the current state forbids this one",
    413: f"More than {MAX_BODY_BYTES} bytes",
    415: "The body has another Content-Encoding than gzip",
    422: "A field is invalid; `details.field` names it",
    429: "Too many requests; repeat after `Retry-After` seconds",
    500: "Something went wrong on our side",
    503: "Not done, and nothing of it will appear; repeat after `Retry-After` seconds",
    504: "The outcome is unknown; repeat with the same Idempotency-Key",
}
# An example of each error: (code, message, details).
_ERROR_EXAMPLES: dict[int, tuple[str, str, dict[str, Any]]] = {
    400: ("bad_request", "the request cannot be read", {}),
    401: ("token_expired", "the token has expired", {}),
    403: ("forbidden", "the role customer may not do this", {"action": "orders.change"}),
    404: ("not_found", "no such order", {}),
    408: ("request_timeout", "the body did not arrive in time", {}),
    409: ("version_conflict", "another change came first", {"field": "If-Match", "version": 3}),
    413: ("body_too_large", "Request Entity Too Large", {"field": "body", "max_bytes": MAX_BODY_BYTES}),
    415: (
        "unsupported_media_type",
        "the Content-Encoding must be gzip or absent",
        {"field": "Content-Encoding", "allowed": ["gzip"]},
    ),
    422: ("invalid_input", "Expected `int` >= 1", {"field": "items[0].quantity"}),
    429: ("rate_limited", "too many requests from this restaurant", {"limit": 10_000}),
    500: ("internal", "something went wrong on our side", {}),
    503: ("unavailable", "nothing can be changed until the mirror is warm; retry", {}),
    504: ("outcome_unknown", "the change was sent and not confirmed; it may appear", {}),
}
# Names from RFC 9110. Before version 3.13, Python has older names for these statuses.
_PHRASES = {413: "ContentTooLarge", 422: "UnprocessableContent"}
_LATER = "2026-03-14T12:45:00Z"
_EXAMPLE_TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
_SYNC = {
    "type": "object",
    "description": "The progress of the state towards PostgreSQL",
    "properties": {
        "state": {"enum": [state.value for state in SyncState]},
        "error": {"type": "string", "description": "the error of a failed write"},
        "attempts": {"type": "integer", "description": "the number of failed attempts"},
        "last_attempt": {"type": "string", "format": "date-time"},
    },
    "required": ["state"],
    "examples": [{"state": "pending"}],
}
_ERROR_HEADERS = {
    401: ("WWW-Authenticate",),
    415: ("Accept-Encoding",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}
_COMMON_REPLY_HEADERS = ("X-Request-Id", "X-Trace-Id", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
_REPLY_HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {
        "schema": {"type": "string"},
        "description": "The request's own X-Request-Id, or else the trace id",
    },
    "X-Trace-Id": {"schema": {"type": "string"}, "description": "The id for `ticketrail trace`"},
    "RateLimit-Limit": {"schema": {"type": "integer"}, "description": "The limit of the restaurant or the address"},
    "RateLimit-Remaining": {"schema": {"type": "integer"}, "description": "How many requests are left"},
    "RateLimit-Reset": {"schema": {"type": "integer"}, "description": "Seconds until the full limit is available"},
    "WWW-Authenticate": {"schema": {"const": "Bearer"}, "description": "How a client can authenticate"},
    "Accept-Encoding": {"schema": {"const": "gzip"}, "description": "The encodings of bodies that the service reads"},
    "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait before a repeat"},
    "ETag": {"schema": {"type": "string"}, "description": "The version, for If-Match and If-None-Match"},
    "Idempotency-Replayed": {"schema": {"const": "true"}, "description": "An earlier request with the same key did it"},
}
_TAG = '(W/)?"[!#-~]*"'
_REQUEST_HEADERS = {
    "Idempotency-Key": (
        "A request with the same key takes effect once, however often it is sent",
        {"type": "string", "pattern": "^[\\x21-\\x7e]{1,200}$"},
    ),
    "If-Match": (
        'The required version, such as "3", or a list of versions; 409 if the current version is none of them',
        {"type": "string", "pattern": f"^([*]|[0-9]+|{_TAG}( *, *{_TAG})*)$"},
    ),
    "If-None-Match": ("The version that the client has, or a list; 304 if it is current", {"type": "string"}),
    "Last-Event-ID": (
        "The cursor of the last received event; after another text, the stream begins with `resync`",
        {"type": "string"},
    ),
}
# Request headers that contain a secret other than the token, and the names of these secrets in the document.
_SECRET_HEADERS = {"x-sync-token": "sync_token"}


def operations(handlers: Iterable[HTTPRouteHandler]) -> list[tuple[str, str, Operation]]:
    """Returns (method, path, declaration) of the declared routes, sorted by path."""
    found = []
    for handler in handlers:
        operation = handler.opt.get("operation")
        if operation is not None:
            found += [(method, path, operation) for method in handler.http_methods for path in handler.paths]
    return sorted(found, key=lambda one: (one[1], one[0]))


class Api(Struct, frozen=True):
    """The routes of a service, and the title and description of its document."""

    title: str
    description: str
    handlers: Sequence[HTTPRouteHandler]


def document(api: Api) -> dict[str, Any]:
    """Returns the whole document of a service."""
    found = operations(api.handlers)
    types = [type_ for _, _, operation in found for type_ in _types(operation)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip([id(type_) for type_ in types], schemas, strict=True))
    for component in components.values():
        for internal in INTERNAL_FIELDS:
            component.get("properties", {}).pop(internal, None)
        if text := component.get("description"):
            component["description"] = " ".join(text.split())  # Python 3.13 and later indent docstrings differently
    components |= {"Error": _error_schema(), "Sync": _SYNC}
    # The route that creates an entity provides the example of the entity. Among the creating routes it is the first,
    # because its path is the shortest.
    example_by_entity: dict[Any, Any] = {}
    for _, _, operation in found:
        if operation.status == 201:
            example_by_entity.setdefault(_entity_of(operation), operation.reply_example or operation.example)
    paths: dict[str, dict[str, Any]] = {}
    for method, path, operation in found:
        paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = _operation(
            method,
            path,
            operation,
            schema_of,
            components,
            _reply_hint(method, path, operation, example_by_entity),
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": api.title,
            "version": VERSION,
            "description": api.description,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "headers": _REPLY_HEADERS,
            "responses": {_error_name(status): _error(status) for status in _ERRORS},
            "securitySchemes": _security_schemes(found),
        },
    }


def _reply_hint(method: str, path: str, operation: Operation, example_by_entity: Mapping[Any, Any]) -> Any:
    """Returns an example that resembles the reply. A change gives the state a later version and time."""
    entity = example_by_entity.get(_entity_of(operation))
    hint = operation.reply_example or (operation.example if entity is None else entity)
    if not isinstance(operation.answer, View) or operation.many or not isinstance(hint, dict):
        return hint
    changed = {"version": 2, "updated_at": _LATER}
    if method == "DELETE":
        return {**hint, **changed, "deleted_at": _LATER}
    if path.endswith("/restore"):
        return {**hint, **changed, "version": 3}
    if method == "PUT":
        return {**hint, **{name: value for name, value in operation.example.items() if name in hint}, **changed}
    return {**hint, **changed} if method == "POST" and operation.status != 201 else hint


def _entity_of(operation: Operation) -> Any:
    """Returns a key that identifies the content of the reply: the name of the entity, or the identity of the type."""
    return operation.answer.entity.name if isinstance(operation.answer, View) else id(operation.answer)


def _security_schemes(found: Iterable[tuple[str, str, Operation]]) -> dict[str, Any]:
    schemes: dict[str, Any] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "A JSON Web Token, or an API key"}
    }
    for name in sorted({name for _, _, operation in found for name in operation.headers if name in _SECRET_HEADERS}):
        schemes[_SECRET_HEADERS[name]] = {"type": "apiKey", "in": "header", "name": name}
    return schemes


def _types(operation: Operation) -> list[Any]:
    found = [one for one in (operation.body, operation.query) if one is not None]
    found += list(operation.paths.values())
    if isinstance(operation.answer, View):
        found += [operation.answer.entity.state, *operation.answer.more.values()]
    elif operation.answer is not None:
        found.append(operation.answer)
    return found


def _operation(
    method: str,
    path: str,
    operation: Operation,
    schema_of: Mapping[int, Any],
    components: Mapping[str, Any],
    hint: Any,
) -> dict[str, Any]:
    """Returns the description of one route. `hint`: an example that resembles the reply."""
    parameters: list[dict[str, Any]] = []
    for name in _PARAMETER.findall(path):
        type_ = operation.paths.get(name)
        schema = {"type": "string", "format": "uuid"} if type_ is None else schema_of[id(type_)]
        shown = example_of(schema, components, name=name)
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema, "example": shown})
    if operation.query is not None:
        parameters += _query_parameters(schema_of[id(operation.query)], components)
    secrets = [_SECRET_HEADERS[header] for header in operation.headers if header in _SECRET_HEADERS]
    for header in operation.headers:
        if header not in _SECRET_HEADERS:
            text, schema = _REQUEST_HEADERS[header]
            parameters.append(
                {"name": header, "in": "header", "required": False, "description": text, "schema": schema}
            )
    found: dict[str, Any] = {
        "operationId": _name(method, path),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(method, operation, schema_of, components, hint, bool(parameters)),
    }
    if text := " ".join(part for part in (operation.description, _callers(operation.action)) if part):
        found["description"] = text
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        content: dict[str, Any] = {"schema": schema_of[id(operation.body)]}
        if operation.example is not None:
            content["examples"] = {"example": {"value": operation.example}}
        found["requestBody"] = {"required": True, "content": {"application/json": content}}
    if operation.action != PUBLIC:
        secrets.append("bearer")
    if secrets:
        found["security"] = [{name: []} for name in secrets]  # one of them is enough
    return found


def _callers(action: str) -> str:
    """Returns who may do an action: the roles of tokens and the scopes of API keys."""
    if action == PUBLIC:
        return ""
    roles, scopes = ", ".join(sorted(ACTIONS[action])), ", ".join(scopes_for(action))
    return " ".join([*([f"For: {roles}."] if roles else []), *([f"API keys: {scopes}."] if scopes else [])])


def _name(method: str, path: str) -> str:
    parts = [part for part in re.split(r"[/{}:_-]", _PARAMETER.sub(r"by_\1", path)) if part and part != "api"]
    return method.lower() + "".join(part.capitalize() for part in parts)


def _query_parameters(schema: Mapping[str, Any], components: Mapping[str, Any]) -> list[dict[str, Any]]:
    fields = components[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    found = []
    for name, field in fields["properties"].items():
        field = dict(field)
        default = field.pop("default", None)
        description = field.pop("description", None)
        if "anyOf" in field:  # a query parameter is omitted instead of null
            rest = [one for one in field["anyOf"] if one != {"type": "null"}]
            field = {**rest[0]} if len(rest) == 1 else {"anyOf": rest}
            description = description or field.pop("description", None)
        if default is not None:
            field["default"] = default
        one = {"name": name, "in": "query", "required": name in fields.get("required", ()), "schema": field}
        found.append({**one, "description": description} if description else one)
    return found


def _responses(
    method: str,
    operation: Operation,
    schema_of: Mapping[int, Any],
    components: Mapping[str, Any],
    hint: Any,
    has_parameters: bool,
) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "Done", "headers": _headers(operation)}
    if operation.media_type != "application/json":
        schema = {"type": "string"} if operation.answer is None else schema_of[id(operation.answer)]
    elif operation.bare:
        schema = schema_of[id(operation.answer)]
    else:
        schema = _envelope(method, operation, schema_of, components)
    shown = example_of(schema, components, {"data": [hint] if operation.many else hint})
    ok["content"] = {operation.media_type: {"schema": schema, "examples": {"example": {"value": shown}}}}
    found: dict[str, Any] = {str(operation.status): ok}
    if operation.not_modified:
        found["304"] = {"description": "The client has the current version"}
    statuses = {400, 429, 500, 503, *operation.errors}
    if operation.action != PUBLIC:
        statuses |= {401, 403}
    if operation.body is not None:
        statuses |= {408, 413, 415, 422}
    if has_parameters:
        statuses.add(422)
    if isinstance(operation.answer, View) and method != "GET":
        statuses |= {409, 504}
    return found | {
        str(status): {"$ref": f"#/components/responses/{_error_name(status)}"} for status in sorted(statuses)
    }


def _error_name(status: int) -> str:
    """Returns the name of a status: 405 -> "MethodNotAllowed"."""
    return _PHRASES.get(status) or re.sub(r"\W", "", HTTPStatus(status).phrase.title())


def _error(status: int) -> dict[str, Any]:
    code, message, details = _ERROR_EXAMPLES[status]
    shown = {"message": message, "code": code, "details": details, "trace_id": _EXAMPLE_TRACE_ID}
    found: dict[str, Any] = {
        "description": _ERRORS[status],
        "content": {
            "application/json": {
                "schema": {"$ref": _REF.format(name="Error")},
                "examples": {"example": {"value": {"success": False, "error": shown}}},
            }
        },
    }
    names = [*_COMMON_REPLY_HEADERS, *_ERROR_HEADERS.get(status, ())]
    found["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return found


def _headers(operation: Operation) -> dict[str, Any]:
    found = list(_COMMON_REPLY_HEADERS)
    if isinstance(operation.answer, View) and not operation.many:
        found.append("ETag")
    if "Idempotency-Key" in operation.headers:
        found.append("Idempotency-Replayed")
    return {name: {"$ref": f"#/components/headers/{name}"} for name in found}


def _envelope(
    method: str, operation: Operation, schema_of: Mapping[int, Any], components: Mapping[str, Any]
) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if isinstance(operation.answer, View):
        data = _view(operation.answer, schema_of, components, part=operation.many, written=method != "GET")
    elif operation.answer is not None:
        data = schema_of[id(operation.answer)]
    properties: dict[str, Any] = {"success": {"const": True}, "data": data}
    required = ["success", "data"]
    if operation.many:
        properties["data"] = {"type": "array", "items": data}
        properties["pagination"] = {
            "type": "object",
            "properties": {"limit": {"type": "integer"}, "next_cursor": {"type": ["string", "null"]}},
            "required": ["limit", "next_cursor"],
        }
        properties["complete"] = {
            "type": "boolean",
            "description": "false: a store is unavailable or not filled yet, so that entries may be missing",
        }
        required.append("pagination")
    return {"type": "object", "properties": properties, "required": required}


def _view(
    view: View, schema_of: Mapping[int, Any], components: Mapping[str, Any], *, part: bool, written: bool
) -> dict[str, Any]:
    """Returns the schema of a View. `part`: the View is an entry of a list, where the parameter `fields` may choose
    some fields. `written`: the View is the reply to a write."""
    state = schema_of[id(view.entity.state)]
    ours: dict[str, Any] = {
        "version": {"type": "integer", "minimum": 1},
        "sync": {"$ref": _REF.format(name="Sync")},
        **{name: schema_of[id(type_)] for name, type_ in view.more.items()},
    }
    if part:
        whole = components[state["$ref"].rpartition("/")[2]]
        return {"type": "object", "properties": {**whole["properties"], **ours}, "required": ["id"]}
    if written:
        ours["visible"] = {"type": "boolean", "description": "whether readers see the change already"}
        ours["durability"] = {"enum": ["broker", "journal"], "description": "where the change is stored durably"}
    return {"allOf": [state, {"type": "object", "properties": ours, "required": ["version", "sync"]}]}


# Without it, generated clients would have a type without fields.
_DETAILS = {
    "properties": {
        "field": {"type": "string", "description": "the field, parameter or header that is wrong"},
        "allowed": {"type": "array", "items": {}, "description": "the values that are allowed"},
    },
    "additionalProperties": True,
}


def _error_schema() -> dict[str, Any]:
    class Error(Struct):
        message: str
        code: str
        details: Annotated[dict[str, Any], Meta(extra_json_schema=_DETAILS)]
        trace_id: str

    _, components = msgspec.json.schema_components([Error], ref_template=_REF)
    return {
        "type": "object",
        "properties": {"success": {"const": False}, "error": components["Error"]},
        "required": ["success", "error"],
    }
