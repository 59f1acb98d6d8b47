"""Secrets that production refuses. The error names the setting and never the secret."""

import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import ValidationError

from shared.security.weak_secrets import weakness
from shared.settings import Settings

STRONG = secrets.token_urlsafe(32)
URLS = {
    "rabbitmq_url": "amqp://ticketrail:{}@rabbitmq:5672/",
    "rabbitmq_management_url": "http://ticketrail:{}@rabbitmq:15672",
    "rabbitmq_watcher_url": "http://ticketrail_watcher:{}@rabbitmq:15672",
    "redis_url": "redis://:{}@valkey:6379/0",
    "database_url": "postgresql://ticketrail_owner:{}@postgres:5432/ticketrail",
    "database_writer_url": "postgresql://ticketrail_writer:{}@postgres:5432/ticketrail",
    "database_api_url": "postgresql://ticketrail_api:{}@postgres:5432/ticketrail",
    "database_ops_url": "postgresql://ticketrail_ops:{}@postgres:5432/ticketrail",
}


def production(**changed: str) -> Settings:
    strong: dict[str, Any] = {name: url.format(STRONG) for name, url in URLS.items()}
    strong |= {"jwt_secret": STRONG, "sync_token": STRONG, **changed}
    return Settings(_env_file=None, environment="production", **strong)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "weak",
    [
        "",
        "sh0rt-but-3xotic",
        "aabbaabbaabbaabbaabbaabbaabbaabbaabb",
        "changeme-changeme-changeme-changeme!",
        "Secret-Secret-1234567890-abcdefgh-xyz",
        "P4xguest9876zyxwvutsrqponmlkjihgfed",
        "development-only-secret-change-me-please",
        "change-me-to-at-least-thirty-two-bytes",
    ],
)
@pytest.mark.parametrize("name", ["jwt_secret", "sync_token"])
def test_a_weak_secret_is_refused_with_the_name_of_its_setting(name: str, weak: str) -> None:
    weak = weak[:15] if weak.startswith("sh0rt") else weak
    with pytest.raises(ValidationError) as refused:
        production(**{name: weak})
    error = refused.value.errors()[0]
    # The field itself refuses a secret that is too short for a signature; its error has the field's location.
    assert f"TICKETRAIL_{name.upper()}" in error["msg"] or error["loc"] == (name,)


@pytest.mark.parametrize("password", ["guest", "ticketrail", "x" * 40, "postgres-1-rabbitmq-2-postgres"])
@pytest.mark.parametrize("name", list(URLS))
def test_a_weak_password_in_a_url_is_refused_and_not_repeated(name: str, password: str) -> None:
    with pytest.raises(ValidationError) as refused:
        production(**{name: URLS[name].format(quote(password))})
    message = refused.value.errors()[0]["msg"]
    assert f"TICKETRAIL_{name.upper()}" in message
    assert f"{password}@" not in message


@pytest.mark.parametrize("name", ["rabbitmq_url", "redis_url"])
def test_the_password_of_every_host_is_checked(name: str) -> None:
    strong, weak = URLS[name].format(STRONG), URLS[name].format("guest")
    assert getattr(production(**{name: f"{strong},{strong}"}), name) == f"{strong},{strong}"
    for several in (f"{strong},{weak}", f"{weak},{strong}"):
        with pytest.raises(ValidationError, match=f"TICKETRAIL_{name.upper()}"):
            production(**{name: several})


def test_production_refuses_the_default_secrets() -> None:
    with pytest.raises(ValidationError, match="TICKETRAIL_JWT_SECRET"):
        Settings(_env_file=None, environment="production")
    for name in URLS:
        with pytest.raises(ValidationError, match=f"TICKETRAIL_{name.upper()}"):
            production(**{name: Settings.model_fields[name].default})


def test_an_empty_url_is_accepted() -> None:
    assert production(database_url="").database_url == ""


def test_development_accepts_the_default_secrets() -> None:
    assert Settings(_env_file=None).environment == "development"


def test_random_secrets_are_accepted() -> None:
    for _ in range(200):
        assert weakness(secrets.token_urlsafe(32)) is None
