"""The systems that `make run` starts: the settings of each system for the command line, and the list of running
systems.

A system has a home directory. `make run` writes the settings and secrets of its services to `<home>/system.env`, which
only its owner can read. `sh` can read this file too. Each user has a directory with an entry for each running system.
An entry counts only while its `make run` holds the lock in the home, so a killed run needs no cleanup.
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
"""The root directory of this source tree."""
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
"""The variables that choose the system if the environment or `.env` has one of them, as in a container."""
_ALWAYS_WRITTEN = frozenset({HOME, *BACKENDS, f"{PREFIX}JWT_SECRET", f"{PREFIX}WORKER_PORT"})
"""The variables that every `system.env` has. The last of them is close to the end of the file, so a file that lost its
end lacks it."""


class NoSystem(Exception):
    """No system was found, several were found, or the settings of the chosen one cannot be used. The message is one
    sentence that says what to do."""


@dataclass(frozen=True)
class LocalSystem:
    home: Path
    checkout: Path
    """The root of the source tree that runs the system."""

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
    """The system that a command talks to."""

    label: str
    environment: Mapping[str, str]
    """The settings to add to the environment."""
    overrides: bool = False
    """True if these settings take precedence over the environment; False if the environment takes precedence."""


def write_environment(home: Path, environment: Mapping[str, str]) -> None:
    """Writes `system.env` of a home. A reader sees the old or the new file, never a part of one."""
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in sorted(environment.items())]
    aside = home / f"{ENV_FILE}.new"
    aside.unlink(missing_ok=True)
    aside.touch(mode=0o600)
    aside.write_text("# Written by `make run` at each start, for the command line and for `sh`.\n" + "".join(lines))
    aside.rename(home / ENV_FILE)


def read_environment(home: Path) -> dict[str, str] | None:
    """Returns the settings in `system.env` of a home, or None if there is no such file, for example before the first
    `make run`. Raises NoSystem if the file is incomplete or cannot be read, because a command with only a part of the
    settings could connect to another system."""
    file = home / ENV_FILE
    try:
        text = file.read_text()
        words = shlex.split(text, comments=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise NoSystem(f"{file} cannot be read: {error.strerror}") from error
    except ValueError:  # it is not UTF-8, or a quotation does not end
        text, words = "", []
    found = {name: value for name, given, value in (word.partition("=") for word in words) if given}
    if not text.endswith("\n") or "\0" in text or not found.keys() >= _ALWAYS_WRITTEN:
        raise NoSystem(f"{file} is damaged; start `make run` again")
    return found


def list_system(system: LocalSystem) -> Path:
    """Adds a system to the list of running systems. Returns the file of its entry, which the caller
    removes at the end."""
    entry = _folder() / f"{hashlib.sha256(str(system.home).encode()).hexdigest()[:16]}.json"
    entry.write_text(json.dumps({"home": str(system.home), "checkout": str(system.checkout)}))
    return entry


def running_systems() -> list[LocalSystem]:
    """Returns the running systems of this user, sorted by home."""
    found = []
    for entry in _folder().glob("*.json"):
        try:
            known = json.loads(entry.read_text())
            system = LocalSystem(Path(known["home"]), Path(known["checkout"]))
        except (OSError, ValueError, KeyError):
            continue  # a `make run` is removing or writing the entry right now
        if system.running:
            found.append(system)
    return sorted(found, key=lambda system: str(system.home))


def choose_system(
    requested: str | None, environment: Mapping[str, str], *, env_file: Mapping[str, str], checkout: Path
) -> Chosen:
    """Returns the system that a command of `checkout` talks to. The first item of this list that is given decides:

    1  `requested`, a path or a name
    2  a URL of a backend in the environment or in `.env`, whose content is `env_file`
    3  TICKETRAIL_HOME in the environment, or else in `.env`; a relative path starts at the working directory
    4  the running system of this checkout, or else the only running one
    5  the last system of this checkout, or the default settings if there was none

    Raises NoSystem if several systems run, if there is no system that `requested` or TICKETRAIL_HOME names, or if the
    settings of the system cannot be read. A command never connects to another system than the one that was named.
    """
    if requested is not None:
        return _of(_find_requested(requested, checkout), overrides=True)
    sources = ((environment, "the environment"), (env_file, ".env"))
    for given, source in sources:
        if set(BACKENDS) & given.keys():
            return Chosen(f"the backends that {source} names", {})
    for given, source in sources:
        if home := given.get(HOME):
            return _of_home(LocalSystem(Path(home).absolute(), checkout), source)
    running = running_systems()
    here = [system for system in running if system.checkout == checkout] or running
    if len(here) > 1:
        raise NoSystem(
            f"{len(here)} systems run: {_listed(here)}. Choose one with --system NAME, or set {HOME} to its directory"
        )
    return _of(here[0] if here else LocalSystem(checkout / ".local", checkout))


def _of(system: LocalSystem, *, overrides: bool = False) -> Chosen:
    written = read_environment(system.home)
    if written is None:
        return Chosen(f"the default settings, because `make run` has not started a system in {system.home}", {})
    state = "runs" if system.running else "does not run"
    return Chosen(f"{system.name}, in {system.home}, {state}", written, overrides)


def _of_home(system: LocalSystem, source: str) -> Chosen:
    chosen = _of(system)
    if not chosen.environment:
        raise NoSystem(
            f"{HOME} in {source} is {system.home}, where `make run` has not started a system; "
            + _known(running_systems())
        )
    return chosen


def _find_requested(requested: str, checkout: Path) -> LocalSystem:
    if requested:  # an empty path would be the working directory
        for home in (Path(requested), Path(requested) / ".local"):
            if (home / ENV_FILE).exists():
                return LocalSystem(home.absolute(), checkout)
    running = running_systems()
    named = [system for system in running if system.name == requested]
    if not named:
        raise NoSystem(
            f"--system {requested or repr(requested)}: it is neither a directory of `make run` nor the name of a "
            f"running system; {_known(running)}"
        )
    if len(named) > 1:
        raise NoSystem(f"--system {requested}: {_listed(named)} have this name; choose one by its directory")
    return named[0]


def _known(running: Sequence[LocalSystem]) -> str:
    return f"running systems: {_listed(running)}" if running else "no system runs"


def _listed(systems: Sequence[LocalSystem]) -> str:
    return " and ".join(map(str, systems))


def _folder() -> Path:
    """Returns the directory of the entries. It must belong to this user, because an entry of another user could make
    commands send passwords to another server. Raises NoSystem."""
    folder = Path(tempfile.gettempdir()) / f"ticketrail-systems-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise NoSystem(f"{folder} must be a directory of this user: remove it")
    return folder
