"""Finds the programs of RabbitMQ, PostgreSQL and Redis, and installs missing packages if it can.

`ensure` returns when every program is present, and otherwise raises `PackagesMissing`. It never starts, stops or
configures a server that belongs to the machine; apt-install.sh does that.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

INSTALL = Path(__file__).parent / "apt-install.sh"

# These directories come before PATH, where Debian has a wrapper (/usr/sbin/rabbitmq-server). The wrapper hides the real
# process and switches to the user `rabbitmq`, who cannot write into our directories.
RABBITMQ_DIRECTORIES = (Path("/usr/lib/rabbitmq/bin"), Path("/opt/rabbitmq/sbin"))
POSTGRES_DIRECTORIES = Path("/usr/lib/postgresql")
SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class PackagesMissing(Exception):
    """A server is missing and could not be installed. The message names the packages."""


@dataclass(frozen=True)
class Programs:
    """The paths of the servers' programs."""

    rabbitmq_server: Path
    epmd: Path
    postgres: Path
    initdb: Path
    redis_server: Path


def ensure() -> Programs:
    """Installs the packages of missing programs (about a minute on a bare machine), and returns all programs."""
    _install(_missing)
    return Programs(
        rabbitmq_server=_required(_rabbitmq("rabbitmq-server")),
        epmd=_required(_epmd()),
        postgres=_required(_postgres("postgres")),
        initdb=_required(_postgres("initdb")),
        redis_server=_required(_redis()),
    )


def ensure_faketime() -> Path:
    """Installs libfaketime, with which tests move the clock of one process, and returns its library for programs with
    threads."""
    _install(lambda: [] if _faketime() else ["libfaketime"])
    return _required(_faketime())


def ensure_nginx() -> Path:
    """Installs nginx, with which tests start the gateway of docker-compose.yml, and returns its program."""
    _install(lambda: [] if _on_path("nginx") else ["nginx-light"])
    return _required(_on_path("nginx"))


def _install(missing: Callable[[], list[str]]) -> None:
    """Installs the packages that `missing` returns. Raises PackagesMissing if it still returns some."""
    packages = missing()
    if not packages:
        return
    if subprocess.run(["sh", str(INSTALL), *packages], check=False, stdin=subprocess.DEVNULL).returncode != 0:
        raise PackagesMissing(f"could not install: {' '.join(packages)}")
    if still_missing := missing():
        raise PackagesMissing(f"packages are installed, but their programs were not found: {' '.join(still_missing)}")


def _missing() -> list[str]:
    found = {
        "rabbitmq-server": _rabbitmq("rabbitmq-server") and _epmd(),
        "postgresql": _postgres("postgres") and _postgres("initdb"),
        "redis-server": _redis(),
    }
    return [package for package, program in found.items() if program is None]


def _rabbitmq(name: str) -> Path | None:
    return _first(directory / name for directory in RABBITMQ_DIRECTORIES) or _on_path(name)


def _epmd() -> Path | None:
    """Finds epmd, Erlang's port mapper, on PATH or in the folder of the Erlang runtime."""
    return _on_path("epmd") or _first(sorted(Path("/usr/lib/erlang").glob("erts-*/bin/epmd"), reverse=True))


def _postgres(name: str) -> Path | None:
    def version(path: Path) -> float:
        try:
            return float(path.parent.parent.name)
        except ValueError:
            return 0.0

    installed = sorted(POSTGRES_DIRECTORIES.glob(f"*/bin/{name}"), key=version, reverse=True)
    return _first(installed) or _on_path(name)


def _redis() -> Path | None:
    return _on_path("redis-server") or _on_path("valkey-server")


def _faketime() -> Path | None:
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def _first(candidates: Iterable[Path]) -> Path | None:
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _on_path(name: str) -> Path | None:
    # A user's PATH often lacks the sbin directories.
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_DIRECTORIES}")
    return Path(found) if found else None


def _required(path: Path | None) -> Path:
    if path is None:  # it was removed after the check
        raise PackagesMissing("a program was removed during the check")
    return path
