"""The packages of the Node peers: installed from the lock file beside each into `node_modules`, never committed."""

import shutil
import subprocess
from pathlib import Path

from benchmarks.load import ProgramMissing


def prepared(folder: Path) -> str:
    """Installs the packages of `folder` and returns the path of Node. Raises ProgramMissing."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise ProgramMissing("Node is not installed: apt-get install nodejs npm")
    modules = folder / "node_modules"
    if not modules.exists():
        done = subprocess.run(
            [npm, "ci", "--omit=dev", "--no-audit", "--no-fund"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            shutil.rmtree(modules, ignore_errors=True)  # half of the packages must not pass for all of them
            raise ProgramMissing(f"npm ci failed: {done.stderr.strip()[-200:]}")
    return node
