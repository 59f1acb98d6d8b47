"""`make dev`: starts services again when a file that they run from changes.

Looks at the modification times of a few hundred files; `watch` runs until it is cancelled.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

_LOOK_INTERVAL_SECONDS = 0.5
_SUFFIXES = {".py", ".lua", ".sql"}


async def watch(
    root: Path, folders: Iterable[str], *, interval: float = _LOOK_INTERVAL_SECONDS
) -> AsyncIterator[list[Path]]:
    """The files, relative to `root`, that were changed, made or removed. It waits until a further look finds nothing
    more, because an editor or `git` writes files one after the other."""
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


def users_of(changed: Iterable[Path], services: Mapping[str, str]) -> list[str]:
    """Returns the services that run from one of the changed files. `services`: name -> folder. All services share the
    files outside these folders."""
    paths, own = list(changed), set(services.values())
    shared = any(not any(path.is_relative_to(folder) for folder in own) for path in paths)
    return [name for name, folder in services.items() if shared or any(path.is_relative_to(folder) for path in paths)]


def _times(root: Path, folders: list[str]) -> dict[Path, int]:
    found = {}
    for folder in folders:
        for path in (root / folder).rglob("*"):
            if path.suffix in _SUFFIXES:
                try:
                    found[path.relative_to(root)] = path.stat().st_mtime_ns
                except FileNotFoundError:
                    continue  # removed since it was listed
    return found


def _changed(before: Mapping[Path, int], after: Mapping[Path, int]) -> list[Path]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
