"""`python -m services.notifier`"""

from shared.http.server import serve
from shared.settings import Settings

if __name__ == "__main__":
    settings = Settings()
    serve(
        "services.notifier.app:create",
        host=settings.host,
        port=settings.notifier_port,
        connections=settings.client_connections,
        kill_after=4,  # by then every stream has ended; what is left are clients that do not read
    )
