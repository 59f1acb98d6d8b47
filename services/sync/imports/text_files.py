"""Reads the lines of a text file in a given encoding. The file may be packed by gzip.

Guarantee: `survey` reads a file to its end before any row of it is imported. A file that is cut off, damaged, or not
text of its encoding is refused as a whole, with the place of its first bad byte. A packed file is unpacked piece by
piece, up to 4 GiB, and no line may be longer than MAX_LINE_CHARS, so that a small file cannot fill the memory.
"""

import codecs
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

from msgspec import Struct

from shared.errors import InvalidInput, described

ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp1252")
_MAX_UNPACKED_BYTES = 4 * 2**30
MAX_LINE_CHARS = 10_000_000
_PIECE_BYTES = 2**18
_GZIP = b"\x1f\x8b"
# The marks of UTF-32 come first, because that of its little-endian form begins with a mark of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

T = TypeVar("T")


class TextFile(Struct, frozen=True):
    """A file whose content `survey` has read to its end and found to be text."""

    name: str
    codec: str
    mark_bytes: int
    """The length of the byte order mark."""
    sha256: str
    """The digest of the unpacked content."""
    stamp: tuple[int, int]
    """The size and the time of the last change, at the time of the survey."""

    def lines(self) -> Iterator[str]:
        """Yields the lines with their ends. Raises InvalidInput if the file can no longer be read, or has changed since
        the survey, before the first line or after the last one."""
        self._require_unchanged()
        with _opened(self.name) as file:
            _read(self.name, lambda: file.read(self.mark_bytes))
            text = io.TextIOWrapper(file, self.codec, newline="")
            while line := _read(self.name, lambda: text.readline(MAX_LINE_CHARS + 2)):
                yield line
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        if _stamp(self.name) != self.stamp:
            raise changed()


def survey(
    name: str, told: str | None, *, piece_bytes: int = _PIECE_BYTES, max_bytes: int = _MAX_UNPACKED_BYTES
) -> TextFile:
    """Reads the whole file. `told`: one of ENCODINGS; None means UTF-8, or UTF-16 if the file has a byte order mark of
    it. `piece_bytes`: at least 4, so that the first piece holds a whole mark. Raises InvalidInput with the line and the
    byte of the first fault."""
    stamp = _stamp(name)
    with _opened(name) as file:
        piece = _read(name, lambda: file.read(piece_bytes))
        codec, mark_bytes = _codec(piece, told)
        reading = _Decoding(codec, mark_bytes, max_bytes)
        while piece:
            reading.take(piece)
            piece = _read(name, lambda: file.read(piece_bytes))
        reading.end()
    return TextFile(name, codec, mark_bytes, reading.digest.hexdigest(), stamp)


class _Decoding:
    """Decodes a file piece by piece and counts lines and bytes."""

    def __init__(self, codec: str, mark_bytes: int, max_bytes: int) -> None:
        self.digest = hashlib.sha256()
        self._codec, self._mark_bytes, self._max_bytes = codec, mark_bytes, max_bytes
        self._decoder = codecs.getincrementaldecoder(codec)()
        # CP1252 has a character for nearly every byte, so a UTF-8 file would be read as a wrong text without an error.
        # Therefore a file that is valid UTF-8 is refused.
        self._utf8 = codecs.getincrementaldecoder("utf-8")() if codec == "cp1252" else None
        self._first_beyond_ascii: tuple[int, int] | None = None
        self._bytes, self._lines, self._line_chars = 0, 1, 0

    def take(self, piece: bytes) -> None:
        self.digest.update(piece)
        if self._bytes == 0:
            piece, self._bytes = piece[self._mark_bytes :], self._mark_bytes
        if (at := piece.find(0)) >= 0 and not self._codec.startswith("utf-16"):
            self._refuse(self._lines + piece.count(b"\n", 0, at), self._bytes + at, 0, "a text has no zero byte")
        self._watch_for_utf8(piece)
        self._decode(piece, final=False)
        if self._bytes > self._max_bytes:
            raise _refused(f"the file has more than {self._max_bytes:,} bytes of text; split it")

    def end(self) -> None:
        self._decode(b"", final=True)
        self._watch_for_utf8(b"", final=True)
        if self._utf8 is not None and self._first_beyond_ascii is not None:
            line, at = self._first_beyond_ascii
            raise _refused(
                f"{_place(line, at)}: the file is UTF-8 and not CP1252, because all its bytes are valid UTF-8; leave"
                " out --encoding"
            )

    def _decode(self, piece: bytes, *, final: bool) -> None:
        held = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            line = self._lines + before.decode(self._codec).count("\n")
            self._refuse(line, self._bytes - held + error.start, error.object[error.start], f"not {self._shown}")
        self._bytes += len(piece)
        self._lines += text.count("\n")
        end = max(text.rfind("\n"), text.rfind("\r"))
        self._line_chars = len(text) - end - 1 if end >= 0 else self._line_chars + len(text)
        if self._line_chars > MAX_LINE_CHARS:
            raise _refused(f"line {self._lines} has more than {MAX_LINE_CHARS:,} characters")

    def _watch_for_utf8(self, piece: bytes, *, final: bool = False) -> None:
        if self._utf8 is None:
            return
        if self._first_beyond_ascii is None and not piece.isascii():
            at = next(place for place, byte in enumerate(piece) if byte > 127)
            self._first_beyond_ascii = self._lines + piece.count(b"\n", 0, at), self._bytes + at
        try:
            self._utf8.decode(piece, final)
        except UnicodeDecodeError:
            self._utf8 = None

    @property
    def _shown(self) -> str:
        return self._codec.upper()

    def _refuse(self, line: int, at: int, byte: int, why: str) -> NoReturn:
        hint = ""
        if byte == 0 and at < self._mark_bytes + 2:
            hint = f"; for a file of UTF-16 add --encoding utf-16-{'be' if at == self._mark_bytes else 'le'}"
        elif self._codec == "utf-8" and byte:
            hint = "; if a spreadsheet on Windows has written the file, add --encoding cp1252"
        raise _refused(f"{_place(line, at)} is 0x{byte:02X}: {why}{hint}")


def _place(line: int, at: int) -> str:
    return f"line {line}, byte {at + 1:,} of the text"


def _codec(head: bytes, told: str | None) -> tuple[str, int]:
    """Returns the codec and the length of the byte order mark. Raises InvalidInput."""
    mark, marked = next(((mark, codec) for mark, codec in _MARKS if head.startswith(mark)), (b"", ""))
    if marked == "utf-32":
        raise _refused("the file is UTF-32, which is not supported; save it as UTF-8")
    if not marked:
        if told == "utf-16":
            raise _refused(
                "line 1, byte 1 of the text is no byte order mark of UTF-16; give the byte order with --encoding"
                " utf-16-le or utf-16-be, or leave the option out for UTF-8"
            )
        return told or "utf-8", 0
    if told not in (None, marked) and not (told == "utf-16" and marked.startswith("utf-16")):
        raise _refused(f"line 1, byte 1 of the text begins the byte order mark of {marked.upper()}: not {told}")
    return marked, len(mark)


def _opened(name: str) -> BinaryIO | gzip.GzipFile:
    """Opens a file, packed or not. Its content decides whether it is packed. Raises InvalidInput if a file whose name
    ends in .gz is not packed."""
    with Path(name).open("rb") as file:
        packed = file.read(2) == _GZIP
    if packed:
        return gzip.open(name, "rb")
    if name.lower().endswith(".gz"):
        raise _refused("the name ends in .gz, but the content is not gzip")
    return Path(name).open("rb")


def _read(name: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except EOFError as error:
        raise _refused("the gzip file is cut off; copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _refused(f"the gzip file is damaged ({error}); copy it again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(f"not readable: {name}: {described(error)}") from error


def _stamp(name: str) -> tuple[int, int]:
    found = _read(name, Path(name).stat)
    return found.st_size, found.st_mtime_ns


def changed() -> InvalidInput:
    return _refused("the file has changed while it was read; run the command again")


def _refused(why: str) -> InvalidInput:
    return InvalidInput(why, field="source")
