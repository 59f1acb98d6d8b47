"""A SQLite connection for a journal: a test can use it directly, count its commits and make statements fail."""

import sqlite3
from pathlib import Path
from typing import Any

from shared.rail import journal_file


class FaultyConnection(sqlite3.Connection):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fails_next: list[str] = []
        """The beginnings of the statements that fail next, in this order. All other statements succeed."""
        self.commits = 0

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if self.fails_next and sql.startswith(self.fails_next[0]):
            del self.fails_next[0]
            raise sqlite3.OperationalError("disk I/O error")
        self.commits += sql == "commit"
        return super().execute(sql, parameters)


class JournalConnections:
    """Opens the connections of one journal: `Journal(..., connect=connections)`."""

    def __init__(self) -> None:
        self.opened: list[FaultyConnection] = []

    def __call__(self, path: Path) -> FaultyConnection:
        connection = journal_file.connect(path, FaultyConnection)
        assert isinstance(connection, FaultyConnection)
        self.opened.append(connection)
        return connection

    @property
    def newest(self) -> FaultyConnection:
        return self.opened[-1]
