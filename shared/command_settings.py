"""The settings that only the command `ticketrail` reads. `Settings` has them too, because one `.env` serves all."""

from pydantic_settings import BaseSettings

from shared.setting_fields import COMMANDS, DatabaseUrl, ServiceUrls, Urls


class CommandSettings(BaseSettings):
    status_urls: Urls = COMMANDS.setting(
        {},
        "The URLs of the services for `ticketrail status`, if they do not share a host.",
    )
    rabbitmq_service_urls: ServiceUrls = COMMANDS.setting(
        {},
        "The URL of RabbitMQ of each service, for `ticketrail migrate`, which creates their users with the permissions "
        "that each service needs. If empty, all services may share one user.",
        secret=True,
    )
    database_backup_url: DatabaseUrl = COMMANDS.setting(
        "",
        "The URL of PostgreSQL for `ticketrail backup`, with a superuser or a role with BYPASSRLS: no other role sees "
        "every restaurant. If empty, the URL of the owner.",
        secret=True,
    )
