"""Cursors: their form, and the error for an invalid one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.notifier.cursor import Cursor, Position, parse_cursor
from shared.errors import InvalidInput

EPOCHS = st.from_regex(r"[0-9a-f]{12}", fullmatch=True) | st.uuids().map(str)


@given(EPOCHS, st.integers(0, 10**18 - 1), st.integers(0, 255))
def test_a_cursor_is_read_back_as_it_was_written(epoch: str, offset: int, place: int) -> None:
    cursor = Cursor(epoch, Position(offset, place))
    assert parse_cursor(str(cursor), field="lastEventId") == cursor


def test_a_cursor_is_epoch_offset_index() -> None:
    assert str(Cursor("0af1b2c3d4e5", Position(17, 3))) == "0af1b2c3d4e5-17-3"


TOO_LONG = ("e-" + "9" * 19 + "-0", "e-1-1000000", "e" * 65 + "-1-2")


@pytest.mark.parametrize(
    "text",
    [
        *TOO_LONG,
        "",
        "x",
        "-1-2",
        "e-1",
        "e-1-",
        "e--1-2-",
        "e-1-x",
        "e-1.0-2",
        "e-1-2\n",
        " e-1-2",
        "e-٣-1",
        "é-1-2",
        "e/f-1-2",
    ],
)
def test_an_invalid_cursor_is_refused_with_the_name_of_its_field(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_cursor(text, field="Last-Event-ID")
    assert refused.value.details["field"] == "Last-Event-ID"


@given(st.text(max_size=40))
def test_the_parser_accepts_or_refuses_any_text(text: str) -> None:
    try:
        cursor = parse_cursor(text, field="lastEventId")
    except InvalidInput:
        return
    assert parse_cursor(str(cursor), field="lastEventId") == cursor


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9))))
def test_positions_sort_in_the_order_of_the_log(pairs: list[tuple[int, int]]) -> None:
    assert sorted(Position(*pair) for pair in pairs) == sorted(pairs)
