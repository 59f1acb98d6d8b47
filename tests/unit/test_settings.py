"""Settings that are refused together."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared.settings import Settings


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_loses_changes_is_off_and_refused_outside_development(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Settings().ack_before_commit
    assert Settings(ack_before_commit=True).ack_before_commit
    strong = "f3Zr0kq9wLx7TnVb2mYc"
    production: dict[str, Any] = {name: "" for name in Settings.model_fields if name.endswith("_url")}
    production |= {"environment": "production", "jwt_secret": strong * 2, "sync_token": strong}
    assert Settings(**production)
    with pytest.raises(ValidationError, match="TICKETRAIL_ACK_BEFORE_COMMIT is for a test alone"):
        Settings(**production, ack_before_commit=True)
    monkeypatch.setenv("TICKETRAIL_ACK_BEFORE_COMMIT", "true")
    assert Settings().ack_before_commit, "as an operator would set it"
