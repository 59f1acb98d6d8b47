"""The tree of the previous release, whose services run beside those of this tree.

The tree comes from git, so no old code lies in the repository. After a release, set `PREVIOUS_RELEASE` to its tag.
"""

import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREVIOUS_RELEASE = "HEAD"
"""A tag. Before the first release, a commit that has the same keys, tables and queues as this tree."""


class NoHistory(Exception):
    """This tree lacks the previous release: it is an archive of the sources or a shallow clone."""


def previous_release(folder: Path) -> Path:
    """Writes the tree of the previous release into `folder` and returns it. Skips the test, with the reason, without
    that history."""
    try:
        return write_previous_release(folder)
    except NoHistory as error:
        # A source archive and a shallow clone have no history. The reason names what to fetch.
        pytest.skip(str(error))


def write_previous_release(folder: Path) -> Path:
    """Writes the tree of the previous release into `folder` and returns it. Raises NoHistory."""
    try:
        top, commit = _git("rev-parse", "--show-toplevel", "--verify", f"{PREVIOUS_RELEASE}^{{commit}}").splitlines()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise NoHistory(f"only a full clone has the previous release {PREVIOUS_RELEASE}: {error}") from error
    if Path(top) != ROOT:
        raise NoHistory(f"{ROOT} is not a clone: its files lie in the repository {top}")
    with tempfile.TemporaryFile() as archive:
        subprocess.run(["git", "archive", "--format=tar", commit], cwd=ROOT, stdout=archive, check=True)
        archive.seek(0)
        subprocess.run(["tar", "-x", "-C", folder], stdin=archive, check=True)
    return folder


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, text=True).stdout
