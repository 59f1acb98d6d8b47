"""The choice of the system that the command line talks to."""

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared import local_systems
from shared.local_systems import LOCK_FILE, LocalSystem, NoSystem, choose_system, list_system, read_environment

Start = Callable[..., LocalSystem]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Returns a function that makes a system as `make run` does. With `stopped`, its run has ended."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ExitStack() as held:

        def run(name: str, *, checkout: Path = tmp_path, stopped: bool = False) -> LocalSystem:
            system = LocalSystem(tmp_path / name, checkout)
            system.home.mkdir(parents=True)
            local_systems.write_environment(system.home, {"TICKETRAIL_HOME": str(system.home)})
            list_system(system)
            lock = held.enter_context((system.home / LOCK_FILE).open("a+"))
            if not stopped:
                fcntl.flock(lock, fcntl.LOCK_EX)
            return system

        yield run


def test_settings_with_quotes_and_line_ends_are_read_back_unchanged(tmp_path: Path) -> None:
    written = {"TICKETRAIL_JWT_PRIVATE_KEY": '-----BEGIN-----\nit\'s # "quoted" $HOME\n', "TICKETRAIL_INSTANCE": "1"}
    local_systems.write_environment(tmp_path, written)
    assert read_environment(tmp_path) == written
    assert (tmp_path / "system.env").stat().st_mode & 0o077 == 0
    assert read_environment(tmp_path / "nowhere") is None


def test_the_only_running_system_is_chosen(start: Start, tmp_path: Path) -> None:
    start("stopped", stopped=True)
    one = start("one")
    chosen = choose_system(None, {}, checkout=tmp_path, configured_home=None)
    assert chosen.environment == {"TICKETRAIL_HOME": str(one.home)}
    assert "one" in chosen.label
    assert "runs" in chosen.label


def test_a_choice_between_two_running_systems_is_refused_and_names_both(start: Start, tmp_path: Path) -> None:
    one, two = start("one"), start("two")
    with pytest.raises(NoSystem, match="--system NAME") as refused:
        choose_system(None, {}, checkout=tmp_path, configured_home=None)
    assert str(one.home) in str(refused.value)
    assert str(two.home) in str(refused.value)


@pytest.mark.parametrize("by", ["name", "path", "checkout of the path"])
def test_the_option_system_chooses_by_name_or_path_and_overrides_the_environment(
    start: Start, tmp_path: Path, by: str
) -> None:
    start("one")
    two = start("shop/.local")
    requested = {"name": "shop", "path": str(two.home), "checkout of the path": str(two.home.parent)}[by]
    chosen = choose_system(requested, {"TICKETRAIL_REDIS_URL": "redis://x"}, checkout=tmp_path, configured_home=None)
    assert chosen.environment == {"TICKETRAIL_HOME": str(two.home)}
    assert chosen.overrides


def test_an_unknown_system_is_refused_with_the_running_ones(start: Start, tmp_path: Path) -> None:
    start("one")
    with pytest.raises(NoSystem, match=r"--system tow: .*one"):
        choose_system("tow", {}, checkout=tmp_path, configured_home=None)


def test_backends_set_in_the_environment_win_over_running_systems(start: Start, tmp_path: Path) -> None:
    one = start("one")
    environment = {"TICKETRAIL_DATABASE_URL": "postgresql://x", "TICKETRAIL_HOME": str(one.home)}
    assert not choose_system(None, environment, checkout=tmp_path, configured_home=None).environment


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_the_home_setting_chooses_one_of_two_running_systems(start: Start, tmp_path: Path, where: str) -> None:
    start("one")
    two = start("two")
    environment = {"TICKETRAIL_HOME": str(two.home)} if where == "environment" else {}
    configured = Path("two") if where == ".env" else None
    chosen = choose_system(None, environment, checkout=tmp_path, configured_home=configured)
    assert chosen.environment == {"TICKETRAIL_HOME": str(two.home)}
    assert not chosen.overrides


def test_a_running_system_of_this_checkout_is_preferred(start: Start, tmp_path: Path) -> None:
    start("other", checkout=tmp_path / "elsewhere")
    one = start("one")
    chosen = choose_system(None, {}, checkout=tmp_path, configured_home=None)
    assert chosen.environment == {"TICKETRAIL_HOME": str(one.home)}


def test_a_stopped_system_of_this_checkout_is_chosen_if_none_runs(start: Start, tmp_path: Path) -> None:
    assert "default settings" in choose_system(None, {}, checkout=tmp_path, configured_home=None).label
    start(".local", stopped=True)
    assert "does not run" in choose_system(None, {}, checkout=tmp_path, configured_home=None).label
