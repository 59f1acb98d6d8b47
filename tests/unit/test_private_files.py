"""Files that contain names, phone numbers and traces: only their owner may read them, whatever the umask says."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.observability.tracing import Tracer
from shared.rail.journal_file import connect, create
from shared.settings import Settings


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}


def test_journal_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    create(tmp_path / "orders-1.db")
    db = connect(tmp_path / "orders-1.db")
    db.execute("insert into numbers values ('r', 'd', 1, null)")
    found = modes(tmp_path)
    db.close()
    assert len(found) == 3  # with the write-ahead log and its index
    assert set(found.values()) == {0o600}, found


def test_trace_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    tracer = Tracer("orders", Settings(_env_file=None, home=tmp_path))
    tracer.end(tracer.begin(), "GET /", error="500")
    tracer.close()
    found = modes(tmp_path / "traces")
    assert found
    assert set(found.values()) == {0o600}
