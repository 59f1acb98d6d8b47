"""Salvages the intact entries of a damaged journal file.

Python's sqlite3 module does not include SQLite's recovery, and SQLite finds a row only through intact pages above it.
This module trusts no structure. It searches every page for byte patterns of an entry's record, and the sum of the entry
proves that every byte is as it was written. It therefore finds each entry whose own bytes are intact, even if the
header, the pages above it or the write-ahead log are damaged.

It searches all pages of the file, the pages that the write-ahead log has committed, and the rest of that log. The rest
contains entries that were committed behind a damaged frame, and entries of an append that a crash interrupted, which
were never acknowledged. The search may also find entries that were drained before. Sending them again does no harm.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct

from shared.entities.contract import Lane
from shared.rail.journal_file import NOT_WHOLE, PAGE, Damaged, Name, name_of, read_name, sum_of, sum_of_name

# A record is the length of its header, a type for each column, and then the values. Our types are 0 (the row id stands
# for the column), 0x2c (a blob of 16 bytes, the sum), odd numbers (a text) and even numbers (a blob). See
# https://www.sqlite.org/fileformat2.html.
_RECORD = re.compile(rb"\x00\x2c")
_LANES = {13 + 2 * len(lane): lane.value for lane in Lane}
_MAX_EVENT_BYTES = 32 << 20
_MAX_LOCAL_BYTES = PAGE - 35
_MIN_LOCAL_BYTES = (PAGE - 12) * 32 // 255 - 23

_WAL_HEADER = struct.Struct(">IIIIIIII")
_FRAME = struct.Struct(">IIIIII")
_SLOT = _FRAME.size + PAGE
_MASK = 0xFFFFFFFF
_OLDER = 1 << 10


class Wal(Struct):
    """A write-ahead log. It is parsed without SQLite, because SQLite ignores everything after a damaged frame."""

    committed: dict[int, int]
    """Page number -> byte offset of its newest committed content in the log."""
    behind: list[tuple[int, int]]
    """(page number, byte offset) of each frame after the last commit, in order."""
    rest: tuple[int, int]
    """Byte offsets at which the part after the last commit begins and ends."""
    problem: str | None
    """A description of the damage, or None. A frame that a crash cut short does not count as damage."""


def read_wal(data: "bytes | mmap.mmap") -> Wal:
    if len(data) < _WAL_HEADER.size + _FRAME.size:
        return Wal({}, [], (0, 0), None)
    magic, version, page, _, salt, salt_2, *proof = _WAL_HEADER.unpack_from(data)
    order = ">" if magic & 1 else "<"
    state = _checksum(data[:24], order, (0, 0))
    sound = magic & ~1 == 0x377F0682 and version == 3007000 and page == PAGE and tuple(proof) == state
    problem = None if sound else "its write-ahead log has a damaged header"
    committed: dict[int, int] = {}
    behind: list[tuple[int, int]] = []
    valid, rest, end = sound, _WAL_HEADER.size, len(data)
    for slot in range(_WAL_HEADER.size, len(data) - _FRAME.size, _SLOT):
        number, pages, its_salt, its_salt_2, *proof = _FRAME.unpack_from(data, slot)
        whole = slot + _SLOT <= len(data)
        if valid and whole:
            state = _checksum(data[slot : slot + 8] + data[slot + _FRAME.size : slot + _SLOT], order, state)
            if tuple(proof) != state and 0 < (salt - its_salt) & _MASK < _OLDER:
                # The frame belongs to an earlier log, which is completely in the file: each log increases the salt.
                end = slot
                break
            valid = (its_salt, its_salt_2) == (salt, salt_2) and tuple(proof) == state
            if not valid:
                problem = f"its write-ahead log is damaged from byte {slot} on"
        behind.append((number, slot + _FRAME.size))
        if valid and whole and pages:
            committed.update(behind)
            behind.clear()
            rest = slot + _SLOT
    return Wal(committed, behind, (rest, end), problem)


def wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def wal_problem(path: Path) -> tuple[str | None, bool]:
    """Returns (the damage of this file's write-ahead log or None, whether frames follow its last commit)."""
    try:
        wal = read_wal(wal_of(path).read_bytes())
    except FileNotFoundError:
        return None, False
    return wal.problem, bool(wal.behind)


class Salvage:
    """Finds the entries in a file and its write-ahead log. One of the two may be missing. The file must not be open
    elsewhere in this process, because the kernel releases all locks of a process when it closes the file once. Raises
    OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._whole: set[bytes] = set()
        self._broken: dict[bytes, tuple[str, bytes]] = {}
        self._names: dict[str, Name] = {}

    @property
    def kept(self) -> int:
        return len(self._whole)

    def entries(self, *, unfinished: bool = False) -> Iterator[tuple[str, bytes]]:
        """Yields lane and event of each intact entry once. `unfinished`: searches only the part of the log after its
        last commit."""
        with ExitStack() as opened:
            main, log = (_mapped(one, opened) for one in (self._path, wal_of(self._path)))
            pages = _Pages(main, log, read_wal(log))
            for image in pages.unfinished() if unfinished else pages.images():
                for found in _RECORD.finditer(image):
                    if (entry := self._look(image, found.start() - 1, pages)) is not None:
                        yield entry

    def damaged(self) -> list[Damaged]:
        """Returns the entries that are not intact. Call it after `entries` is exhausted."""
        lost = {entry: name for entry, name in self._names.items() if bytes.fromhex(entry) not in self._whole}
        damaged = []
        for proof, (lane, event) in self._broken.items():
            if proof not in self._whole:
                name = lost.pop(proof.hex(), None) or name_of(lane, event)
                damaged.append(Damaged(lane=lane, event=event, name=name, why=NOT_WHOLE))
        return damaged + [
            Damaged(lane=name.lane, name=name, why="the bytes of the entry are lost") for name in lost.values()
        ]

    def _look(self, image: "bytes | mmap.mmap", at: int, pages: "_Pages") -> tuple[str, bytes] | None:
        """Parses the bytes at this place as a record. Returns the entry if they are an intact entry. Remembers the name
        if they are an intact name."""
        if at < 0 or at + 4 > len(image):
            return None
        if (lane := _LANES.get(image[at + 3])) is not None:
            kind, end = _varint(image, at + 4)
            proof, start = image[end : end + 16], end + 16 + len(lane)
            if _fits(image[at], end - at, kind) and image[end + 16 : start] == lane.encode():
                return self._entry(lane, proof, _payloads(image, at, start, (kind - 12) // 2, pages))
        kind, end = _varint(image, at + 3)
        if _fits(image[at], end - at, kind):
            for text in _payloads(image, at, end + 16, (kind - 12) // 2, pages):
                name = read_name(text)
                if name is not None and sum_of_name(text) == image[end : end + 16]:
                    self._names[name.entry] = name
        return None

    def _entry(self, lane: str, proof: bytes, versions: Iterator[bytes]) -> tuple[str, bytes] | None:
        for event in versions:
            if sum_of(lane, event) == proof:
                if proof in self._whole:
                    return None
                self._whole.add(proof)
                return lane, event
            self._broken.setdefault(proof, (lane, event))
        return None


def _mapped(path: Path, opened: ExitStack) -> "bytes | mmap.mmap":
    if not path.exists() or path.stat().st_size == 0:
        return b""
    file = opened.enter_context(path.open("rb"))
    return opened.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class _Pages:
    def __init__(self, main: "bytes | mmap.mmap", wal_data: "bytes | mmap.mmap", wal: Wal) -> None:
        self._main, self._wal_data, self._wal = main, wal_data, wal
        self._last = {**wal.committed, **dict(wal.behind)}

    def images(self) -> "Iterator[bytes | mmap.mmap]":
        # Yields the file as a whole and not page by page, because a displaced record may lie anywhere.
        yield self._main
        for place in self._wal.committed.values():
            yield self._wal_data[place : place + PAGE]
        yield from self.unfinished()

    def unfinished(self) -> Iterator[bytes]:
        yield self._wal_data[self._wal.rest[0] : self._wal.rest[1]]

    def versions(self, number: int) -> Iterator[bytes]:
        """Yields the known versions of a page, newest first."""
        for found in (self._last, self._wal.committed):
            if number in found:
                yield self._wal_data[found[number] : found[number] + PAGE]
        yield self._main[(number - 1) * PAGE : number * PAGE]


def _fits(header: int, length: int, kind: int) -> bool:
    """Returns whether the record's header has the length that it states and ends with the type of a blob."""
    return header == length and kind >= 12 and kind % 2 == 0 and kind < 2 * _MAX_EVENT_BYTES


def _payloads(image: "bytes | mmap.mmap", record: int, start: int, length: int, pages: _Pages) -> Iterator[bytes]:
    """Yields candidates for the last value of a record, which has `length` bytes and begins at `start`. A value that
    overflows into other pages has a candidate for each version of those pages."""
    whole = start - record + length
    if whole <= _MAX_LOCAL_BYTES:
        yield image[start : start + length]
        return
    local = _MIN_LOCAL_BYTES + (whole - _MIN_LOCAL_BYTES) % (PAGE - 4)
    local = _MIN_LOCAL_BYTES if local > _MAX_LOCAL_BYTES else local
    here = record + local
    first, following = image[start:here], int.from_bytes(image[here : here + 4], "big")
    for newest in range(3):
        parts, left, number, seen = [first], length - len(first), following, 0
        while left > 0 and number and seen <= length // (PAGE - 4) + 1:
            versions = list(pages.versions(number))
            page = versions[min(newest, len(versions) - 1)]
            parts.append(page[4 : 4 + min(left, PAGE - 4)])
            left -= len(parts[-1])
            number = int.from_bytes(page[:4], "big")
            seen += 1
        yield b"".join(parts)


def _varint(data: "bytes | mmap.mmap", at: int) -> tuple[int, int]:
    """Returns (value, offset of its end). Reads at most 4 bytes, because no header of ours has a longer one."""
    value = 0
    for place in range(at, min(at + 4, len(data))):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    return 0, at


def _checksum(data: bytes, order: str, state: tuple[int, int]) -> tuple[int, int]:
    one, two = state
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & _MASK
        two = (two + second + one) & _MASK
    return one, two
