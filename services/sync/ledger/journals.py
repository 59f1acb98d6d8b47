"""Reads the changes in the journals on this host, for reports of the ledger."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import structlog
from msgspec import Struct

from services.sync.ledger.log_changes import is_id
from shared.rail.journal_file import Damaged, Name, list_entries, name_of
from shared.rail.journal_salvage import Salvage
from shared.rail.set_aside import journals_in, readable

log = structlog.get_logger(__name__)


class Journals(Struct, frozen=True):
    waiting: dict[str, tuple[Name, str]]
    """Change id -> its name and that of its journal, for intact entries."""
    damaged: dict[str, tuple[Name, str]]
    """The same for damaged entries without an intact copy in any journal."""
    depths: dict[str, int]
    """Name of a journal -> number of its intact entries."""
    unreadable: list[str]
    """The names of journals that could not be read."""


def journals(folder: Path) -> Journals:
    """Reads all journals in the folder without changing them. Their instances may run."""
    found = Journals({}, {}, {}, [])
    for path in journals_in(folder).values() if folder.exists() else ():
        try:
            waiting, damaged = list_entries(readable(path))
        except (sqlite3.Error, ValueError) as error:
            log.warning("journal_salvaged", journal=str(path), error=str(error))
            try:
                waiting, damaged = _salvaged(readable(path))
            except OSError:
                found.unreadable.append(path.name)
                continue
        found.depths[path.name] = len(waiting)
        found.waiting.update(_entries(waiting, path.name))
        found.damaged.update(_entries([entry.name for entry in damaged if entry.name is not None], path.name))
    for change_id in found.waiting.keys() & found.damaged.keys():
        del found.damaged[change_id]
    return found


def _salvaged(path: Path) -> tuple[list[Name], list[Damaged]]:
    salvage = Salvage(path)
    return [name_of(lane, event) for lane, event in salvage.entries()], salvage.damaged()


def _entries(names: Sequence[Name], journal: str) -> dict[str, tuple[Name, str]]:
    return {name.change_id: (name, journal) for name in names if is_id(name.change_id)}
