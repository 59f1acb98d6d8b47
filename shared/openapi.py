"""The OpenAPI 3.1 document of a service, out of the declarations of its routes, and the page that shows it.

The page is Swagger UI from files of our own: nothing is loaded from elsewhere.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import msgspec
from litestar import MediaType, Response, get
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from shared.api import Operation, View
from shared.http import MAX_BODY_BYTES
from shared.permissions import ACTIONS, PUBLIC

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+):\w+\}")
_FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
_ERRORS = {
    400: "The request cannot be read",
    401: "No token, or one that is not valid",
    403: "This role may not do it",
    404: "There is none, or it is another restaurant's",
    409: "Another change came first, or the present state forbids this one",
    410: "Gone",
    413: f"More than {MAX_BODY_BYTES} bytes",
    422: "A field is wrong; `details.field` names it",
    429: "Too many requests; `Retry-After` says when",
    500: "Something went wrong on our side",
    503: "Not done, and nothing of it will appear; `Retry-After` says when",
    504: "Perhaps done: repeat with the same Idempotency-Key",
}
_HEADER_TEXTS = {
    "Idempotency-Key": "A repeat with the same key is the same one, however often it is sent",
    "If-Match": 'The version that is to be changed, such as "3"; otherwise 409',
    "If-None-Match": "The version that is known already; answered with 304",
    "Last-Event-ID": "The cursor of the last event that was seen",
    "x-sync-token": "The shared secret of the other system",
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<link rel="icon" href="/api-docs/files/favicon-32x32.png">
<link rel="stylesheet" href="/api-docs/files/swagger-ui.css">
</head>
<body>
<div id="page"></div>
<script src="/api-docs/files/swagger-ui-bundle.js"></script>
<script src="/api-docs/files/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "/api-docs/openapi.json",
  dom_id: "#page",
  deepLinking: true,
  persistAuthorization: true,
  validatorUrl: null,
});
"""
# Swagger UI sets styles of its own on elements, and carries its icons as data.
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self';"
    " connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def operations(handlers: Iterable[HTTPRouteHandler]) -> list[tuple[str, str, Operation]]:
    """(method, path, declaration) of those that are declared."""
    found = []
    for handler in handlers:
        operation = handler.opt.get("operation")
        if operation is not None:
            found += [(method, path, operation) for method in handler.http_methods for path in handler.paths]
    return sorted(found, key=lambda one: (one[1], one[0]))


def document(title: str, version: str, description: str, handlers: Iterable[HTTPRouteHandler]) -> dict[str, Any]:
    found = operations(handlers)
    types = [type_ for _, _, operation in found for type_ in _types(operation)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip([id(type_) for type_ in types], schemas, strict=True))
    for component in components.values():
        component.get("properties", {}).pop("request_hash", None)
    paths: dict[str, dict[str, Any]] = {}
    for method, path, operation in found:
        paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = _operation(
            method, path, operation, schema_of, components
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": version,
            "description": description,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _error_schema()},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _types(operation: Operation) -> list[Any]:
    found = [one for one in (operation.body, operation.query) if one is not None]
    found += list(operation.paths.values())
    if isinstance(operation.answer, View):
        found += [operation.answer.entity.state, *operation.answer.more.values()]
    elif operation.answer is not None:
        found.append(operation.answer)
    return found


def _operation(
    method: str, path: str, operation: Operation, schema_of: Mapping[int, Any], components: Mapping[str, Any]
) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = []
    for name in _PARAMETER.findall(path):
        type_ = operation.paths.get(name)
        schema = {"type": "string", "format": "uuid"} if type_ is None else schema_of[id(type_)]
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema})
    if operation.query is not None:
        parameters += _query_parameters(schema_of[id(operation.query)], components)
    for header in operation.headers:
        parameters.append(
            {
                "name": header,
                "in": "header",
                "required": False,
                "description": _HEADER_TEXTS[header],
                "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,200}$"},
            }
        )
    found: dict[str, Any] = {
        "operationId": _name(method, path),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(method, operation, schema_of, bool(parameters)),
    }
    who = "" if operation.action == PUBLIC else f"For: {', '.join(sorted(ACTIONS[operation.action]))}."
    if text := " ".join(part for part in (operation.description, who) if part):
        found["description"] = text
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        content: dict[str, Any] = {"schema": schema_of[id(operation.body)]}
        if operation.example is not None:
            content["examples"] = {"example": {"value": operation.example}}
        found["requestBody"] = {"required": True, "content": {"application/json": content}}
    if operation.action != PUBLIC:
        found["security"] = [{"bearer": []}]
    return found


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
        if "anyOf" in field:  # absent instead of null
            rest = [one for one in field["anyOf"] if one != {"type": "null"}]
            field = {**rest[0]} if len(rest) == 1 else {"anyOf": rest}
            description = description or field.pop("description", None)
        if default is not None:
            field["default"] = default
        one = {"name": name, "in": "query", "required": name in fields.get("required", ()), "schema": field}
        found.append({**one, "description": description} if description else one)
    return found


def _responses(method: str, operation: Operation, schema_of: Mapping[int, Any], takes: bool) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "Done", "headers": _headers(operation)}
    if operation.media_type != "application/json":
        ok["content"] = {operation.media_type: {"schema": {"type": "string"}}}
    elif operation.status != 204:
        ok["content"] = {"application/json": {"schema": _envelope(operation, schema_of)}}
    found: dict[str, Any] = {str(operation.status): ok}
    if operation.not_modified:
        found["304"] = {"description": "It is the version that is known"}
    statuses = {400, 429, 500, 503, *operation.errors}
    if operation.action != PUBLIC:
        statuses |= {401, 403}
    if operation.body is not None:
        statuses |= {413, 422}
    if takes:
        statuses.add(422)
    if isinstance(operation.answer, View) and method != "GET":
        statuses |= {409, 504}
    for status in sorted(statuses):
        error: dict[str, Any] = {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        if status in (429, 503):
            error["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}
        found[str(status)] = error
    return found


def _headers(operation: Operation) -> dict[str, Any]:
    text = {"schema": {"type": "string"}}
    found = {"X-Request-Id": text, "X-Trace-Id": text}
    if isinstance(operation.answer, View) and not operation.many:
        found["ETag"] = {**text, "description": "The version"}  # type: ignore[dict-item]
    return found


def _envelope(operation: Operation, schema_of: Mapping[int, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if isinstance(operation.answer, View):
        data = _view(operation.answer, schema_of, part=operation.many)
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
        properties["complete"] = {"type": "boolean", "description": "false: only what the mirror holds of late"}
        required.append("pagination")
    return {"type": "object", "properties": properties, "required": required}


def _view(view: View, schema_of: Mapping[int, Any], *, part: bool) -> dict[str, Any]:
    """`part`: of lists, where `fields` may choose some."""
    sync = {
        "type": "object",
        "properties": {"state": {"enum": ["pending", "synced", "failed"]}},
        "required": ["state"],
    }
    more: dict[str, Any] = {
        "version": {"type": "integer", "minimum": 1},
        "sync": sync,
        "visible": {"type": "boolean", "description": "after a write: whether readers see it already"},
        "durability": {"enum": ["broker", "journal"], "description": "after a write: what holds it"},
        **{name: schema_of[id(type_)] for name, type_ in view.more.items()},
    }
    if part:
        return {
            "type": "object",
            "properties": {"id": {"type": "string", "format": "uuid"}, **more},
            "required": ["id"],
        }
    ours = {"type": "object", "properties": more, "required": ["version", "sync"]}
    return {"allOf": [schema_of[id(view.entity.state)], ours]}


def _error_schema() -> dict[str, Any]:
    class Error(Struct):
        message: str
        code: str
        details: dict[str, Any]
        trace_id: str

    _, components = msgspec.json.schema_components([Error], ref_template=_REF)
    return {
        "type": "object",
        "properties": {"success": {"const": False}, "error": components["Error"]},
        "required": ["success", "error"],
    }


def pages(title: str, description: str, handlers: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """`/api-docs` and `/api-docs/openapi.json`."""
    encoded = msgspec.json.encode(document(title, "1.0.0", description, handlers))
    page = _PAGE.format(title=title)

    @get("/api-docs", sync_to_thread=False)
    def show() -> Response[str]:
        return Response(page, media_type=MediaType.HTML, headers={"Content-Security-Policy": _CSP})

    @get("/api-docs/openapi.json", sync_to_thread=False)
    def as_json() -> Response[bytes]:
        return Response(encoded, media_type=MediaType.JSON)

    @get("/api-docs/files/{name:str}", sync_to_thread=False)
    def file(name: str) -> Response[bytes]:
        if name == "start.js":
            return Response(_START.encode(), media_type="text/javascript")
        if name not in _FILES:
            raise NotFoundException("no such file")
        # Read when it is asked for: 2 MB that a service which nobody looks at need not hold.
        content = (resources.files("swagger_ui") / "static" / name).read_bytes()
        return Response(content, media_type=_FILES[name], headers={"Cache-Control": "max-age=86400"})

    return [show, as_json, file]
