"""Secrets that production refuses. The error names the setting and never the secret."""

import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import ValidationError

from shared.security.weak_secrets import weakness
from shared.settings import Settings

STRONG, JWT_SECRET = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
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


def production(**changed: Any) -> Settings:
    strong: dict[str, Any] = {name: url.format(STRONG) for name, url in URLS.items()}
    strong |= {"jwt_secret": JWT_SECRET, **changed}
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
def test_a_weak_secret_is_refused_with_the_name_of_its_setting(weak: str) -> None:
    weak = weak[:15] if weak.startswith("sh0rt") else weak
    with pytest.raises(ValidationError) as refused:
        production(jwt_secret=weak)
    error = refused.value.errors()[0]
    # The field itself refuses a secret that is too short for a signature; its error has the field's location.
    assert "TICKETRAIL_JWT_SECRET" in error["msg"] or error["loc"] == ("jwt_secret",)


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


# -- other settings that production refuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"redis_url": URLS["redis_url"].format(JWT_SECRET)}, "TICKETRAIL_REDIS_URL"),
        ({"cors_origins": "https://pos.example, *"}, "TICKETRAIL_CORS_ORIGINS"),
        *(
            ({"trusted_proxies": listed}, f"TICKETRAIL_TRUSTED_PROXIES contains {every},")
            for listed, every in (
                ("10.0.0.2, 0.0.0.0/0", "0.0.0.0/0"),
                ("10.0.0.2,::/0", "::/0"),
                ("0.0.0.0/1,10.0.0.0/8,128.0.0.0/1", "0.0.0.0/0"),
            )
        ),
        ({"restaurant_requests_per_second": 0}, "TICKETRAIL_RESTAURANT_REQUESTS_PER_SECOND"),
        ({"address_requests_per_second": 0}, "TICKETRAIL_ADDRESS_REQUESTS_PER_SECOND"),
        *(
            ({f"{kind}_token_ttl_seconds": 30 * 24 * 3600 + 1}, f"TICKETRAIL_{kind.upper()}_TOKEN_TTL_SECONDS")
            for kind in ("access", "refresh", "guest")
        ),
        ({"rabbitmq_url": f"amqps://t:{STRONG}@rabbitmq/?no_verify_ssl=1"}, "TICKETRAIL_RABBITMQ_URL"),
        ({"database_api_url": f"postgresql://t:{STRONG}@pg/t?sslmode=require"}, "TICKETRAIL_DATABASE_API_URL"),
        ({"redis_url": f"rediss://:{STRONG}@a/0,rediss://:{STRONG}@b/0?ssl_cert_reqs=none"}, "TICKETRAIL_REDIS_URL"),
    ],
    # The passwords are random, and the processes of one run must agree on the names of tests.
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_production_refuses_unsafe_settings_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named) as refused:
        production(**changed)
    assert JWT_SECRET not in refused.value.errors()[0]["msg"]


def test_production_accepts_networks_of_proxies() -> None:
    assert production(trusted_proxies="10.0.0.0/8, fd00::/8, 127.0.0.1").trusted_proxies


def test_production_accepts_lifetimes_of_thirty_days() -> None:
    assert production(refresh_token_ttl_seconds=30 * 24 * 3600).refresh_token_ttl_seconds


@pytest.mark.parametrize("environment", ["development", "production"])
@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::"])
def test_the_default_key_is_refused_where_other_machines_reach_the_service(host: str, environment: Any) -> None:
    with pytest.raises(ValidationError, match="TICKETRAIL_JWT_SECRET"):
        Settings(_env_file=None, host=host, environment=environment)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1"])
def test_the_default_key_is_accepted_on_loopback(host: str) -> None:
    assert Settings(_env_file=None, host=host).jwt_algorithm == "HS256"


def test_a_key_pair_needs_no_secret() -> None:
    with_pair = production(jwt_secret=Settings.model_fields["jwt_secret"].default, jwt_public_key="a.pem", host="::")
    assert with_pair.jwt_algorithm == "EdDSA"


def test_random_secrets_are_accepted() -> None:
    for _ in range(200):
        assert weakness(secrets.token_urlsafe(32)) is None
