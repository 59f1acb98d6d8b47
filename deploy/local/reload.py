"""`make dev`: restarts services when a file that they use changes.

`watch` polls the modification times of a few hundred files until it is cancelled.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path

_POLL_INTERVAL_SECONDS = 0.5
_SUFFIXES = {".py", ".lua", ".sql"}


async def watch(
    root: Path, folders: Iterable[str], *, interval: float = _POLL_INTERVAL_SECONDS
) -> AsyncGenerator[list[Path], None]:
    """Yields the files, relative to `root`, that were changed, created or removed.

    It waits until a poll finds no further change, because an editor or `git` writes files one after another.
    """
    names = list(folders)
    before = await asyncio.to_thread(_times, root, names)
    while True:
        await asyncio.sleep(interval)
        after = await asyncio.to_thread(_times, root, names)
        if after == before:
            continue
        while True:
            await asyncio.sleep(interval)
            settled = await asyncio.to_thread(_times, root, names)
            if settled == after:
                break
            after = settled
        yield _changed(before, after)
        before = after


def affected_services(changed: Iterable[Path], services: Mapping[str, str]) -> list[str]:
    """Returns the names of the services that use a changed file. `services` has the folder of each service by name. All
    services share the files outside these folders."""
    paths, folders = list(changed), set(services.values())
    shared = any(not any(path.is_relative_to(folder) for folder in folders) for path in paths)
    return [name for name, folder in services.items() if shared or any(path.is_relative_to(folder) for path in paths)]


def _times(root: Path, folders: list[str]) -> dict[Path, int]:
    found = {}
    for folder in folders:
        for path in (root / folder).rglob("*"):
            if path.suffix in _SUFFIXES:
                try:
                    found[path.relative_to(root)] = path.stat().st_mtime_ns
                except FileNotFoundError:
                    continue  # the file was removed after rglob listed it
    return found


def _changed(before: Mapping[Path, int], after: Mapping[Path, int]) -> list[Path]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
