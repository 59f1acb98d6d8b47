"""The text of an import file: its encoding is given or found, gzip is unpacked, and a bad file is refused with the
place of its first bad byte, before any row."""

import gzip
from pathlib import Path

import pytest

from services.sync.imports.text_files import survey
from shared.errors import InvalidInput

TEXT = "external_id,notes\na,Grüße – 5 €\n"


def text_of(path: Path, content: bytes, told: str | None = None, **limits: int) -> str:
    path.write_bytes(content)
    return "".join(survey(str(path), told, **limits).lines())


def refusal(path: Path, content: bytes, told: str | None = None, **limits: int) -> str:
    path.write_bytes(content)
    with pytest.raises(InvalidInput) as refused:
        survey(str(path), told, **limits)
    return refused.value.message


@pytest.mark.parametrize(
    ("told", "content"),
    [
        (None, TEXT.encode()),
        ("utf-8", TEXT.encode("utf-8-sig")),
        (None, TEXT.encode("utf-8-sig")),
        (None, b"\xff\xfe" + TEXT.encode("utf-16-le")),
        (None, b"\xfe\xff" + TEXT.encode("utf-16-be")),
        ("utf-16", b"\xfe\xff" + TEXT.encode("utf-16-be")),
        ("utf-16-le", b"\xff\xfe" + TEXT.encode("utf-16-le")),
        ("utf-16-le", TEXT.encode("utf-16-le")),
        ("utf-16-be", TEXT.encode("utf-16-be")),
        ("cp1252", TEXT.encode("cp1252")),
        ("cp1252", b"external_id,notes\na,x\n"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [4, 7, 2**18])
def test_text_is_read_in_the_given_encoding(tmp_path: Path, told: str | None, content: bytes, piece_bytes: int) -> None:
    expected = TEXT if b"x\n" not in content else content.decode()
    assert text_of(tmp_path / "f", content, told, piece_bytes=piece_bytes) == expected
    assert text_of(tmp_path / "f.gz", gzip.compress(content), told, piece_bytes=piece_bytes) == expected


@pytest.mark.parametrize(
    ("told", "content", "place"),
    [
        (None, b"a,b\nc,caf\xe9,d\n", "line 2, byte 10 of the text is 0xE9: not UTF-8"),
        ("utf-8", b"\xef\xbb\xbfa,b\nc\xff", "line 2, byte 9 of the text is 0xFF: not UTF-8"),
        (None, "a\nü".encode()[:-1], "line 2, byte 3 of the text is 0xC3: not UTF-8"),
        ("cp1252", b"a\xfc\nb\x81\n", "line 2, byte 5 of the text is 0x81: not CP1252"),
        ("cp1252", "a\nGrüße\n".encode(), "line 2, byte 5 of the text: the file is UTF-8 and not CP1252"),
        ("utf-16", b"\xff\xfea\0\n\0b\0\x00\xd8c\0", "line 2, byte 9 of the text is 0x00: not UTF-16-LE"),
        ("utf-16", b"\xff\xfea\0\n\0b", "line 2, byte 7 of the text is 0x62: not UTF-16-LE"),
        ("utf-16", TEXT.encode(), "line 1, byte 1 of the text is no byte order mark"),
        ("utf-8", TEXT.encode("utf-16"), "begins the byte order mark of UTF-16-LE: not utf-8"),
        ("cp1252", TEXT.encode("utf-8-sig"), "begins the byte order mark of UTF-8: not cp1252"),
        (None, TEXT.encode("utf-32"), "UTF-32, which is not supported"),
        (None, TEXT.encode("utf-16-le"), "line 1, byte 2 of the text is 0x00: a text has no zero byte; for a file of"),
        (None, b"a\nb\n\0\0\0\0", "line 3, byte 5 of the text is 0x00: a text has no zero byte"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [4, 2**18])
def test_a_file_in_another_encoding_is_refused_with_the_place_of_its_first_bad_byte(
    tmp_path: Path, told: str | None, content: bytes, place: str, piece_bytes: int
) -> None:
    assert place in refusal(tmp_path / "f", content, told, piece_bytes=piece_bytes)
    assert place in refusal(tmp_path / "f.gz", gzip.compress(content), told, piece_bytes=piece_bytes)


def test_the_refusal_says_which_encoding_to_try(tmp_path: Path) -> None:
    assert "add --encoding cp1252" in refusal(tmp_path / "f", TEXT.encode("cp1252", errors="ignore"))
    assert "add --encoding utf-16-be" in refusal(tmp_path / "f", TEXT.encode("utf-16-be"))


def test_a_packed_file_that_is_cut_off_or_damaged_is_refused_before_any_row(tmp_path: Path) -> None:
    packed = gzip.compress(TEXT.encode() * 1_000)
    assert "cut off" in refusal(tmp_path / "f.gz", packed[:-20])
    assert "cut off" in refusal(tmp_path / "f.gz", packed[:-1])
    assert "damaged" in refusal(tmp_path / "f.gz", packed[:-8] + b"\0" * 8)
    assert "damaged" in refusal(tmp_path / "f.gz", packed[:30] + b"\xff" * 30 + packed[60:])
    assert "damaged" in refusal(tmp_path / "f.gz", packed + b"more")
    assert "not gzip" in refusal(tmp_path / "f.gz", TEXT.encode())
    assert "not gzip" in refusal(tmp_path / "f.gz", b"")
    assert text_of(tmp_path / "f.gz", packed + packed) == TEXT * 2_000, "a file may have several packed parts"


def test_a_small_packed_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    bomb = gzip.compress(b" " * 20_000_000)
    assert "line 1 has more than 10,000,000 characters" in refusal(tmp_path / "f.gz", bomb)
    lines = gzip.compress((b" " * 99 + b"\n") * 20_000)
    assert "more than 1,000,000 bytes of text" in refusal(tmp_path / "f.gz", lines, max_bytes=1_000_000)


def test_a_file_that_changes_after_the_survey_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a\nb\n")
    found = survey(str(path), None)
    lines = found.lines()
    assert next(lines) == "a\n"
    path.write_bytes(b"a\nb\nc\n")
    for reading in (lines, found.lines()):
        with pytest.raises(InvalidInput, match="has changed while it was read"):
            list(reading)
