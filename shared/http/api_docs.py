"""The documentation page of a service's API, and the files that it loads.

The page is Swagger UI. Its files are in `shared/http/swagger_ui` with their version, checksums and licences, so that a
browser loads nothing from another host. `make swagger` replaces them with another version.
"""

from importlib import resources

import msgspec
from litestar import MediaType, Response, get
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler

from shared.http.openapi import Api, document

SWAGGER_FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
_FOLDER = resources.files("shared") / "http" / "swagger_ui"
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
# Behind the gateway, the page of each service has a different path. The script therefore derives the URL from the path.
_START = """SwaggerUIBundle({
  url: location.pathname.replace(/[/]+$/, "") + "/openapi.json",
  dom_id: "#page",
  deepLinking: true,
  persistAuthorization: true,
  validatorUrl: null,
});
"""
# Swagger UI sets inline styles and embeds its icons as data URLs, so both must be allowed.
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self';"
    " connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def pages(api: Api) -> list[HTTPRouteHandler]:
    """Returns the routes of `/api-docs`, `/api-docs/openapi.json` and the files of the page."""
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
        if name not in SWAGGER_FILES:
            raise NotFoundException("no such file")
        # Each request reads the file, so that a service does not keep 2 MB of rarely used files in memory.
        content = (_FOLDER / name).read_bytes()
        return Response(content, media_type=SWAGGER_FILES[name], headers={"Cache-Control": "max-age=86400"})

    return [show, as_json, file]
