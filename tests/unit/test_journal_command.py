"""`ticketrail journal` touches only files that are named like a journal."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from services.sync.cli.journal import journal_command
from shared.rail.journal_file import create
from shared.rail.set_aside import is_journal_name, journal_set_aside

ASIDE = "orders-4.sqlite.corrupt-20261125T020333.468021Z"


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("action", ["drain", "show"])
@pytest.mark.parametrize("name", ["NOTES.md", "passwd", "orders-2.sqlite.bak", "my-orders-2.sqlite", "orders-x.sqlite"])
def test_a_file_that_is_not_named_like_a_journal_is_refused_and_untouched(
    tmp_path: Path, action: str, name: str
) -> None:
    path = tmp_path / name
    path.write_text("# Notes\n")
    before = content_of(tmp_path)
    result = CliRunner().invoke(journal_command, [action, str(path)])
    assert result.exit_code == 1
    assert result.output == (
        f"Error: {path} is not a journal: the file of a journal has a name such as orders-2.sqlite\n"
    )
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("action", ["drain", "show"])
def test_a_database_of_another_program_is_refused_and_untouched(tmp_path: Path, action: str) -> None:
    path = tmp_path / "places.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.execute("pragma journal_mode=wal")
        database.execute("create table places (name text)")
    before = content_of(tmp_path)
    assert CliRunner().invoke(journal_command, [action, str(path)]).exit_code == 1
    assert content_of(tmp_path) == before


def test_a_file_that_was_set_aside_is_shown_and_not_drained(tmp_path: Path) -> None:
    path = tmp_path / ASIDE
    create(path)
    shown = CliRunner().invoke(journal_command, ["show", str(path)])
    assert (shown.exit_code, "0 changes wait" in shown.output) == (0, True)
    before = content_of(tmp_path)
    drained = CliRunner().invoke(journal_command, ["drain", str(path)])
    assert drained.exit_code == 1
    assert "this file was set aside" in drained.output
    assert content_of(tmp_path) == before


def test_names_of_journals_and_of_set_aside_files_are_distinct() -> None:
    assert is_journal_name("orders-12.sqlite")
    assert not any(map(is_journal_name, ("orders-12.sqlite-wal", "orders-12.sqlite.rebuilt", ASIDE)))
    assert journal_set_aside(ASIDE) == "orders-4.sqlite"
    assert journal_set_aside("orders-4.sqlite") is None
    assert journal_set_aside("NOTES.md.corrupt-20261125T020333.468021Z") is None
