"""Starts a process of the sync service: `python -m services.sync worker` or `python -m services.sync api`."""

import sys

from shared.home import require_home_of_traces
from shared.http.server import serve
from shared.security.tokens import Tokens
from shared.settings import Settings
from shared.settings_loading import exit_on_bad_settings

if __name__ == "__main__":
    process = " ".join(sys.argv[1:])
    if process not in ("worker", "api"):
        sys.exit("usage: python -m services.sync worker|api")
    service = f"sync-{process}"
    with exit_on_bad_settings(service):
        settings = Settings.load()
        if process == "api":
            Tokens.of(settings)
        settings.require("redis_url")
        require_home_of_traces(settings)
    serve(
        f"services.sync.{process}:create",
        service=service,
        host=settings.host,
        port=settings.worker_port if process == "worker" else settings.sync_port,
        connections=settings.client_connections,
    )
