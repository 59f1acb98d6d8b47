"""The ports, directories and secrets of one local system, and the environment of its services.

TICKETRAIL_HOME and TICKETRAIL_PORT_BASE, from the environment or `.env`, move a whole system, so that two can run at
the same time. The setting of one port overrides the base. The services always use the private servers; URLs in the
environment have no effect.
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import model_validator

from deploy.local.servers import PASSWORD
from shared.setting_fields import MAX_PORT_BASE, MIN_PORT_BASE, SERVERS, Port
from shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]

_PORTS_FROM_BASE = (
    "orders_port",
    "sync_port",
    "notifier_port",
    "worker_port",
    "postgres_port",
    "redis_port",
    "rabbitmq_port",
    "rabbitmq_management_port",
    "epmd_port",
    "rabbitmq_dist_port",
)
"""The ports that `port_base` moves, in ascending order. The first is the base plus one."""


class LocalSettings(Settings):
    """The settings of the services and of the private servers.

    The default ports are below those that Linux uses for outgoing connections (32768 and up). A connection of another
    program could otherwise hold one of them when `make run` starts.
    """

    makes_own_secrets = True

    postgres_port: Port = SERVERS.setting(17432, "The port of PostgreSQL.")
    rabbitmq_port: Port = SERVERS.setting(17672, "The port of RabbitMQ.")
    rabbitmq_management_port: Port = SERVERS.setting(17673, "The port of RabbitMQ's management API.")
    redis_port: Port = SERVERS.setting(17379, "The port of Redis.")
    epmd_port: Port = SERVERS.setting(17674, "The port of RabbitMQ's Erlang port mapper.")
    rabbitmq_dist_port: Port = SERVERS.setting(17675, "The port of RabbitMQ's Erlang distribution.")

    @model_validator(mode="before")
    @classmethod
    def _ports_from_base(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("port_base") == "":  # it counts as unset, so that system.env does not contain it
            values = {name: value for name, value in values.items() if name != "port_base"}
        try:
            base = int(values.get("port_base") or 0)
        except ValueError:
            return values
        if not MIN_PORT_BASE <= base <= MAX_PORT_BASE:
            return values  # unset, or wrong: then the check of the field reports the base alone
        return {name: base + position for position, name in enumerate(_PORTS_FROM_BASE, 1)} | values

    @property
    def home_path(self) -> Path:
        """The absolute path of the home. Without TICKETRAIL_HOME it is in this checkout."""
        return self.home.absolute() if "home" in self.model_fields_set else ROOT / self.home

    @property
    def ports(self) -> dict[str, tuple[int, str]]:
        """Maps each setting of a port to (the port, the name of the server that listens on it)."""
        return {
            "TICKETRAIL_ORDERS_PORT": (self.orders_port, "orders"),
            "TICKETRAIL_SYNC_PORT": (self.sync_port, "sync API"),
            "TICKETRAIL_NOTIFIER_PORT": (self.notifier_port, "notifier"),
            "TICKETRAIL_WORKER_PORT": (self.worker_port, "health of the sync worker"),
            "TICKETRAIL_POSTGRES_PORT": (self.postgres_port, "PostgreSQL"),
            "TICKETRAIL_RABBITMQ_PORT": (self.rabbitmq_port, "RabbitMQ"),
            "TICKETRAIL_RABBITMQ_MANAGEMENT_PORT": (self.rabbitmq_management_port, "RabbitMQ management"),
            "TICKETRAIL_REDIS_PORT": (self.redis_port, "Redis"),
            "TICKETRAIL_EPMD_PORT": (self.epmd_port, "Erlang port mapper of RabbitMQ"),
            "TICKETRAIL_RABBITMQ_DIST_PORT": (self.rabbitmq_dist_port, "Erlang distribution of RabbitMQ"),
        }


def service_environment(settings: LocalSettings, home: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of every service. Creates the secrets of the home if it has none."""

    def database(role: str) -> str:
        return f"postgresql://ticketrail_{role}:{PASSWORD}@127.0.0.1:{settings.postgres_port}/ticketrail"

    management = f"{PASSWORD}@127.0.0.1:{settings.rabbitmq_management_port}"
    return dict(inherited) | {
        "TICKETRAIL_HOME": str(home),
        "TICKETRAIL_HOST": settings.host,
        "TICKETRAIL_ORDERS_PORT": str(settings.orders_port),
        "TICKETRAIL_SYNC_PORT": str(settings.sync_port),
        "TICKETRAIL_NOTIFIER_PORT": str(settings.notifier_port),
        "TICKETRAIL_WORKER_PORT": str(settings.worker_port),
        "TICKETRAIL_RABBITMQ_URL": f"amqp://ticketrail:{PASSWORD}@127.0.0.1:{settings.rabbitmq_port}/",
        "TICKETRAIL_RABBITMQ_MANAGEMENT_URL": f"http://ticketrail:{management}",
        "TICKETRAIL_RABBITMQ_WATCHER_URL": f"http://ticketrail_watcher:{management}",
        "TICKETRAIL_REDIS_URL": f"redis://127.0.0.1:{settings.redis_port}/0",
        "TICKETRAIL_DATABASE_URL": database("owner"),
        "TICKETRAIL_DATABASE_WRITER_URL": database("writer"),
        "TICKETRAIL_DATABASE_API_URL": database("api"),
        "TICKETRAIL_DATABASE_OPS_URL": database("ops"),
        "TICKETRAIL_JWT_SECRET": _secret(home / "secret", settings, "jwt_secret"),
    }


def command_environment(settings: LocalSettings, services: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the command line: the settings from the environment or `.env`, which the settings of
    the services override."""
    explicit = settings.model_dump(mode="json", include=settings.model_fields_set)
    own = {
        f"TICKETRAIL_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in explicit.items()
    }
    # No service needs this role, so only the command line gets it.
    backup = f"postgresql://postgres:{PASSWORD}@127.0.0.1:{settings.postgres_port}/ticketrail"
    own.setdefault("TICKETRAIL_DATABASE_BACKUP_URL", backup)
    return own | {name: value for name, value in services.items() if name.startswith("TICKETRAIL_")}


def _secret(file_of_home: Path, settings: Settings, name: str) -> str:
    """Returns the secret from the settings, or else the one of this home, which the first start creates."""
    if name in settings.model_fields_set:
        return str(getattr(settings, name))
    if not file_of_home.exists():
        draft = file_of_home.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
        draft.rename(file_of_home)
    return file_of_home.read_text().strip()
