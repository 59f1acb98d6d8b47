"""Node peers: their packages, by the lock beside them, into `node_modules` (never committed)."""

import shutil
import subprocess
from pathlib import Path

from benchmarks.load import ProgramMissing


def prepared(folder: Path) -> str:
    """The path of Node, with the packages of `folder` installed; raises ProgramMissing."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise ProgramMissing("no Node")
    if not (folder / "node_modules").exists():
        done = subprocess.run(
            [npm, "ci", "--omit=dev", "--no-audit", "--no-fund"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ProgramMissing(f"npm ci failed: {done.stderr.strip()[-200:]}")
    return node
