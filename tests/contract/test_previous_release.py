"""The samples of this release and of the previous one: each release reads what the other one writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.entities import registry
from shared.entities.contract import decode_change
from tests.contract.freeze import SAMPLES
from tests.rigs.previous_release import ROOT, previous_release

# Runs in the tree of the previous release. For each file, prints the reason why it cannot be read, or null.
_READ = """
import json, sys
from shared.entities import registry
from shared.entities.contract import BrokenContract, decode_change
for name in sys.argv[1:]:
    reason = None
    try:
        registry.read(decode_change(open(name, "rb").read()))
    except BrokenContract as error:
        reason = error.reason
    print(json.dumps(reason))
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return previous_release(tmp_path_factory.mktemp("previous-release"))


def test_every_sample_of_the_previous_release_is_here_and_is_read(old: Path) -> None:
    samples = sorted((old / SAMPLES.relative_to(ROOT)).glob("*.json"))
    assert samples
    for sample in samples:
        assert (SAMPLES / sample.name).read_bytes() == sample.read_bytes(), f"{sample.name} was edited"
        registry.read(decode_change(sample.read_bytes()))


def test_the_previous_release_reads_what_this_one_writes(old: Path) -> None:
    """A new event type is unknown there, so the worker must be upgraded first. Everything else, such as a new value of
    an enum, must be read in one release and written in the next."""
    samples = sorted(SAMPLES.glob("*.json"))
    read = subprocess.run(
        [sys.executable, "-c", _READ, *map(str, samples)], cwd=old, capture_output=True, check=True, text=True
    )
    reasons = dict(zip(samples, map(json.loads, read.stdout.splitlines()), strict=True))
    known = {path.name for path in (old / SAMPLES.relative_to(ROOT)).glob("*.json")}
    unreadable = {
        path.name: reason
        for path, reason in reasons.items()
        if reason is not None and (reason != "unknown_type" or path.name in known)
    }
    assert not unreadable
