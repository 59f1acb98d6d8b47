"""A journal on a disk that is full, fails, or could not be used before."""

import asyncio
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from shared.messaging.publisher import NotSent, Publisher
from shared.rail.journal import JournalBroken, JournalFull, JournalInDoubt
from shared.rail.journal_file import contents
from shared.rail.record import Recorder, Unrecorded
from tests.rigs.journal_connection import JournalConnections
from tests.rigs.journals import entry, journal_of, open_and_close
from tests.rigs.system import ROOT


async def test_journal_reserves_the_disk_space_that_draining_needs(tmp_path: Path) -> None:
    path = tmp_path / "orders-1.sqlite"
    journal = journal_of(path, reserve_bytes=1 << 60)
    await journal.open()
    with pytest.raises(JournalFull, match="bytes left"):
        await journal.append([entry()])
    await journal.close()
    journal = journal_of(path, reserve_bytes=1)
    await journal.open()
    await journal.append([entry()])
    assert journal.depth == 1
    await journal.close()


REFUSED = """
import asyncio, os, resource, sys
from pathlib import Path
from shared.entities.contract import Lane
from shared.rail.journal import Journal, JournalBroken, JournalInDoubt

async def main():
    path = Path(sys.argv[1])
    journal = Journal(path, instance=1, max_bytes=1 << 24)
    await journal.open()
    for _ in range(40):
        await journal.append([(Lane.CRITICAL, b"kept" * 1_000)])
    room = os.path.getsize(f"{path}-wal") + 5 * 4_120 + 1_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        await journal.append([(Lane.CRITICAL, b"refused %03d" % n * 100) for n in range(60)])
        print("taken")
    except JournalBroken as error:
        print("in doubt" if isinstance(error, JournalInDoubt) else "refused")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if sys.argv[2] == "go on":
        await journal.append([(Lane.CRITICAL, b"later")])
    sys.stdout.flush()
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


@pytest.mark.parametrize("then", ["go on", "die"])
async def test_append_that_the_disk_refused_does_not_reappear_after_a_crash(tmp_path: Path, then: str) -> None:
    path = tmp_path / "orders-1.sqlite"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", REFUSED, str(path), then, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    output = (await asyncio.wait_for(process.communicate(), 30))[0].decode()
    assert output == "refused\n"
    with capture_logs() as logs:
        await open_and_close(path)
    events = [event for _, event in contents(path).entries]
    assert events == [b"kept" * 1_000] * 40 + ([b"later"] if then == "go on" else [])
    assert not logs


async def test_append_that_may_be_on_disk_is_in_doubt_and_counts_as_sent(tmp_path: Path) -> None:
    connections = JournalConnections()
    journal = journal_of(tmp_path / "orders-1.sqlite", connect=connections)
    await journal.open()
    db = connections.newest
    db.fails_next = ["commit", "pragma wal_checkpoint"]
    with pytest.raises(JournalInDoubt):
        await journal.append([entry()])
    db.fails_next = ["pragma wal_checkpoint"]
    with pytest.raises(JournalBroken) as refused:  # the journal refuses entries until it has cleaned up
        await journal.append([entry()])
    assert not isinstance(refused.value, JournalInDoubt)
    assert not db.fails_next
    recorder = Recorder(cast(Publisher, UnavailableBroker()), journal, max_publishes=1)
    db.fails_next = ["commit", "pragma wal_checkpoint"]
    with pytest.raises(Unrecorded) as unrecorded:
        await recorder.record(*entry())
    assert unrecorded.value.sent
    assert not db.fails_next
    await journal.append([entry()])
    assert journal.depth == 1
    await journal.close()


class UnavailableBroker:
    async def publish(self, *_: Any) -> None:
        raise NotSent("unavailable")


async def test_append_opens_a_journal_that_could_not_be_opened_before(tmp_path: Path) -> None:
    path, seconds = tmp_path / "orders-1.sqlite", 0.0
    path.mkdir()
    journal = journal_of(path, clock=lambda: seconds)
    with pytest.raises(JournalBroken):
        await journal.open()
    path.rmdir()
    seconds = 0.9
    with pytest.raises(JournalBroken, match="a moment ago"):
        await journal.append([entry()])
    seconds = 1.0
    await journal.append([entry()])
    assert (journal.opened, journal.depth) == (True, 1)
    await journal.close()
