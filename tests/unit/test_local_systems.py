"""The choice of the system that the command line talks to."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from deploy.local.local_settings import LocalSettings, command_environment, service_environment
from services.sync.cli.main import main
from services.sync.command_system import follow_system
from shared import local_systems
from shared.local_systems import (
    BACKENDS,
    LOCK_FILE,
    LocalSystem,
    NoSystem,
    choose_system,
    list_system,
    read_environment,
)
from shared.settings import Settings

Start = Callable[..., LocalSystem]


def settings_of(system: LocalSystem) -> dict[str, str]:
    """Returns the settings that `make run` always writes."""
    names = (*BACKENDS, "TICKETRAIL_JWT_SECRET", "TICKETRAIL_WORKER_PORT")
    return {"TICKETRAIL_HOME": str(system.home)} | {name: f"{name} of {system.name}" for name in names}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Returns a function that makes a system as `make run` does. With `stopped`, its run has ended."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ExitStack() as held:

        def run(name: str, *, checkout: Path = tmp_path, stopped: bool = False) -> LocalSystem:
            system = LocalSystem(tmp_path / name, checkout)
            system.home.mkdir(parents=True)
            local_systems.write_environment(system.home, settings_of(system))
            list_system(system)
            lock = held.enter_context((system.home / LOCK_FILE).open("a+"))
            if not stopped:
                fcntl.flock(lock, fcntl.LOCK_EX)
            return system

        yield run


def test_settings_with_quotes_and_line_ends_are_read_back_unchanged(tmp_path: Path) -> None:
    written = settings_of(LocalSystem(tmp_path, tmp_path)) | {
        "TICKETRAIL_JWT_PRIVATE_KEY": '-----BEGIN-----\nit\'s # "quoted" $HOME\n',
        "TICKETRAIL_INSTANCE": "1",
    }
    local_systems.write_environment(tmp_path, written)
    assert read_environment(tmp_path) == written
    assert (tmp_path / "system.env").stat().st_mode & 0o077 == 0
    assert read_environment(tmp_path / "nowhere") is None


def test_the_only_running_system_is_chosen(start: Start, tmp_path: Path) -> None:
    start("stopped", stopped=True)
    one = start("one")
    chosen = choose_system(None, {}, env_file={}, checkout=tmp_path)
    assert chosen.environment == settings_of(one)
    assert "one" in chosen.label
    assert "runs" in chosen.label


def test_a_choice_between_two_running_systems_is_refused_and_names_both(start: Start, tmp_path: Path) -> None:
    one, two = start("one"), start("two")
    with pytest.raises(NoSystem, match="--system NAME") as refused:
        choose_system(None, {}, env_file={}, checkout=tmp_path)
    assert str(one.home) in str(refused.value)
    assert str(two.home) in str(refused.value)


@pytest.mark.parametrize("by", ["name", "path", "checkout of the path"])
def test_the_option_system_chooses_by_name_or_path_and_overrides_the_environment(
    start: Start, tmp_path: Path, by: str
) -> None:
    start("one")
    two = start("shop/.local")
    requested = {"name": "shop", "path": str(two.home), "checkout of the path": str(two.home.parent)}[by]
    chosen = choose_system(requested, {"TICKETRAIL_REDIS_URL": "redis://x"}, env_file={}, checkout=tmp_path)
    assert chosen.environment == settings_of(two)
    assert chosen.overrides


def test_an_unknown_system_is_refused_with_the_running_ones(start: Start, tmp_path: Path) -> None:
    start("one")
    with pytest.raises(NoSystem, match=r"--system tow: .*one"):
        choose_system("tow", {}, env_file={}, checkout=tmp_path)


@pytest.mark.parametrize("where", ["environment", ".env"])
@pytest.mark.parametrize("home", ["one", "nowhere"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_that_are_named_win_over_running_systems(
    start: Start, tmp_path: Path, backend: str, where: str, home: str
) -> None:
    start("one")
    named = {backend: "x://x"}
    environment = {"TICKETRAIL_HOME": str(tmp_path / home)} | (named if where == "environment" else {})
    chosen = choose_system(None, environment, env_file=named if where == ".env" else {}, checkout=tmp_path)
    assert not chosen.environment
    assert f"{where} names" in chosen.label


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty working directory of a command that has no setting in its environment."""
    for name in [name for name in os.environ if name.startswith("TICKETRAIL_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_command_uses_the_backends_in_the_env_file_although_a_system_runs(
    start: Start, working_directory: Path
) -> None:
    start("one")
    (working_directory / ".env").write_text("TICKETRAIL_DATABASE_URL=postgresql://mine/x\n")
    with click.Context(main, obj=None) as context:
        follow_system(context, None)
        settings = Settings.load()
    assert settings.database_url == "postgresql://mine/x"
    assert "one" not in settings.redis_url


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_home_without_a_system_is_refused(start: Start, tmp_path: Path, where: str) -> None:
    start("one")
    start(".local", stopped=True)
    named = {"TICKETRAIL_HOME": str(tmp_path / "nowhere")}
    with pytest.raises(NoSystem, match=rf"TICKETRAIL_HOME in (the )?{where} is .*nowhere, .*; running systems: one"):
        choose_system(
            None,
            named if where == "environment" else {},
            env_file=named if where == ".env" else {},
            checkout=tmp_path,
        )


def test_a_command_with_a_home_without_a_system_prints_one_sentence(
    start: Start, working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TICKETRAIL_HOME", "nowhere")
    refused = CliRunner().invoke(main, ["migrate"])
    assert refused.exit_code == 1
    (line,) = refused.output.splitlines()
    assert line == (
        f"Error: TICKETRAIL_HOME in the environment is {working_directory}/nowhere, where `make run` has not started a "
        "system; no system runs"
    )


@pytest.mark.parametrize("home", ["", " "])
def test_a_command_with_an_empty_home_prints_one_sentence(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("TICKETRAIL_HOME", home)
    refused = CliRunner().invoke(main, ["migrate"])
    assert refused.exit_code == 1
    (line,) = refused.output.splitlines()
    assert line.startswith(f"Error: TICKETRAIL_HOME is {home!r}, which is not allowed")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: b"\n".join(whole.splitlines()[:-1]) + b"\n",
        lambda whole: whole + b"TICKETRAIL_HOST='\n",
        lambda whole: b"\xff\xfe" + whole,
        lambda whole: bytes(256) + whole,
    ],
    ids=["empty", "half", "without the last byte", "without the last line", "open quotation", "not UTF-8", "zeros"],
)
@pytest.mark.parametrize("by", ["name", "TICKETRAIL_HOME", "nothing"])
def test_damaged_settings_of_a_system_are_refused(
    start: Start, tmp_path: Path, damage: Callable[[bytes], bytes], by: str
) -> None:
    file = start("one").home / "system.env"
    file.write_bytes(damage(file.read_bytes()))
    environment = {"TICKETRAIL_HOME": str(file.parent)} if by == "TICKETRAIL_HOME" else {}
    with pytest.raises(NoSystem) as refused:
        choose_system("one" if by == "name" else None, environment, env_file={}, checkout=tmp_path)
    assert str(refused.value) == f"{file} is damaged; start `make run` again"


def test_settings_that_cannot_be_read_are_refused(start: Start, tmp_path: Path) -> None:
    file = start("one").home / "system.env"
    file.unlink()
    file.mkdir()
    with pytest.raises(NoSystem, match=r"system\.env cannot be read: Is a directory"):
        choose_system("one", {}, env_file={}, checkout=tmp_path)


def test_make_run_writes_every_setting_that_a_command_expects(working_directory: Path) -> None:
    settings = LocalSettings.load()
    services = service_environment(settings, working_directory, {})
    local_systems.write_environment(working_directory, command_environment(settings, services))
    backup = {"TICKETRAIL_DATABASE_BACKUP_URL": "postgresql://postgres:ticketrail@127.0.0.1:17432/ticketrail"}
    assert read_environment(working_directory) == services | backup


def test_an_empty_system_is_refused(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(start(".local").home.parent)
    with pytest.raises(NoSystem, match="--system '': "):
        choose_system("", {}, env_file={}, checkout=tmp_path)


def test_a_relative_path_starts_at_the_working_directory_for_every_reader(
    start: Start, working_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = start("work/two")
    start("two")
    relative = {"TICKETRAIL_HOME": "two"}
    for requested, environment, env_file in (("two", {}, {}), (None, relative, {}), (None, {}, relative)):
        chosen = choose_system(requested, environment, env_file=env_file, checkout=tmp_path)
        assert chosen.environment["TICKETRAIL_HOME"] == str(two.home)
    monkeypatch.setenv("TICKETRAIL_HOME", "two")
    assert LocalSettings.load().home_path == two.home


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_the_home_setting_chooses_one_of_two_running_systems(start: Start, tmp_path: Path, where: str) -> None:
    start("one")
    two = start("two")
    named = {"TICKETRAIL_HOME": str(two.home)}
    chosen = choose_system(
        None, named if where == "environment" else {}, env_file=named if where == ".env" else {}, checkout=tmp_path
    )
    assert chosen.environment == settings_of(two)
    assert not chosen.overrides


def test_a_running_system_of_this_checkout_is_preferred(start: Start, tmp_path: Path) -> None:
    start("other", checkout=tmp_path / "elsewhere")
    one = start("one")
    chosen = choose_system(None, {}, env_file={}, checkout=tmp_path)
    assert chosen.environment == settings_of(one)


def test_a_stopped_system_of_this_checkout_is_chosen_if_none_runs(start: Start, tmp_path: Path) -> None:
    assert "default settings" in choose_system(None, {}, env_file={}, checkout=tmp_path).label
    start(".local", stopped=True)
    assert "does not run" in choose_system(None, {}, env_file={}, checkout=tmp_path).label
