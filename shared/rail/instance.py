"""The number of an instance among its kind: it names files that one process alone may write, and a series of order
numbers.

Replicas that share one environment and one volume cannot be told their numbers; with `auto` each leases one. A lease is
an exclusive lock of the kernel (flock) on `<kind>-<number>.lock`, beside the files that the number names. It is held
for the life of the process and ends with it, however it ends: no clock is trusted, and what lies there, a journal that
was not drained, passes to the next holder together with its number.

The lock holds within one machine. Replicas on several machines have volumes of their own, and are given their numbers.
"""

import fcntl
import itertools
import os
import socket
import time
from pathlib import Path
from typing import IO, Literal, Self

from shared.settings import Settings

_MOST = 1_000
_LOOK_AGAIN = 0.1  # seconds


class NumberTaken(Exception):
    """Another process holds this number, or all of them, or the file system knows no locks."""


class Lease:
    """Holds `number` until `release`, or until the process ends; one that nobody keeps is released by Python."""

    def __init__(self, number: int, file: IO[str] | None) -> None:
        """Without a file: a number that was given, for what needs no lock."""
        self.number = number
        self._file = file

    @classmethod
    def take(cls, folder: Path, kind: str, wanted: "int | Literal['auto']", *, within: float = 10.0) -> "Lease":
        """`auto`: the lowest number that is free. A number: that one, waited for up to `within` seconds, because
        another instance may just be draining its journal (shared/rail/orphaned_journals.py). Raises NumberTaken."""
        if wanted == "auto":
            for number in range(1, _MOST + 1):
                if (lease := cls.attempt(folder, kind, number)) is not None:
                    return lease
            raise NumberTaken(f"all of the numbers 1 to {_MOST} of {kind!r} in {folder} are taken")
        deadline = time.monotonic() + within
        for _ in itertools.count():
            if (lease := cls.attempt(folder, kind, wanted)) is not None:
                return lease
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_AGAIN)
        path = _path(folder, kind, wanted)
        raise NumberTaken(f"number {wanted} of {kind!r} is held by {path.read_text().strip() or 'another'}: {path}")

    @classmethod
    def attempt(cls, folder: Path, kind: str, number: int) -> "Lease | None":
        """None when another has it. Raises NumberTaken where locks cannot be had at all."""
        return cls._lock(_path(folder, kind, number), number)

    @classmethod
    def beside(cls, file: Path) -> "Lease | None":
        """Of the instance that a file belongs to, such as `orders-3.sqlite`. None when another has it. Raises
        NumberTaken as `attempt`."""
        name, _, number = file.stem.rpartition("-")
        return cls._lock(lock_of(file), int(number) if name and number.isdecimal() else 0)

    @classmethod
    def holder(cls, file: Path) -> str | None:
        """Who has that lease now, for people; None: nobody."""
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
            # Never removed: whoever holds a lock on a removed file would share its number with the next.
            file = path.open("a+")
        except OSError as error:
            raise NumberTaken(f"{path}: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            file.close()
            raise NumberTaken(f"{path} cannot be locked: {error}") from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
        file.flush()
        return cls(number, file)

    def release(self) -> None:
        """May be called twice."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def number_of_traces(settings: Settings, kind: str) -> tuple[Settings, Lease]:
    """For a service whose number names nothing but its traces: the settings with a number, with `auto` one that is
    leased beside the traces. Keep the lease for as long as they are written. Raises NumberTaken."""
    if settings.instance == "auto":
        lease = Lease.take(settings.traces_path, kind, "auto")
    else:
        lease = Lease(settings.instance, None)
    return settings.numbered(lease.number), lease


def lock_of(file: Path) -> Path:
    """The lock beside a file that is named after its instance."""
    return file.with_suffix(".lock")


def _path(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number}.lock"
