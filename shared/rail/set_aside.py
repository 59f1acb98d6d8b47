"""A journal whose file is damaged is set aside: renamed beside itself, never changed and never removed, while a new
file takes its name with every entry that could be read whole. What could not is told in the log, and listed in the new
file.

    1  everything that can be read goes into <name>.mended, which is durable before anything else happens
    2  <name> and its write-ahead log are renamed to <name>.corrupt-<time> and <name>.corrupt-<time>-wal
    3  <name>.mended becomes <name>

A crash in 1 leaves all as it was: it is begun again. One behind the first rename is finished by `finish`, which every
opening begins with.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import structlog

from shared.rail.journal_file import Damaged, damaged_in, fill, flush_folder, read_only
from shared.rail.salvage import Salvage, wal_of

log = structlog.get_logger(__name__)

_MOST_TOLD = 20
_JOURNAL = re.compile(r"orders-(\d+)\.sqlite(-wal|\.mended)?")
_ASIDE = re.compile(r"\.corrupt-[0-9TZ.]+(-wal)?$")


def set_aside(path: Path, why: str) -> Path:
    """Returns where it lies now. Nobody may have the file open. Raises sqlite3.Error or OSError when there is no room
    for the new one: then the old one is where it was."""
    found = Salvage(path)
    generation, earlier = _remembered(path)
    generation = max(generation, len(files_aside(path))) + 1
    mended = _mended(path)
    # By another name until it is whole: where the old file has lost its name, `finish` takes the mended one as it is.
    filling = mended.with_name(f"{mended.name}.filling")
    for one in (mended, filling):
        one.unlink(missing_ok=True)
    damaged: list[Damaged] = []

    def all_damaged() -> Iterator[Damaged]:
        damaged.extend(found.damaged())
        yield from (*earlier, *damaged)

    fill(filling, generation=generation, entries=found.entries(), damaged=all_damaged())
    filling.rename(mended)
    flush_folder(path.parent)
    aside = _move_aside(path)
    finish(path)
    log.error(
        "journal_set_aside",
        journal=str(path),
        aside=str(aside),
        why=why,
        kept=found.kept,
        damaged=len(damaged),
        lost=[_told(one) for one in damaged[:_MOST_TOLD]],
    )
    return aside


def finish(path: Path) -> None:
    """What a crash in the middle of `set_aside` has left to do."""
    mended = _mended(path)
    if not mended.exists():
        return
    if path.exists():
        mended.unlink()  # it may lack something: it is made again
        return
    # SQLite would play the log of the old file into the new one.
    if wal_of(path).exists():
        _move_aside(path)
    mended.rename(path)
    flush_folder(path.parent)


def journals_in(folder: Path) -> dict[int, Path]:
    """Number of its instance -> the journal, of all in a folder. One whose file is gone is there while its log is, or
    what a crash has left of mending it: `Journal.open` makes it whole. Raises OSError."""
    found = (_JOURNAL.fullmatch(one.name) for one in folder.iterdir())
    numbers = sorted({int(match[1]) for match in found if match})
    return {number: folder / f"orders-{number}.sqlite" for number in numbers}


def files_of(path: Path) -> list[Path]:
    """In which its entries may be, as far as they are there: the file, its log, and what is to take its place."""
    return [one for one in (path, wal_of(path), _mended(path)) if one.exists()]


def readable(path: Path) -> Path:
    """The file to read of a journal that nobody has opened since a crash."""
    return _mended(path) if not path.exists() and _mended(path).exists() else path


def files_aside(path: Path) -> list[Path]:
    """Of this journal; a log counts where it is without its file."""
    return [one for one in _aside_in(path.parent) if one.name.startswith(f"{path.name}.corrupt-")]


def count_aside(folder: Path) -> int:
    """Of all journals in a folder."""
    try:
        return len(_aside_in(folder))
    except OSError:
        return 0


def _aside_in(folder: Path) -> list[Path]:
    names = {one.name for one in folder.iterdir() if _ASIDE.search(one.name)}
    return sorted(
        folder / name for name in names if not name.endswith("-wal") or name.removesuffix("-wal") not in names
    )


def _mended(path: Path) -> Path:
    return path.with_name(f"{path.name}.mended")


def _move_aside(path: Path) -> Path:
    """The file first: while it has its name, everything is as it was."""
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
    """(series of numbers, what was damaged before), where the old file still tells them."""
    generation, damaged = 0, list[Damaged]()
    try:
        with closing(read_only(path)) as db:
            generation = int(db.execute("select max(generation) from series").fetchone()[0])
            damaged = list(damaged_in(db))
    except (sqlite3.Error, TypeError, ValueError) as error:
        log.warning("journal_unreadable", journal=str(path), error=str(error))
    return min(max(generation, 0), 1_000_000), damaged


def _told(one: Damaged) -> str:
    if one.name is None or not one.name.change_id:
        return f"something of {len(one.event or b'')} bytes"
    return f"{one.name.subject} version {one.name.version}, change {one.name.change_id}: {one.why}"
