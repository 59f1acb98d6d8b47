"""Which secrets production refuses, and that it names the setting and never the secret."""

import secrets
from pathlib import Path
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
    strong = {name: url.format(STRONG) for name, url in URLS.items()}
    return Settings(
        _env_file=None, environment="production", **{**strong, "jwt_secret": STRONG, "sync_token": STRONG, **changed}
    )


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
def test_a_weak_secret_is_refused_by_the_name_of_its_setting(name: str, weak: str) -> None:
    weak = weak[:15] if weak.startswith("sh0rt") else weak
    with pytest.raises(ValidationError) as refused:
        production(**{name: weak})
    error = refused.value.errors()[0]
    # Too short for a signature is refused by the field itself, which names itself.
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
def test_of_several_hosts_each_password_is_looked_at(name: str) -> None:
    strong, weak = URLS[name].format(STRONG), URLS[name].format("guest")
    assert getattr(production(**{name: f"{strong},{strong}"}), name) == f"{strong},{strong}"
    for several in (f"{strong},{weak}", f"{weak},{strong}"):
        with pytest.raises(ValidationError, match=f"TICKETRAIL_{name.upper()}"):
            production(**{name: several})


def test_the_defaults_are_refused() -> None:
    with pytest.raises(ValidationError, match="TICKETRAIL_JWT_SECRET"):
        Settings(_env_file=None, environment="production")
    for name in URLS:
        with pytest.raises(ValidationError, match=f"TICKETRAIL_{name.upper()}"):
            production(**{name: Settings.model_fields[name].default})


def test_a_url_that_is_set_to_nothing_is_not_this_services_to_hold() -> None:
    assert production(database_url="").database_url == ""


def test_development_takes_its_defaults() -> None:
    assert Settings(_env_file=None).environment == "development"


def test_what_is_made_at_random_is_taken() -> None:
    for _ in range(200):
        assert weakness(secrets.token_urlsafe(32)) is None
