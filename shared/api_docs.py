"""The page that shows a service's API, and what it loads.

It is Swagger UI from files of our own: nothing is loaded from elsewhere.
"""

from importlib import resources

import msgspec
from litestar import MediaType, Response, get
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler

from shared.openapi import Api, document

_FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
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
# Behind the gateway each service's page has a path of its own.
_START = """SwaggerUIBundle({
  url: location.pathname.replace(/[/]+$/, "") + "/openapi.json",
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


def pages(api: Api) -> list[HTTPRouteHandler]:
    """`/api-docs` and `/api-docs/openapi.json`."""
    encoded = msgspec.json.encode(document(api))
    page = _PAGE.format(title=api.title)

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
