"""The systems that `make run` starts: where each writes what the command line needs, and which of them run.

A system has a home. `make run` writes `<home>/system.env` there: the settings of its services with their secrets, for
its owner alone, in a form that `sh` reads too. While it runs it is listed in a folder of its user. An entry counts only
while the run holds the lock of its home, so a run that was killed needs no cleanup.
"""

import fcntl
import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
"""The directory of these sources."""
ENV_FILE = "system.env"
LOCK_FILE = "run.lock"
PREFIX = "TICKETRAIL_"
HOME = f"{PREFIX}HOME"
BACKENDS = tuple(
    PREFIX + name
    for name in (
        "RABBITMQ_URL",
        "RABBITMQ_MANAGEMENT_URL",
        "RABBITMQ_WATCHER_URL",
        "REDIS_URL",
        "DATABASE_URL",
        "DATABASE_WRITER_URL",
        "DATABASE_API_URL",
        "DATABASE_OPS_URL",
    )
)
"""Whoever sets one of these in the environment has chosen a system already, as containers do."""


class NoSystem(Exception):
    """No system was chosen, or several could be meant; says which there are and how to choose."""


@dataclass(frozen=True)
class LocalSystem:
    home: Path
    checkout: Path
    """The directory of the sources that run it."""

    @property
    def name(self) -> str:
        return self.home.parent.name if self.home.name == ".local" else self.home.name

    @property
    def running(self) -> bool:
        try:
            with (self.home / LOCK_FILE).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def __str__(self) -> str:
        return f"{self.name} ({self.home})"


@dataclass(frozen=True)
class Chosen:
    """What a command talks to."""

    label: str
    environment: Mapping[str, str]
    """Settings to add to the environment."""
    overrides: bool = False
    """These settings replace those of the environment, which otherwise win."""


def write_environment(home: Path, environment: Mapping[str, str]) -> None:
    """Complete or not at all."""
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in sorted(environment.items())]
    aside = home / f"{ENV_FILE}.new"
    aside.unlink(missing_ok=True)
    aside.touch(mode=0o600)
    aside.write_text("# Written by `make run` at each start, for the command line and for `sh`.\n" + "".join(lines))
    aside.rename(home / ENV_FILE)


def read_environment(home: Path) -> dict[str, str] | None:
    """None where `make run` has never written one."""
    try:
        text = (home / ENV_FILE).read_text()
    except OSError:
        return None
    words = shlex.split(text, comments=True)
    return {name: value for name, given, value in (word.partition("=") for word in words) if given}


def list_system(system: LocalSystem) -> Path:
    """Adds it to the list of systems that run; returns its entry, to be removed at the end."""
    entry = _folder() / f"{hashlib.sha256(str(system.home).encode()).hexdigest()[:16]}.json"
    entry.write_text(json.dumps({"home": str(system.home), "checkout": str(system.checkout)}))
    return entry


def running_systems() -> list[LocalSystem]:
    """Those of this user, by their homes."""
    found = []
    for entry in _folder().glob("*.json"):
        try:
            known = json.loads(entry.read_text())
            system = LocalSystem(Path(known["home"]), Path(known["checkout"]))
        except (OSError, ValueError, KeyError):
            continue  # removed or being written at this moment
        if system.running:
            found.append(system)
    return sorted(found, key=lambda system: str(system.home))


def choose(
    wanted: str | None, environment: Mapping[str, str], *, checkout: Path, configured_home: Path | None
) -> Chosen:
    """The system that a command of `checkout` talks to. The first of these decides: `wanted` (a path or a name), a
    backend in the environment, TICKETRAIL_HOME there, `configured_home` (from `.env`), the one that runs, the one that
    ran here last, the settings. Raises NoSystem when several could be meant."""
    if wanted is not None:
        return _of(_wanted(wanted, checkout), overrides=True)
    if set(BACKENDS) & environment.keys():
        return Chosen("the backends that the environment names", {})
    home = Path(environment[HOME]) if environment.get(HOME) else configured_home
    if home is not None:
        return _of(LocalSystem((checkout / home).absolute(), checkout))
    running = running_systems()
    here = [system for system in running if system.checkout == checkout] or running
    if len(here) > 1:
        raise NoSystem(
            f"{len(here)} systems run, {_listed(here)}: choose one with --system NAME, or set {HOME} to its directory"
        )
    return _of(here[0] if here else LocalSystem(checkout / ".local", checkout))


def _of(system: LocalSystem, *, overrides: bool = False) -> Chosen:
    written = read_environment(system.home)
    if written is None:
        return Chosen(f"the default settings, because `make run` has not started one in {system.home}", {})
    state = "runs" if system.running else "does not run"
    return Chosen(f"{system.name}, in {system.home}, {state}", written, overrides)


def _wanted(wanted: str, checkout: Path) -> LocalSystem:
    for home in (Path(wanted), Path(wanted) / ".local"):
        if (home / ENV_FILE).exists():
            return LocalSystem(home.absolute(), checkout)
    running = running_systems()
    named = [system for system in running if system.name == wanted]
    if not named:
        known = f"these run: {_listed(running)}" if running else "none runs"
        raise NoSystem(f"--system {wanted}: no directory of `make run` and no name of a system that runs; {known}")
    if len(named) > 1:
        raise NoSystem(f"--system {wanted}: {_listed(named)} have this name; choose one by its directory")
    return named[0]


def _listed(systems: Sequence[LocalSystem]) -> str:
    return " and ".join(map(str, systems))


def _folder() -> Path:
    """Of this user alone: an entry of somebody else could send commands, with passwords, to another server."""
    folder = Path(tempfile.gettempdir()) / f"ticketrail-systems-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise NoSystem(f"{folder} belongs to another user: remove it")
    return folder
