"""/api-docs of every service: the page, its files, and the document that it shows."""

import json
import re

import pytest

from tests.contract import documents
from tests.rigs.http_client import http_client
from tests.rigs.system import System

_LOADED = re.compile(r'(?:src|href)="([^"]*)"')


@pytest.mark.parametrize("service", list(documents.OPENAPI))
async def test_page_loads_only_its_own_files(system: System, service: str) -> None:
    async with http_client(base_url=system.urls[service]) as client:
        page = await client.get("/api-docs")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        loaded = _LOADED.findall(page.text)
        assert len(loaded) >= 4
        for path in loaded:
            assert path.startswith("/api-docs/files/"), path
            file = await client.get(path)
            assert file.status_code == 200, path
            assert file.headers["x-content-type-options"] == "nosniff"
            kind = {"css": "text/css", "js": "text/javascript", "png": "image/png"}[path.rpartition(".")[2]]
            assert file.headers["content-type"].startswith(kind)
            if kind == "text/css":
                assert set(re.findall(r"""url\(["']?(\w+:)""", file.text)) == {"data:"}
        start = (await client.get("/api-docs/files/start.js")).text
        assert 'location.pathname.replace(/[/]+$/, "") + "/openapi.json"' in start
        assert "validatorUrl: null" in start  # by default the page would call a host of Swagger


@pytest.mark.parametrize("service", list(documents.OPENAPI))
async def test_page_policy_allows_only_the_sources_that_the_page_needs(system: System, service: str) -> None:
    async with http_client(base_url=system.urls[service]) as client:
        page = await client.get("/api-docs")
        policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert "<script>" not in page.text
        assert "http" not in " ".join(policy.values())
        for path in ("/api-docs/files/nothing.js", "/api-docs/files/..%2f..%2f__init__.py", "/api-docs/files/"):
            assert (await client.get(path)).status_code == 404, path


@pytest.mark.parametrize("service", list(documents.OPENAPI))
async def test_service_shows_the_frozen_document(system: System, service: str) -> None:
    async with http_client(base_url=system.urls[service]) as client:
        shown = await client.get("/api-docs/openapi.json")
    assert shown.headers["content-type"].startswith("application/json")
    assert shown.json() == json.loads(documents.text(f"{service}.openapi.json"))


@pytest.mark.parametrize("service", list(documents.OPENAPI))
async def test_path_names_its_allowed_methods(system: System, service: str) -> None:
    async with system.client("admin", service=service) as client:
        for path, item in documents.document(f"{service}.openapi.json")["paths"].items():
            known = {"OPTIONS", *(method.upper() for method in item), *({"HEAD"} if "get" in item else ())}
            at = re.sub(r"\{\w+\}", system.restaurant_id, path)
            asked = await client.options(at)
            assert (asked.status_code, set(asked.headers["allow"].split(", "))) == (204, known), path
            refused = await client.patch(at)
            assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")
            assert set(refused.headers["allow"].split(", ")) == known, path
