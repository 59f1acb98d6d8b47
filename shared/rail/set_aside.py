"""Sets a damaged journal file aside: it is renamed and kept unchanged, and a new file takes its name.

The new file gets every intact entry. The damaged ones are logged, and listed in the new file.

    1  write everything that can be read to <name>.rebuilt, durably, before anything else happens
    2  rename <name> and its write-ahead log to <name>.corrupt-<time> and <name>.corrupt-<time>-wal
    3  rename <name>.rebuilt to <name>

After a crash in step 1 nothing has changed, and the next opening starts again. After a crash in step 2 or 3
`finish_set_aside` completes them; every opening of a journal calls it first. If the crash came before the first rename,
it removes <name>.rebuilt instead, and the opening starts again.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import structlog

from shared.rail.journal_file import Damaged, damaged_in, fill, flush_folder, read_only
from shared.rail.journal_salvage import Salvage, wal_of

log = structlog.get_logger(__name__)

_MAX_REPORTED = 20
_JOURNAL = re.compile(r"orders-(\d+)\.sqlite(-wal|\.rebuilt)?")
_ASIDE = re.compile(r"\.corrupt-[0-9TZ.]+(-wal)?$")


def set_aside(path: Path, why: str) -> Path:
    """Sets the file aside and returns its new path. No process may have the file open. Raises sqlite3.Error or OSError,
    for example if there is no space for the new file. The old file then keeps its name."""
    found = Salvage(path)
    generation, earlier = _remembered(path)
    generation = max(generation, len(files_aside(path))) + 1
    rebuilt = _rebuilt(path)
    # The new file has another name until it is complete, because `finish_set_aside` uses a .rebuilt file as it is.
    filling = rebuilt.with_name(f"{rebuilt.name}.filling")
    for one in (rebuilt, filling):
        one.unlink(missing_ok=True)
    damaged: list[Damaged] = []

    def all_damaged() -> Iterator[Damaged]:
        damaged.extend(found.damaged())
        yield from (*earlier, *damaged)

    fill(filling, generation=generation, entries=found.entries(), damaged=all_damaged())
    filling.rename(rebuilt)
    flush_folder(path.parent)
    aside = _move_aside(path)
    finish_set_aside(path)
    log.error(
        "journal_set_aside",
        journal=str(path),
        aside=str(aside),
        why=why,
        kept=found.kept,
        damaged=len(damaged),
        lost=[_described(one) for one in damaged[:_MAX_REPORTED]],
    )
    return aside


def finish_set_aside(path: Path) -> None:
    """Finishes a `set_aside` that a crash interrupted. Does nothing if there is no interrupted one."""
    rebuilt = _rebuilt(path)
    if not rebuilt.exists():
        return
    if path.exists():
        rebuilt.unlink()  # `set_aside` writes it again, because it may be older than the damaged file
        return
    # Otherwise SQLite would apply the write-ahead log of the old file to the new one.
    if wal_of(path).exists():
        _move_aside(path)
    rebuilt.rename(path)
    flush_folder(path.parent)


def journals_in(folder: Path) -> dict[int, Path]:
    """Returns the paths of all journals in a folder, by instance number.

    A journal also counts if a crash has left only its write-ahead log or its .rebuilt file, because `Journal.open`
    restores it. Raises OSError.
    """
    found = (_JOURNAL.fullmatch(one.name) for one in folder.iterdir())
    numbers = sorted({int(match[1]) for match in found if match})
    return {number: folder / f"orders-{number}.sqlite" for number in numbers}


def is_journal_name(name: str) -> bool:
    """Returns whether a journal may have this file name: `orders-<number>.sqlite`."""
    return (match := _JOURNAL.fullmatch(name)) is not None and match[2] is None


def journal_set_aside(name: str) -> str | None:
    """Returns the name of the journal whose set-aside file has this name, or None if it is not a set-aside file."""
    found = _ASIDE.search(name)
    return name[: found.start()] if found and is_journal_name(name[: found.start()]) else None


def files_of(path: Path) -> list[Path]:
    """Returns the existing files that may contain entries of a journal: the file, its write-ahead log and its .rebuilt
    file."""
    return [one for one in (path, wal_of(path), _rebuilt(path)) if one.exists()]


def readable(path: Path) -> Path:
    """Returns the file to read entries from, even if no process has opened the journal since a crash."""
    return _rebuilt(path) if not path.exists() and _rebuilt(path).exists() else path


def files_aside(path: Path) -> list[Path]:
    """Returns the set-aside files of a journal. A write-ahead log is listed only if its file is missing."""
    return [one for one in _aside_in(path.parent) if one.name.startswith(f"{path.name}.corrupt-")]


def count_aside(folder: Path) -> int:
    """Returns the number of set-aside files of all journals in a folder, or 0 if the folder cannot be read."""
    try:
        return len(_aside_in(folder))
    except OSError:
        return 0


def _aside_in(folder: Path) -> list[Path]:
    names = {one.name for one in folder.iterdir() if _ASIDE.search(one.name)}
    return sorted(
        folder / name for name in names if not name.endswith("-wal") or name.removesuffix("-wal") not in names
    )


def _rebuilt(path: Path) -> Path:
    return path.with_name(f"{path.name}.rebuilt")


def _move_aside(path: Path) -> Path:
    """Renames the journal and its write-ahead log. The journal is the first, because nothing has changed as long as it
    has its name. Returns the new path."""
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = path.with_name(f"{path.name}.corrupt-{at}")
    for one, name in ((path, aside), (wal_of(path), wal_of(aside))):
        if one.exists():
            one.rename(name)
            flush_folder(path.parent)
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
    flush_folder(path.parent)
    return aside


def _remembered(path: Path) -> tuple[int, list[Damaged]]:
    """Returns (generation of the number series, entries that were damaged before), as far as the
    old file is readable."""
    generation, damaged = 0, list[Damaged]()
    try:
        with closing(read_only(path)) as db:
            generation = int(db.execute("select max(generation) from series").fetchone()[0])
            damaged = list(damaged_in(db))
    except (sqlite3.Error, TypeError, ValueError) as error:
        log.warning("journal_unreadable", journal=str(path), error=str(error))
    return min(max(generation, 0), 1_000_000), damaged


def _described(one: Damaged) -> str:
    if one.name is None or not one.name.change_id:
        return f"an unknown entry of {len(one.event or b'')} bytes"
    return f"{one.name.subject} version {one.name.version}, change {one.name.change_id}: {one.why}"
