"""The layout of a home: `make run` refuses data that another version made, before it starts anything."""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from deploy.local import layout, reset, run
from deploy.local.local_settings import ROOT
from shared.local_systems import LocalSystem, list_system
from shared.mirror import keys
from shared.rail import journal_file

# The digest of each layout. A test compares it, so that a changed layout cannot keep its version.
MIRROR_DIGESTS = {
    1: "41ce8e8d1973",
    2: "0451e018077f",
    4: "82595ff224f1",
    5: "82595ff224f1",
    6: "8b4912ad45e9",
    7: "0a89d0f5a733",
}
JOURNAL_DIGESTS = {2: "0dbb7102afe5"}


def test_home_without_data_fits_and_keeps_fitting_once_it_has_data(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "run.lock").touch()
    layout.check_home(tmp_path)
    (tmp_path / "redis").mkdir()
    layout.check_home(tmp_path)


@pytest.mark.parametrize("store", ["redis", "journal", "postgres", "rabbitmq"])
def test_data_without_a_layout_is_of_another_version(tmp_path: Path, store: str) -> None:
    (tmp_path / store).mkdir()
    with pytest.raises(layout.OtherLayout, match=r"layout\.json is missing"):
        layout.check_home(tmp_path)


@pytest.mark.parametrize("store", ["mirror", "journal"])
def test_store_with_another_layout_is_named_with_both_versions(tmp_path: Path, store: str) -> None:
    layout.check_home(tmp_path)
    (tmp_path / "journal").mkdir()
    file = tmp_path / "layout.json"
    versions = json.loads(file.read_text())
    file.write_text(json.dumps(versions | {store: 77}))
    with pytest.raises(layout.OtherLayout, match=rf"{store}.* 77.* {versions[store]}"):
        layout.check_home(tmp_path)


def test_layout_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    for text in ("{", "[]"):
        (tmp_path / "layout.json").write_text(text)
        with pytest.raises(layout.OtherLayout, match=r"layout\.json"):
            layout.check_home(tmp_path)


def test_reset_removes_the_layout_with_the_data(tmp_path: Path) -> None:
    layout.check_home(tmp_path)
    (tmp_path / "redis").mkdir()
    assert reset.reset(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("exists", [False, True])
def test_reset_of_a_home_without_data_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    home = tmp_path / "home"
    if exists:
        home.mkdir()
    monkeypatch.setenv("TICKETRAIL_HOME", str(home))
    assert reset.main([]) == 0
    assert capsys.readouterr().out == f"ticketrail: there is no data in {home}\n"
    assert home.exists() is exists
    home.mkdir(exist_ok=True)
    (home / "redis").mkdir()
    assert reset.main([]) == 0
    assert capsys.readouterr().out == f"ticketrail: removed the data in {home}\n"


def test_changed_mirror_keys_get_a_new_layout_version() -> None:
    names = [value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)]
    functions = [function for _, function in inspect.getmembers(keys, inspect.isfunction)]
    names += [function(*("<>" for _ in inspect.signature(function).parameters)) for function in functions]
    described = re.sub("<.*?>", "<>", keys.__doc__ or "")
    kinds = re.findall(r"^    (\S+) +(hash|zset|set|int|text)\b", described, re.MULTILINE)
    assert len(kinds) > 10
    _compare("keys.LAYOUT_VERSION", keys.LAYOUT_VERSION, MIRROR_DIGESTS, f"{sorted(names)} {sorted(kinds)}")


def test_changed_journal_tables_get_a_new_layout_version() -> None:
    _compare("journal_file.LAYOUT_VERSION", journal_file.LAYOUT_VERSION, JOURNAL_DIGESTS, journal_file.SCHEMA)


def _compare(name: str, version: int, digests: dict[int, str], content: str) -> None:
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    assert version in digests, f"add {version}: {digest!r}, which is the digest of this layout"
    assert digests[version] == digest, f"the layout has changed: raise {name}, and add {digest!r} for it"


# `make clean` must find the same home as `make reset`.


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tree with the files that `make clean` needs."""
    for folder in ("deploy", "shared"):
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "checkout/.local").mkdir()
    bin_ = tmp_path / "checkout/.venv/bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").write_text(f'#!/bin/sh\nexec "{ROOT}/.venv/bin/python" "$@"\n')
    (bin_ / "python").chmod(0o755)
    return tmp_path / "checkout"


def clean(checkout: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")}
    return subprocess.run(
        ["sh", str(checkout / "deploy/local/clean.sh")],
        env=inherited | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("by", ["environment", ".env"])
def test_clean_removes_the_data_of_a_moved_home_and_nothing_else_in_it(checkout: Path, by: str) -> None:
    home = checkout.parent / "moved home"
    (home / "redis").mkdir(parents=True)
    (home / "letters.txt").touch()
    if by == ".env":
        (checkout / ".env").write_text(f'# a comment\nTICKETRAIL_HOME="{home}"\n')
    done = clean(checkout, **({"TICKETRAIL_HOME": str(home)} if by == "environment" else {}))
    assert done.returncode == 0, done.stderr
    assert not (home / "redis").exists()
    assert (home / "letters.txt").exists()
    assert not (checkout / ".local").exists()
    assert not (checkout / ".venv").exists()


def test_clean_removes_nothing_while_the_system_of_a_moved_home_runs(checkout: Path) -> None:
    home = checkout.parent / "home"
    (home / "redis").mkdir(parents=True)
    (checkout / ".env").write_text(f"TICKETRAIL_HOME={home}\n")
    held = run.lock(home)
    assert held
    with held:
        done = clean(checkout)
    assert done.returncode == 1
    assert str(home) in done.stdout + done.stderr
    assert (home / "redis").exists()
    assert (checkout / ".local").exists()
    assert (checkout / ".venv").exists()


def test_clean_removes_nothing_while_another_system_of_the_checkout_runs(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = checkout.parent / "second"
    monkeypatch.setattr(tempfile, "tempdir", str(checkout.parent))
    (checkout / ".local/redis").mkdir()
    home.mkdir()
    list_system(LocalSystem(home, checkout))
    held = run.lock(home)
    assert held
    with held:
        done = clean(checkout, TMPDIR=str(checkout.parent))
    assert done.returncode == 1
    assert done.stdout + done.stderr == f"ticketrail: make run is still running on {home}; stop it first\n"
    assert (checkout / ".local/redis").exists()
    assert (checkout / ".venv").exists()
    assert clean(checkout, TMPDIR=str(checkout.parent)).returncode == 0


@pytest.mark.parametrize("by", ["environment", ".env"])
def test_clean_with_an_empty_home_removes_nothing(checkout: Path, by: str) -> None:
    (checkout / "secret").touch()
    if by == ".env":
        (checkout / ".env").write_text("TICKETRAIL_HOME=\n")
    done = clean(checkout, **({"TICKETRAIL_HOME": ""} if by == "environment" else {}))
    assert done.returncode == 1
    assert "TICKETRAIL_HOME" in done.stderr
    assert "\n" not in done.stderr.strip()
    assert (checkout / "secret").exists()
    assert (checkout / ".venv").exists()


def test_clean_without_a_usable_environment_removes_local_and_mentions_make_reset(checkout: Path) -> None:
    (checkout / ".venv/bin/python").unlink()
    (checkout / ".local/redis").mkdir()
    (checkout / ".env").write_text("TICKETRAIL_HOME=elsewhere\n")
    done = clean(checkout)
    assert done.returncode == 0, done.stderr
    assert "make reset" in done.stderr
    assert not (checkout / ".local").exists()
    assert not (checkout / ".venv").exists()
