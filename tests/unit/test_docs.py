"""The documents name files, tests and decisions: each of them exists under that name."""

import re
import subprocess
from pathlib import Path

import click
import pytest

from services.sync.cli.main import main
from tests.rigs.system import ROOT

PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    # The changelog names files of earlier releases; the tutorial names files that its reader makes.
    if path.name not in ("CHANGELOG.md", "add-an-entity.md")
)
_SPAN = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"([\w./-]*\w\.(?:py|lua|sql|sh|conf|yaml|yml))(?:::(\w+))?(?:\[.*\])?")
# Files on an operator's machine, which the documents name and the repository does not have.
_ELSEWHERE = {"nginx.conf"}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    return [f"/{name}" for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(page: Path, tracked: list[str]) -> None:
    # Only code spans refer to files of the repository. Code blocks have commands for the reader's terminal.
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for span in _SPAN.findall(text):
        found = _FILE.fullmatch(span)
        if found is None or found[1] in _ELSEWHERE:
            continue
        named = [path for path in tracked if path.endswith(f"/{found[1].removeprefix('./')}")]
        assert named, f"{page.name} names {span}, which does not exist"
        if function := found[2]:
            assert any(f"def {function}(" in (ROOT / path[1:]).read_text() for path in named), span


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_that_a_document_names_is_in_the_list_of_settings(page: Path) -> None:
    known = set(re.findall(r"TICKETRAIL_[A-Z_]+", (ROOT / "docs/settings.md").read_text()))
    named = set(re.findall(r"TICKETRAIL_[A-Z_]+\b(?!\*)", page.read_text()))
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_a_document_names_exists(page: Path) -> None:
    # The pattern finds commands at the beginning of a line in a code block, and in code spans of the text.
    found = re.findall(
        r"(?:^\$ |^|`|\$\(|bin/)ticketrail ([a-z][\w-]*)(?: ([a-z][\w-]*))?", page.read_text(), re.MULTILINE
    )
    for name, sub in found:
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"the command `ticketrail {name}` does not exist"
        if isinstance(command, click.Group) and sub:
            assert command.get_command(click.Context(command), sub) is not None, (
                f"the command `ticketrail {name} {sub}` does not exist"
            )


def test_the_index_of_decisions_has_every_record_under_its_title() -> None:
    index = (ROOT / "docs/adr/index.md").read_text()
    listed = re.findall(r"^\| (\d+) \| \[(.+)\]\((\S+)\) \|$", index, re.MULTILINE)
    records = sorted((ROOT / "docs/adr").glob("0*.md"))
    titles = [re.match(r"# (\d+)\. (.+)\n", path.read_text()) for path in records]
    assert listed == [
        (title[1], title[2], path.name) for title, path in zip(titles, records, strict=True) if title is not None
    ]
