"""The files of Swagger UI in shared/http/swagger_ui are those that `make swagger` downloaded, unchanged."""

import hashlib
import re

from shared.http.api_docs import SWAGGER_FILES
from tests.rigs.system import ROOT

FOLDER = ROOT / "shared/http/swagger_ui"
SUMS = {
    name: checksum
    for checksum, name in (line.split(maxsplit=1) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
}


def test_every_vendored_file_has_its_listed_checksum() -> None:
    found = {path.name: path for path in FOLDER.iterdir() if path.name != "SHA256SUMS"}
    assert set(found) == set(SUMS)
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == SUMS[name], name


def test_the_page_serves_only_vendored_files_and_their_licences_are_kept() -> None:
    assert set(SWAGGER_FILES) <= set(SUMS)
    assert {"LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt"} <= set(SUMS)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", (FOLDER / "VERSION").read_text())


def test_the_style_sheet_loads_nothing_from_another_host() -> None:
    css = (FOLDER / "swagger-ui.css").read_text()
    assert "@import" not in css
    assert {scheme.lower() for scheme in re.findall(r"""url\(\s*["']?([^"')]{5})""", css)} == {"data:"}
