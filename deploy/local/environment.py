"""Where everything of one local system is: ports, directories, secrets, and the environment of its services.

Each port and TICKETRAIL_HOME is a setting, by environment or `.env`, so that two systems run side by side. The services
are always pointed at the private servers, whatever URLs stand in the environment.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from deploy.local.servers import PASSWORD
from shared.setting_fields import Group, Port
from shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]

_SERVERS = Group(
    "Servers of `make run`", "Ports of the private servers that `make run` starts. Nothing else reads them."
)


class LocalSettings(Settings):
    """The services' settings, and those of the private servers."""

    postgres_port: Port = _SERVERS.setting(54320, "The port of PostgreSQL.")
    rabbitmq_port: Port = _SERVERS.setting(56720, "The port of RabbitMQ.")
    rabbitmq_management_port: Port = _SERVERS.setting(56721, "The port of RabbitMQ's management API.")
    redis_port: Port = _SERVERS.setting(56379, "The port of Redis.")
    epmd_port: Port = _SERVERS.setting(56722, "The port of RabbitMQ's Erlang port mapper.")
    rabbitmq_dist_port: Port = _SERVERS.setting(56723, "The port of RabbitMQ's Erlang distribution.")

    @property
    def ports(self) -> dict[str, tuple[int, str]]:
        """By setting: the port and what listens there."""
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
    """What every service is started with; makes the secrets of this home when it has none yet."""

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
        "TICKETRAIL_SYNC_TOKEN": _secret(home / "sync_token", settings, "sync_token"),
    }


def _secret(kept: Path, settings: Settings, name: str) -> str:
    """The one that somebody set, else the one of this home, made at its first start."""
    if name in settings.model_fields_set:
        return str(getattr(settings, name))
    if not kept.exists():
        aside = kept.with_suffix(".new")
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
        aside.rename(kept)
    return kept.read_text().strip()
