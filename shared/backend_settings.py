"""The settings of a process and of the servers that it uses. The documents show them after those of commands and before
the rest of `Settings`."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt
from pydantic_settings import SettingsConfigDict

from shared.command_settings import CommandSettings
from shared.setting_fields import (
    BACKENDS,
    PREFIX,
    PROCESS,
    BrokerUrls,
    DatabaseUrl,
    Directory,
    HttpUrl,
    RedisUrls,
)


class BackendSettings(CommandSettings):
    # `extra`: one `.env` also contains settings of `make run` and docker-compose.yml. `load` refuses unknown names.
    # `load` also reads the files of /run/secrets (shared/settings_loading.py).
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    environment: Literal["development", "production"] = PROCESS.setting(
        "development", "`production` refuses weak secrets and unsafe settings, and keeps fewer traces."
    )
    home: Directory = PROCESS.setting(
        Path(".local"),
        "The directory of journals, traces and all data of `make run`; a relative path starts at the working "
        "directory, where `.env` is too.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = PROCESS.setting(
        "info", "Log lines below this level are dropped."
    )
    request_log_level: Literal["info", "warning", "error", "off"] = PROCESS.setting(
        "info",
        "The lowest level of request lines in the log: `info` logs every request, `warning` those with a status from "
        "400 on, `error` those from 500 on.",
    )
    instance: PositiveInt | Literal["auto"] = PROCESS.setting(
        1,
        "The number of this instance within its service, which names its journal and its series of order numbers; "
        "`auto` leases the lowest free number in this home, for replicas that share it.",
    )

    rabbitmq_url: BrokerUrls = BACKENDS.setting(
        "amqp://ticketrail:ticketrail@127.0.0.1:17672/",
        "The URL of RabbitMQ, or of each node of one cluster; the first node that answers is used.",
        secret=True,
    )
    rabbitmq_management_url: HttpUrl = BACKENDS.setting(
        "http://ticketrail:ticketrail@127.0.0.1:17673",
        "The URL of RabbitMQ's management API, through which `ticketrail migrate` creates the read-only user.",
        secret=True,
    )
    rabbitmq_watcher_url: HttpUrl = BACKENDS.setting(
        "http://ticketrail_watcher:ticketrail@127.0.0.1:17673",
        "The URL of RabbitMQ's management API, with a user that can only look at queues.",
        secret=True,
    )
    redis_url: RedisUrls = BACKENDS.setting(
        "redis://127.0.0.1:17379/0",
        "The URL of the mirror, or of a primary and its replicas; the current primary is used.",
        secret=True,
    )
    database_url: DatabaseUrl = BACKENDS.setting(
        "postgresql://ticketrail_owner:ticketrail@127.0.0.1:17432/ticketrail",
        "The URL of PostgreSQL with the owner of the schema, for `ticketrail migrate`.",
        secret=True,
    )
    database_writer_url: DatabaseUrl = BACKENDS.setting(
        "postgresql://ticketrail_writer:ticketrail@127.0.0.1:17432/ticketrail",
        "The URL of PostgreSQL with the role of the sync worker.",
        secret=True,
    )
    database_api_url: DatabaseUrl = BACKENDS.setting(
        "postgresql://ticketrail_api:ticketrail@127.0.0.1:17432/ticketrail",
        "The URL of PostgreSQL with the role that answers clients, which sees one restaurant at a time.",
        secret=True,
    )
    database_ops_url: DatabaseUrl = BACKENDS.setting(
        "postgresql://ticketrail_ops:ticketrail@127.0.0.1:17432/ticketrail",
        "The URL of PostgreSQL with the role of operators, who see every restaurant.",
        secret=True,
    )
