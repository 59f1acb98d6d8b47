"""A home for a RabbitMQ node with the plugins that it uses, made of links into the installed one.

A node that starts looks for each of its thousand modules in the folder of one installed plugin after the other; most of
those looks fail. Without what nobody enabled, RabbitMQ is up after 0.6 (3.10) or 0.7 (4.0) times the seconds.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_APPLICATIONS = re.compile(r"\{\s*(?:applications|included_applications)\s*,\s*\[([^]]*)\]")
_BROKER = "rabbit"
_UNREADABLE = re.compile(r"[\s:*?[]")  # not quoted in the scripts, and in a list with colons


def make_home(program: Path, home: Path, plugins: Iterable[str]) -> Path | None:
    """Makes `home` anew, for the server script `program` and these plugins with all that they need. Returns the
    directory of its scripts, for RABBITMQ_SCRIPTS_DIR; None where the installed files do not lie as RabbitMQ's own
    packages lay them, or its scripts could not read the path of `home`: then the node is to run from those."""
    if _UNREADABLE.search(str(home)):
        return None
    installed = program.resolve().parent.parent
    folders = list((installed / "plugins").glob("*-*/"))
    found = {folder.name.partition("-")[0]: folder for folder in folders}
    if len(found) < len(folders):  # of two versions RabbitMQ takes the newer one
        return None
    needs = {name: _needs(folder / "ebin" / f"{name}.app") for name, folder in found.items()}
    wanted = _with_all_they_need({_BROKER, *plugins}, needs)
    if not wanted <= found.keys():
        return None
    shutil.rmtree(home, ignore_errors=True)
    (home / "plugins").mkdir(parents=True)
    for part in ("sbin", "escript"):
        (home / part).symlink_to(installed / part)
    for name in wanted:
        (home / "plugins" / found[name].name).symlink_to(found[name])
    return home / "sbin"


def _needs(app: Path) -> set[str]:
    """What an application's resource file says that it needs: plugins, libraries and parts of Erlang alike."""
    try:
        said = app.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {name.strip() for names in _APPLICATIONS.findall(said) for name in names.split(",") if name.strip()}


def _with_all_they_need(names: set[str], needs: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = set(names)
    while left:
        found |= left
        left = {one for name in left for one in needs.get(name, ()) if one in needs} - found
    return found
