"""Journals in a test's folder, and entries for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.entities.contract import Lane, encode
from shared.rail.journal import Journal
from tests.rigs import builders

Entry = tuple[Lane, bytes]


def entry(*, items: int = 3, lane: Lane = Lane.CRITICAL) -> Entry:
    return lane, encode(builders.change(builders.order(items=items)))


def journal_of(path: Path, **options: Any) -> Journal:
    return Journal(path, instance=1, max_bytes=1 << 26, **options)


async def open_and_close(path: Path, work: Callable[[Journal], Any] | None = None) -> Journal:
    """Opens the journal, does the work and closes it; its counters stay readable."""
    journal = journal_of(path)
    await journal.open()
    try:
        if work is not None:
            await work(journal)
    finally:
        await journal.close()
    return journal
