"""Starts a process of the sync service: `python -m services.sync worker` or `python -m services.sync api`."""

import sys

from shared.home import require_home_of_traces
from shared.http.server import serve
from shared.security.tokens import Tokens
from shared.settings import Settings
from shared.settings_loading import exit_on_bad_settings

if __name__ == "__main__":
    with exit_on_bad_settings():
        settings = Settings.load()
        if sys.argv[1:] == ["api"]:
            Tokens.of(settings)
        require_home_of_traces(settings)
    match sys.argv[1:]:
        case ["worker"]:
            target, name, port = "services.sync.worker:create", "sync-worker", settings.worker_port
        case ["api"]:
            target, name, port = "services.sync.api:create", "sync-api", settings.sync_port
        case _:
            sys.exit("usage: python -m services.sync worker|api")
    serve(target, service=name, host=settings.host, port=port, connections=settings.client_connections)
