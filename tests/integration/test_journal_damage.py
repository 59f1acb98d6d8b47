"""A damaged journal: it keeps every intact entry, reports every other one, and continues to work."""

import asyncio
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Struct
from structlog.testing import capture_logs

from shared.entities.contract import Lane, encode
from shared.rail import set_aside
from shared.rail.journal import Journal
from shared.rail.journal_file import contents, flush_folder, name_of, sum_of, sum_of_name
from shared.rail.journal_salvage import wal_of
from shared.rail.order_numbers import InstanceNumbers
from shared.rail.set_aside import count_aside, files_aside
from tests.rigs.journal_connection import JournalConnections
from tests.rigs.journals import Entry, entry, journal_of, open_and_close

PAGE_BYTES = 4096


def varint(value: int) -> bytes:
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


def record(lane: Lane, event: bytes) -> bytes:
    """An entry in SQLite's record format, written independently of the code that salvages it."""
    types = b"\x00\x2c" + varint(13 + 2 * len(lane)) + varint(12 + 2 * len(event))
    return bytes([len(types) + 1]) + types + sum_of(lane, event) + lane.encode() + event


def record_of_name(lane: Lane, event: bytes) -> bytes:
    name = encode(name_of(lane, event))
    types = b"\x00\x2c" + varint(12 + 2 * len(name))
    return bytes([len(types) + 1]) + types + sum_of_name(name) + name


class Image(Struct, frozen=True):
    """The files of a journal, and the entries that wait in it."""

    main: bytes
    wal: bytes
    waiting: list[Entry]

    def write_files(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        path = folder / "orders-1.sqlite"
        for one in folder.glob("orders-1*"):
            one.unlink()
        path.write_bytes(self.main)
        if self.wal:
            wal_of(path).write_bytes(self.wal)
        return path


async def build(path: Path, *, killed: bool, checkpointed: int = 0) -> Image:
    """Writes a journal. If `killed`, its files are as kill -9 leaves them: the main file has the first batches, and a
    write-ahead log has those after number `checkpointed`."""
    connections = JournalConnections()
    journal = journal_of(path, connect=connections)
    await journal.open()
    waiting: list[Entry] = []
    lanes = [Lane.CRITICAL, Lane.NORMAL, Lane.BACKGROUND]
    for n in range(40):
        batch = [entry(items=(n * 7 + i) % 5 if n % 9 else 40, lane=lanes[n % 3]) for i in range(1 + n % 4)]
        await journal.append(batch)
        waiting += batch
        if n % 10 == 9:
            removed = (await journal.oldest(1_000))[3:8]
            await journal.remove(removed)
            waiting = [one for one in waiting if one not in [(each.lane, each.event) for each in removed]]
        if n == checkpointed:
            connections.newest.execute("pragma wal_checkpoint(TRUNCATE)")
    alive = read_files(path)
    await journal.close()
    main, wal = alive if killed else read_files(path)
    return Image(main, wal, waiting)


def read_files(path: Path) -> tuple[bytes, bytes]:
    """Returns the content of the file and of its write-ahead log."""
    return path.read_bytes(), wal_of(path).read_bytes() if wal_of(path).exists() else b""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    folder = tmp_path_factory.mktemp("images")
    made = (
        build(folder / "orders-1.sqlite", killed=False),
        build(folder / "orders-2.sqlite", killed=True),
        build(folder / "orders-3.sqlite", killed=True, checkpointed=25),
    )
    return [asyncio.run(one) for one in made]


class Damage(Struct, frozen=True):
    kind: str
    file: str
    where: float
    """Position of the damage as a share of the file's length, from 0 to 1."""
    length: int
    content: bytes

    def apply_to(self, data: bytes) -> bytes:
        at = int(self.where * len(data))
        match self.kind:
            case "overwrite":
                return (
                    data[:at]
                    + (self.content * (self.length // len(self.content) + 1))[: self.length]
                    + data[at + self.length :]
                )
            case "flip" if data:
                at = min(at, len(data) - 1)
                return data[:at] + bytes([data[at] ^ (1 << self.length % 8)]) + data[at + 1 :]
            case "zero pages":
                start, count = at // PAGE_BYTES * PAGE_BYTES, 1 + self.length % 3
                return (
                    data[:start]
                    + bytes(len(data[start : start + count * PAGE_BYTES]))
                    + data[start + count * PAGE_BYTES :]
                )
            case "swap pages":
                start = at // PAGE_BYTES * PAGE_BYTES
                one, two = data[start : start + PAGE_BYTES], data[start + PAGE_BYTES : start + 2 * PAGE_BYTES]
                return data[:start] + two + one + data[start + 2 * PAGE_BYTES :]
            case "truncate":
                return data[:at]
        return data


DAMAGE = st.builds(
    Damage,
    kind=st.sampled_from(["overwrite", "flip", "zero pages", "swap pages", "truncate"]),
    file=st.sampled_from(["main", "wal"]),
    where=st.floats(0, 1, exclude_max=True),
    length=st.integers(1, 6_000),
    content=st.binary(min_size=1, max_size=64),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 2), damages=st.lists(DAMAGE, min_size=1, max_size=4))
def test_damaged_journal_keeps_intact_entries_and_reports_all_others(
    images: list[Image], tmp_path: Path, which: int, damages: list[Damage]
) -> None:
    main, wal = images[which].main, images[which].wal
    for damage in damages:
        main, wal = (damage.apply_to(main), wal) if damage.file == "main" else (main, damage.apply_to(wal))
    path = Image(main, wal, []).write_files(tmp_path)
    journal = asyncio.run(open_and_close(path))
    found = contents(path)

    kept, reported = set(found.entries), {one.name.change_id for one in found.damaged if one.name}
    for lane, event in images[which].waiting:
        intact = record(lane, event) in main or record(lane, event) in wal
        if intact:
            assert (lane, event) in kept, "an intact entry was lost"
        elif (lane, event) not in kept:
            named = record_of_name(lane, event) in main or record_of_name(lane, event) in wal
            # In a truncated file an append that never finished looks the same as one that did.
            cut = any(damage.kind == "truncate" for damage in damages)
            assert cut or not named or name_of(lane, event).change_id in reported, "a lost entry was not reported"
            assert cut or journal.damaged or journal.set_aside, "the damage was not reported"
    assert journal.depth == len(found.entries)
    asyncio.run(open_and_close(path, lambda again: again.append([entry()])))
    assert len(contents(path).entries) == journal.depth + 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_undamaged_journal_opens_completely_after_a_kill_and_logs_nothing(
    images: list[Image], tmp_path: Path, which: int
) -> None:
    path = images[which].write_files(tmp_path)
    with capture_logs() as logs:
        journal = asyncio.run(open_and_close(path))
    assert not logs
    assert (journal.damaged, journal.set_aside) == (0, 0)
    assert contents(path).entries == images[which].waiting


async def test_write_ahead_log_that_restarted_many_times_is_not_treated_as_damaged(tmp_path: Path) -> None:
    source, connections = tmp_path / "orders-1.sqlite", JournalConnections()
    journal = journal_of(source, connect=connections)
    await journal.open()
    connections.newest.execute("pragma wal_autocheckpoint=7")
    made = [[entry() for _ in range(1 + n % 9)] for n in range(60)]
    for limit in (0, -1):
        connections.newest.execute(f"pragma journal_size_limit={limit}")
        for n, batch in enumerate(made):
            await journal.append(batch)
            path = Image(*read_files(source), []).write_files(tmp_path / "copy")
            with capture_logs() as logs:
                again = await open_and_close(path)
            assert not logs
            assert again.depth == sum(len(one) for one in made[: n + 1])
        await journal.remove(await journal.oldest(10_000))
    await journal.close()


@pytest.mark.parametrize(
    "main",
    [b"", b"not a database at all" * 500, b"SQLite format 3\0" + bytes(5_000)],
    ids=["empty", "garbage", "a header and zeroes"],
)
def test_file_that_is_not_a_journal_is_set_aside_and_the_journal_works(tmp_path: Path, main: bytes) -> None:
    path = Image(main, b"", []).write_files(tmp_path)
    with capture_logs() as logs:
        journal = asyncio.run(open_and_close(path, lambda one: one.append([entry()])))
    [logged] = [one for one in logs if one["log_level"] == "error"]
    assert (logged["event"], logged["kept"]) == ("journal_set_aside", 0)
    [aside] = files_aside(path)
    assert aside.read_bytes() == main
    assert logged["aside"] == str(aside)
    assert (journal.set_aside, count_aside(tmp_path), journal.depth) == (1, 1, 1)


@pytest.mark.parametrize("main", [b"", b"S", None], ids=["empty", "one byte", "missing"])
def test_entries_of_the_log_are_kept_when_the_file_is_empty_or_missing(
    images: list[Image], tmp_path: Path, main: bytes | None
) -> None:
    path = Image(main or b"", images[1].wal, []).write_files(tmp_path)
    if main is None:
        path.unlink()
    else:
        with pytest.raises(sqlite3.Error):
            contents(path)  # this read fails and leaves the write-ahead log unchanged
    journal = asyncio.run(open_and_close(path))
    first, *others = images[1].waiting  # only the main file had the first entry
    assert set(others) <= set(contents(path).entries)
    assert (journal.set_aside, journal.damaged) == (1, 1)
    assert [one.name for one in contents(path).damaged] == [name_of(*first)]


def test_numbers_start_a_new_series_when_the_highest_may_be_lost(tmp_path: Path) -> None:
    path = tmp_path / "orders-1.sqlite"
    given: list[str] = []

    async def number(journal: Journal) -> None:
        given.append(await InstanceNumbers(journal).next("r", "d"))

    for _ in range(3):
        asyncio.run(open_and_close(path, number))
        path.write_bytes(b"damaged" + path.read_bytes()[7:])
    assert given == ["J1-0001", "J1.1-0001", "J1.2-0001"]
    asyncio.run(open_and_close(path, number))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("update numbers set last = 1")
    asyncio.run(open_and_close(path, number))
    assert len(set(given)) == 5


@pytest.mark.parametrize("step", range(6))
async def test_crash_while_a_file_is_set_aside_loses_nothing(
    images: list[Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The crash happens at one of the renames or before the first one."""
    half = images[2]
    path = Image(b"harmed" + half.main[6:], half.wal, []).write_files(tmp_path)

    class Crash(Exception):
        pass

    renames = 0
    rename, flush = Path.rename, flush_folder

    def crash_at(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == step:
            raise Crash
        return rename(self, target)

    def crash_before(folder: Path) -> None:
        if step == 0:
            raise Crash
        flush(folder)

    monkeypatch.setattr(Path, "rename", crash_at)
    monkeypatch.setattr(set_aside, "flush_folder", crash_before)
    journal = journal_of(path)
    try:
        await journal.open()
    except Crash:
        assert step < 5
    await journal.close()
    monkeypatch.undo()
    await open_and_close(path)
    assert set(half.waiting) <= set(contents(path).entries)
    assert not path.with_name(f"{path.name}.rebuilt").exists()


# -- damage while the journal is open --------------------------------------------------------------------------------


async def test_flipped_bit_in_an_event_removes_only_that_entry_and_names_it(tmp_path: Path) -> None:
    path, connections = tmp_path / "orders-1.sqlite", JournalConnections()
    journal = journal_of(path, connect=connections)
    await journal.open()
    good, bad, last = entry(), entry(), entry(lane=Lane.NORMAL)
    await journal.append([good, bad, last])
    flipped = bad[1].replace(b'"quantity":1', b'"quantity":3', 1)
    connections.newest.execute("update entries set event = ? where seq = 2", (flipped,))
    with capture_logs() as logs:
        found = await journal.oldest(10)
    assert [(one.lane, one.event) for one in found] == [good, last]
    [logged] = [one for one in logs if one["log_level"] == "error"]
    assert logged["name"].change_id == name_of(*bad).change_id
    assert (journal.depth, journal.damaged) == (2, 1)
    await journal.remove(found)
    assert (journal.depth, journal.bytes, journal.damaged) == (0, 0, 1)
    await journal.close()
    assert contents(path).damaged[0].event == flipped
    assert (await open_and_close(path)).damaged == 1  # the damage is still reported after a restart


async def test_damaged_page_of_an_open_journal_makes_it_set_the_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "orders-1.sqlite"
    made = [entry() for _ in range(60)]
    await open_and_close(path, lambda one: one.append(made))
    connections = JournalConnections()
    journal = journal_of(path, connect=connections)
    await journal.open()
    # SQLite must read the damaged page from the disk, not from its cache.
    connections.newest.execute("pragma shrink_memory")
    page = read_files(path)[0].index(made[30][1][:200]) // PAGE_BYTES
    damage = (
        "import sys; f = open(sys.argv[1], 'r+b'); f.seek(int(sys.argv[2]) * 4096); f.write(bytes(4096)); f.close()"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", damage, str(path), str(page))
    assert await process.wait() == 0
    found = await journal.oldest(1_000)
    assert 50 < len(found) < 60
    assert {(one.lane, one.event) for one in found} < set(made)
    assert (journal.set_aside, journal.damaged, journal.depth) == (1, 60 - len(found), len(found))
    assert {one.name.change_id for one in contents(path).damaged if one.name} == {
        name_of(*one).change_id for one in made if one not in [(each.lane, each.event) for each in found]
    }
    await journal.append([entry()])
    # The salvage may have renumbered the entries since they were read. The journal still removes them.
    await journal.remove(found)
    assert journal.depth == 1
    await journal.close()
