"""The version is written only in shared/version.py; everything else reads it from there."""

import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from click.testing import CliRunner

from services.sync.cli.main import main
from shared.messaging import management
from shared.version import VERSION
from tests.contract import documents
from tests.rigs.system import ROOT


def test_pyproject_reads_the_version_from_the_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "shared.version.VERSION"}


@pytest.mark.parametrize("name", documents.NAMES)
def test_a_document_carries_the_version(name: str) -> None:
    assert documents.document(name)["info"]["version"] == VERSION


def test_the_command_line_prints_its_name_and_the_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"ticketrail, version {VERSION}\n"
    assert CliRunner().invoke(main, ["--help"]).output.startswith("Usage: ticketrail [OPTIONS] COMMAND")


def test_our_http_client_sends_product_and_version() -> None:
    user_agents = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            user_agents.append(self.headers["User-Agent"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert management.ask(f"http://user:password@127.0.0.1:{server.server_port}", "GET", "/api/overview") is None
        thread.join(timeout=30)
    assert user_agents == [f"ticketrail/{VERSION}"]
