"""Installs the packages of the Node peers from their lock files into `node_modules`, which is never committed."""

import shutil
import subprocess
from pathlib import Path

from benchmarks.load import ProgramMissing


def install_packages(folder: Path) -> str:
    """Installs the packages of `folder` and returns the path of Node. Raises ProgramMissing."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise ProgramMissing("Node is not installed: apt-get install nodejs npm")
    modules = folder / "node_modules"
    if not modules.exists():
        process = subprocess.run(
            [npm, "ci", "--omit=dev", "--no-audit", "--no-fund"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode != 0:
            shutil.rmtree(modules, ignore_errors=True)  # the next run would take a partial folder for a complete one
            raise ProgramMissing(f"npm ci failed: {process.stderr.strip()[-200:]}")
    return node
