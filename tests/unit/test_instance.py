"""Instance numbers: each number has one holder, which keeps it until it releases it or its process ends."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.rail.instance import Lease, NumberTaken, number_of_traces
from shared.settings import Settings
from tests.rigs.system import ROOT

HOLDER = """
import sys
from pathlib import Path
from shared.rail.instance import Lease
lease = Lease.take(Path(sys.argv[1]), "orders", "auto")
print(lease.number, flush=True)
sys.stdin.read()
"""


class Holder:
    """A process that takes a number and holds it until it is killed."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout
        self.number = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[list[Holder]]:
    made = [Holder(tmp_path) for _ in range(3)]
    yield made
    for holder in made:
        holder.kill()


def test_processes_that_share_a_folder_get_different_numbers(holders: list[Holder]) -> None:
    assert [holder.number for holder in holders] == [1, 2, 3]


def test_the_number_of_a_killed_process_is_leased_again(holders: list[Holder], tmp_path: Path) -> None:
    holders[1].kill()
    with Lease.take(tmp_path, "orders", "auto") as lease:
        assert lease.number == 2
        assert Lease.attempt(tmp_path, "orders", 2) is None
    assert Lease.attempt(tmp_path, "orders", 2) is not None


def test_a_held_number_is_refused_and_the_error_names_its_holder(holders: list[Holder], tmp_path: Path) -> None:
    with pytest.raises(NumberTaken, match=f"number 1 of 'orders' is held by .* process {holders[0].process.pid}"):
        Lease.take(tmp_path, "orders", 1, within=0.2)


def test_each_kind_has_its_own_numbers_and_a_released_number_is_free(tmp_path: Path) -> None:
    first = Lease.take(tmp_path, "orders", "auto")
    assert Lease.take(tmp_path, "notifier", "auto").number == 1
    first.release()
    first.release()
    assert Lease.take(tmp_path, "orders", "auto").number == 1


def test_a_folder_that_is_not_writable_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NumberTaken, match="file"):
        Lease.take(tmp_path / "file", "orders", "auto")


def test_a_fixed_number_needs_no_lock_for_its_traces(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, home=tmp_path, instance=7)
    numbered, lease = number_of_traces(settings, "notifier")
    assert (numbered.instance, lease.number) == (7, 7)
    assert not settings.traces_path.exists()
    lease.release()


def test_auto_becomes_a_number_that_names_the_journal(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, home=tmp_path, instance="auto")
    with pytest.raises(ValueError, match="auto"):
        _ = settings.journal_path
    first, held = number_of_traces(settings, "notifier")
    second, _ = number_of_traces(settings, "notifier")
    assert (first.instance_number, second.instance_number, held.number) == (1, 2, 1)
    assert second.journal_path == tmp_path / "journal" / "orders-2.sqlite"


ON_FULL_DISK = """
import resource, sys
from pathlib import Path
from shared.rail.instance import Lease
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # every write to a file fails
lease = Lease.take(Path(sys.argv[1]), "orders", "auto")
print(lease.number, Lease.attempt(Path(sys.argv[1]), "orders", lease.number), file=sys.stderr)
"""


def test_a_number_can_be_taken_while_the_disk_is_full(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ON_FULL_DISK, str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )
    assert ended.stderr == "1 None\n"
