"""A copy of this tree, which a test may edit."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def copy_tree(root: Path) -> Path:
    """Makes the folder `root` with the files of a fresh clone and this virtual environment; returns it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / ".venv").symlink_to(Path(sys.prefix))
    (root / ".local").mkdir()
    return root


def edit_lines(path: Path, difference: str) -> None:
    """Applies a diff: replaces the lines with ' ' and '-' by the lines with ' ' and '+'. The file must contain the
    replaced lines exactly once."""
    lines = difference.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} does not contain exactly once:\n{before}"
    path.write_text(text.replace(before, after))
