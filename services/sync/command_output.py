"""Prints the output of the commands of `ticketrail`: tables in which ids are never cut, JSON, and ages."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import click
from msgspec import Struct
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from services.sync.printable import printable
from shared.entities.contract import encode

json_option = click.option("--json", "as_json", is_flag=True, help="print JSON, for scripts")

_PIPE_COLUMNS = 160
_GAP_COLUMNS = 2
_MIN_TEXT_COLUMNS = 10


class TableColumn(Struct, frozen=True):
    title: str
    kind: Literal["id", "fixed", "text"] = "fixed"
    """`id` and `fixed` columns are shown whole. A `text` column is cut with an ellipsis if the table is too wide."""
    optional: int = 0
    """The order in which columns are left out of a table that is too wide: the highest number first. A column with 0
    always stays."""
    right: bool = False


def console(*, min_columns: int = 0) -> Console:
    """Returns a console that is as wide as the terminal, or `min_columns` wide if that is more. A pipe has no width and
    gets 160 columns."""
    # Markup and emoji codes are off, because texts from outside may contain them by accident.
    found = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, markup=False, emoji=False)
    if found.width < min_columns:
        found.width = min_columns
    return found


def print_table(columns: Sequence[TableColumn], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table that fits the terminal. It first leaves out optional columns, and then cuts texts. Ids stay whole,
    so the table may still be wider than the terminal."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    shown = layout(columns, cells, console().width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP_COLUMNS, 0, 0), header_style="bold")
    for place, width in shown:
        column = columns[place]
        justify: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.title, width=width, no_wrap=True, overflow="ellipsis", justify=justify)
    for row in cells:
        table.add_row(*(row[place] for place, _ in shown))
    console(min_columns=sum(width for _, width in shown) + _GAP_COLUMNS * (len(shown) - 1)).print(table)


def layout(columns: Sequence[TableColumn], rows: Sequence[Sequence[str]], width: int) -> list[tuple[int, int]]:
    """Returns (index of a column, its width) for each column that is shown, so that the table fits into `width`
    character cells. Pure."""
    natural = [max(map(cell_len, (column.title, *(row[n] for row in rows)))) for n, column in enumerate(columns)]
    least = [
        min(wide, max(_MIN_TEXT_COLUMNS, cell_len(column.title))) if column.kind == "text" else wide
        for column, wide in zip(columns, natural, strict=True)
    ]
    shown = list(range(len(columns)))

    def spare() -> int:
        return width - sum(least[n] for n in shown) - _GAP_COLUMNS * (len(shown) - 1)

    while spare() < 0 and (optional := [n for n in shown if columns[n].optional]):
        shown.remove(max(optional, key=lambda n: columns[n].optional))
    widths, left = dict(enumerate(least)), max(0, spare())
    for n in shown:
        more = min(left, natural[n] - widths[n])
        widths[n], left = widths[n] + more, left - more
    return [(n, widths[n]) for n in shown]


def print_json(value: Any) -> None:
    click.echo(encode(value).decode())


def ago(at: datetime) -> str:
    """Returns the age of a moment as text, such as "3 min"."""
    seconds = (datetime.now(UTC) - at).total_seconds()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
