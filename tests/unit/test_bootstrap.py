"""The Python versions that `deploy/local/bootstrap.sh` accepts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rigs.system import ROOT

_SCRIPT = (ROOT / "deploy/local/bootstrap.sh").read_text()


@pytest.mark.parametrize(
    ("name", "version", "accepted"),
    [
        ("python3.11", (3, 11), True),
        ("python3.14", (3, 14), True),
        ("python3", (3, 15), True),
        ("python3", (4, 0), True),
        ("python3", (3, 10), False),
    ],
)
def test_every_python_from_3_11_on_is_accepted(
    tmp_path: Path, name: str, version: tuple[int, int], accepted: bool
) -> None:
    fake = tmp_path / name
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n')
    fake.chmod(0o755)
    function = re.search(r"^find_usable\(\) \{\n.*?^\}\n", _SCRIPT, re.MULTILINE | re.DOTALL)
    assert function
    found = subprocess.run(
        ["/bin/sh", "-c", f"{function[0]}find_usable 'import venv'"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.stdout == (f"{fake}\n" if accepted else "")
    assert (found.returncode == 0) == accepted
