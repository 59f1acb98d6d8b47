"""The number of an instance among all instances of its kind, such as `orders`. The number names files that only one
process may write, and a series of order numbers.

Replicas that share one environment and one volume cannot have configured numbers. With `auto`, each one leases a
number. A lease is an exclusive lock of the kernel (flock) on `<kind>-<number>.lock`, in the folder of the files that
the number names. The lease lasts as long as the process and depends on no clock. A journal that was not drained passes
to the next holder of its number.

The lock works within one machine. Replicas on several machines have separate volumes and configured numbers.
"""

import fcntl
import itertools
import os
import select
import socket
import time
from pathlib import Path
from typing import IO, Literal, Self

import structlog

from shared.settings import Settings

log = structlog.get_logger(__name__)

_MAX_INSTANCE_NUMBER = 1_000
_POLL_INTERVAL_SECONDS = 0.1


class NumberTaken(Exception):
    """Another process holds this number, or all numbers are held, or the file system does not support locks."""


class Lease:
    """Holds `number` until `release` or the end of the process. Keep a reference; otherwise Python
    releases the lease."""

    def __init__(self, number: int, file: IO[str] | None) -> None:
        """`file`: the locked file; None for a configured number that needs no lock."""
        self.number = number
        self._file = file

    @classmethod
    def take(cls, folder: Path, kind: str, requested: "int | Literal['auto']", *, within: float = 10.0) -> "Lease":
        """Takes the lease of a number. With `auto` this is the lowest free number. For a given number it waits up to
        `within` seconds, because another instance may be draining the journal of this number
        (shared/rail/orphaned_journals.py). Raises NumberTaken."""
        if requested == "auto":
            for number in range(1, _MAX_INSTANCE_NUMBER + 1):
                if (lease := cls.attempt(folder, kind, number)) is not None:
                    return lease
            raise NumberTaken(f"all of the numbers 1 to {_MAX_INSTANCE_NUMBER} of {kind!r} in {folder} are taken")
        deadline = time.monotonic() + within
        for _ in itertools.count():
            if (lease := cls.attempt(folder, kind, requested)) is not None:
                return lease
            if time.monotonic() > deadline:
                break
            # time.sleep raises an error if the tests move the clock of this process with libfaketime.
            select.select([], [], [], _POLL_INTERVAL_SECONDS)
        path = _path(folder, kind, requested)
        owner = path.read_text().strip() or "another process"
        raise NumberTaken(f"number {requested} of {kind!r} is held by {owner}: {path}")

    @classmethod
    def attempt(cls, folder: Path, kind: str, number: int) -> "Lease | None":
        """Returns the lease of a number, or None if another process holds it. Raises NumberTaken if the file system
        does not support locks."""
        return cls._lock(_path(folder, kind, number), number)

    @classmethod
    def of_file(cls, file: Path) -> "Lease | None":
        """Returns the lease of the instance that a file belongs to, such as `orders-3.sqlite`. Returns None if another
        process holds it. Raises NumberTaken like `attempt`."""
        name, _, number = file.stem.rpartition("-")
        return cls._lock(lock_of(file), int(number) if name and number.isdecimal() else 0)

    @classmethod
    def holder(cls, file: Path) -> str | None:
        """Returns a description of the process that holds the lease of a file, or None if the lease is free."""
        try:
            with lock_of(file).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except BlockingIOError:
            return lock_of(file).read_text().strip() or "another process"
        except OSError:
            return None

    @classmethod
    def _lock(cls, path: Path, number: int) -> "Lease | None":
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The file is never removed. Otherwise the holder of a lock on the removed file and the next process would
            # have the same number.
            file = path.open("a+")
        except OSError as error:
            raise NumberTaken(f"{path} cannot be opened: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            file.close()
            raise NumberTaken(f"{path} cannot be locked: {error}") from error
        try:
            # Only for people: the lock is held without it. The file has no buffer, so that no text is left to write
            # when the disk is full.
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{socket.gethostname()}, process {os.getpid()}\n".encode())
        except OSError as error:
            log.warning("lease_without_description", lock=str(path), error=str(error))
        return cls(number, file)

    def release(self) -> None:
        """Releases the lease. May be called twice."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def number_of_traces(settings: Settings, kind: str) -> tuple[Settings, Lease]:
    """Returns (settings with a number, its lease) for a service whose number only names its trace files. With `auto` it
    leases a number in the folder of the traces. Keep the lease as long as traces are written. Raises NumberTaken."""
    if settings.instance == "auto":
        lease = Lease.take(settings.traces_path, kind, "auto")
    else:
        lease = Lease(settings.instance, None)
    return settings.numbered(lease.number), lease


def lock_of(file: Path) -> Path:
    """Returns the lock file of a file that is named after its instance."""
    return file.with_suffix(".lock")


def _path(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number}.lock"
