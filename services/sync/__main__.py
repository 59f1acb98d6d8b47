"""`python -m services.sync worker` and `python -m services.sync api`"""

import sys

from shared.http.server import serve
from shared.settings import Settings

if __name__ == "__main__":
    settings = Settings()
    match sys.argv[1:]:
        case ["worker"]:
            serve("services.sync.worker:create", host=settings.host, port=settings.worker_port)
        case ["api"]:
            serve("services.sync.api:create", host=settings.host, port=settings.sync_port)
        case _:
            sys.exit("usage: python -m services.sync worker|api")
