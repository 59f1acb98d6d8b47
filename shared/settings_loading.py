"""Reads settings from the environment and `.env`, and reports wrong ones in plain sentences.

Unknown `TICKETRAIL_…` names are refused; otherwise a misspelt setting would silently keep its default.
"""

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings

from shared.setting_fields import PREFIX, allowed_values, description_of, variable

_MAX_SHOWN_CHARACTERS = 80

LOCAL_RUN_NAMES = frozenset(
    variable(name)
    for name in (
        "postgres_port",
        "rabbitmq_port",
        "rabbitmq_management_port",
        "redis_port",
        "epmd_port",
        "rabbitmq_dist_port",
    )
)
"""Settings that only `make run` reads (deploy/local/local_settings.py). Its services inherit them
in their environment."""

OTHER_NAMES: Mapping[str, str] = {
    "TICKETRAIL_BIND": "docker-compose.yml: the address on which the gateway listens",
    "TICKETRAIL_PORT": "docker-compose.yml: the port on which the gateway listens",
    "TICKETRAIL_IMAGE": "docker-compose.yml: the image of the services",
    "TICKETRAIL_EDGE_SUBNET": "docker-compose.yml: the network of the gateway",
    "TICKETRAIL_EDGE_RANGE": "docker-compose.yml: the part of that network from which services get their addresses",
    "TICKETRAIL_GATEWAY_ADDRESS": "docker-compose.yml: the address of the gateway in that network",
    "TICKETRAIL_RABBITMQ_PASSWORD": "docker-compose.yml: the password of RabbitMQ's administrator",
    "TICKETRAIL_RABBITMQ_ORDERS_PASSWORD": "docker-compose.yml: the password of RabbitMQ's user for the orders service",
    "TICKETRAIL_RABBITMQ_WORKER_PASSWORD": "docker-compose.yml: the password of RabbitMQ's user for the sync worker",
    "TICKETRAIL_RABBITMQ_SYNC_PASSWORD": "docker-compose.yml: the password of RabbitMQ's user for the sync API",
    "TICKETRAIL_RABBITMQ_NOTIFIER_PASSWORD": "docker-compose.yml: the password of RabbitMQ's user for the notifier",
    "TICKETRAIL_RABBITMQ_WATCHER_PASSWORD": "docker-compose.yml: the password of RabbitMQ's read-only user",
    "TICKETRAIL_REDIS_ORDERS_PASSWORD": "docker-compose.yml: the password of the mirror's user for the orders service",
    "TICKETRAIL_REDIS_WORKER_PASSWORD": "docker-compose.yml: the password of the mirror's user for the sync worker",
    "TICKETRAIL_REDIS_SYNC_PASSWORD": "docker-compose.yml: the password of the mirror's user for the sync API",
    "TICKETRAIL_POSTGRES_PASSWORD": "docker-compose.yml: the password of PostgreSQL's superuser",
    "TICKETRAIL_DATABASE_OWNER_PASSWORD": "docker-compose.yml: the password of the role that migrates",
    "TICKETRAIL_DATABASE_WRITER_PASSWORD": "docker-compose.yml: the password of the role that writes",
    "TICKETRAIL_DATABASE_API_PASSWORD": "docker-compose.yml: the password of the role that answers clients",
    "TICKETRAIL_DATABASE_OPS_PASSWORD": "docker-compose.yml: the password of the role for operators",
    "TICKETRAIL_GRAFANA_PASSWORD": "docker-compose.yml: the password of Grafana's user admin",
    "TICKETRAIL_GRAFANA_PORT": "docker-compose.yml: the port of Grafana",
    "TICKETRAIL_JAEGER_PORT": "docker-compose.yml: the port of Jaeger",
    "TICKETRAIL_PROMETHEUS_PORT": "docker-compose.yml: the port of Prometheus",
    "TICKETRAIL_TEST_SERVERS": "tests: containers or processes for the servers of a test run",
    "TICKETRAIL_FUZZ_KNOWN_ENTITIES": "tests: set by `make fuzz` for itself",
    "TICKETRAIL_FUZZ_COUNTS": "tests: set by `make fuzz` for itself",
    "TICKETRAIL_OUTCOMES": "tests: set by `.ci/run` for its run of pytest",
}
"""Maps a name that is not a setting of a service, but may be in the same environment or `.env`, to its reader and its
meaning."""

SECRETS = Path("/run/secrets")
"""The directory where Docker and Kubernetes put secrets: a file `ticketrail_jwt_secret` has the value of the setting
TICKETRAIL_JWT_SECRET. The environment and `.env` override it. Other files there are ignored, also those of others."""

S = TypeVar("S", bound=BaseSettings)


class SettingsError(ValueError):
    """The settings cannot be used. The message has one line for each wrong setting and repeats no secret."""


def load(kind: type[S]) -> S:
    """Reads settings of class `kind` from the environment, and those that it lacks from `.env` in the working
    directory. Raises SettingsError."""
    given = _given(kind)
    known = {variable(name) for name in kind.model_fields} | LOCAL_RUN_NAMES | OTHER_NAMES.keys()
    unknown = [_unknown(name, origin, known) for name, (_, origin) in sorted(given.items()) if name not in known]
    if unknown:
        raise SettingsError("\n".join(unknown))
    try:
        return kind(_secrets_dir=SECRETS if SECRETS.is_dir() else None)
    except ValidationError as error:
        # `from None` hides the error of pydantic, which shows the values of secrets.
        raise SettingsError("\n".join(_sentences(kind, error, given))) from None


@contextmanager
def exit_on_bad_settings(service: str | None = None) -> Iterator[None]:
    """Prints a SettingsError without a traceback and exits with code 1. Use it around the entry point of a process.
    `service`: the name of a service in its log. If its output is not a terminal, it is a log of JSON lines,
    so the errors are one such line."""
    try:
        yield
    except SettingsError as error:
        lines = str(error).splitlines()
        if service is None or sys.stderr.isatty():
            sys.exit("\n".join(f"ticketrail: {line}" for line in lines))
        at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        found = {"service": service, "errors": lines, "event": "settings_refused", "level": "error", "timestamp": at}
        sys.exit(json.dumps(found))


def read_env_file(kind: type[BaseSettings]) -> dict[str, str]:
    """Returns every name with our prefix in `.env`, in upper case, mapped to its text. Raises SettingsError."""
    path = _env_file(kind)
    try:
        # The working directory may hold a directory of this name, which pydantic-settings skips.
        in_file = dotenv_values(path) if path.is_file() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    return {name.upper(): text or "" for name, text in in_file.items() if name.upper().startswith(PREFIX)}


def _given(kind: type[BaseSettings]) -> dict[str, tuple[str, str]]:
    """Returns every name with our prefix, in upper case, mapped to (text, origin). `origin` is empty for the
    environment."""
    given = {name: (text, f" (in {_env_file(kind)})") for name, text in read_env_file(kind).items()}
    given |= {name.upper(): (text, "") for name, text in os.environ.items() if name.upper().startswith(PREFIX)}
    return given


def _env_file(kind: type[BaseSettings]) -> Path:
    return Path(str(kind.model_config.get("env_file") or ".env"))


def _unknown(name: str, origin: str, known: set[str]) -> str:
    (nearest,) = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    return f"{name}{origin} is not a setting; the nearest one is {nearest}"


def _sentences(kind: type[BaseSettings], error: ValidationError, given: Mapping[str, tuple[str, str]]) -> list[str]:
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        name = str(one["loc"][0]) if one["loc"] else ""
        if one["type"] == "default_factory_not_called":  # another setting has an error that causes this one
            continue
        # A check across several settings names them in its message.
        found.setdefault(name or str(one["msg"]), _sentence(kind, name, one, given) if name else _message(one))
    return list(found.values())


def _message(error: ErrorDetails) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _sentence(kind: type[BaseSettings], name: str, error: ErrorDetails, given: Mapping[str, tuple[str, str]]) -> str:
    field = kind.model_fields[name]
    text, origin = given.get(variable(name), (str(error["input"]), ""))
    shown: Any = text if len(text) <= _MAX_SHOWN_CHARACTERS else text[:_MAX_SHOWN_CHARACTERS] + "…"
    value = "has a value that is not allowed" if description_of(field).secret else f"is {shown!r}, which is not allowed"
    return f"{variable(name)}{origin} {value}: it must be {allowed_values(field)}"
