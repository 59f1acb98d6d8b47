"""Tables of the command line: a narrow terminal leaves out columns and cuts texts."""

from services.sync.command_output import TableColumn, layout
from services.sync.printable import printable

ID = "7d0c5f1e-4c11-4c0a-9b1d-7f0c3b526f1e"
COLUMNS = (
    TableColumn("id", "id"),
    TableColumn("age", optional=1),
    TableColumn("by", optional=2),
    TableColumn("error", "text"),
)


def widths(row: list[str], width: int) -> dict[str, int]:
    return {COLUMNS[place].title: wide for place, wide in layout(COLUMNS, [row], width)}


def test_a_wide_terminal_shows_every_cell_whole() -> None:
    assert widths([ID, "3 min", "nadia", "e" * 50], 120) == {"id": 36, "age": 5, "by": 5, "error": 50}


def test_a_text_is_cut_before_a_column_is_left_out() -> None:
    assert widths([ID, "3 min", "nadia", "e" * 50], 80) == {"id": 36, "age": 5, "by": 5, "error": 28}


def test_optional_columns_are_left_out_in_their_order() -> None:
    assert widths([ID, "3 min", "nadia", "e" * 50], 58) == {"id": 36, "age": 5, "error": 13}
    assert widths([ID, "3 min", "nadia", "e" * 50], 50) == {"id": 36, "error": 12}


def test_an_id_stays_whole_in_a_terminal_that_is_narrower_than_the_id() -> None:
    assert widths([ID, "3 min", "nadia", "e" * 50], 20) == {"id": 36, "error": 10}


def test_wide_characters_count_twice() -> None:
    assert widths([ID, "3 min", "nadia", "卓" * 4], 120)["error"] == 8


def test_text_from_outside_controls_no_terminal() -> None:
    assert printable("a\x1b[31mb\u202ec\u2066d") == "a\ufffd[31mb\ufffdc\ufffdd"
    assert printable("Gr\u00f6\u00dfe\n\U0001f468\u200d\U0001f373") == "Gr\u00f6\u00dfe\n\U0001f468\u200d\U0001f373"
