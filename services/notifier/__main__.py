"""`python -m services.notifier`"""

from shared.home import require_home_of_traces
from shared.http.server import serve
from shared.security.tokens import Tokens
from shared.settings import Settings
from shared.settings_loading import exit_on_bad_settings

if __name__ == "__main__":
    with exit_on_bad_settings("notifier"):
        settings = Settings.load()
        Tokens.of(settings)
        settings.require("database_api_url")  # the service reads the ended sessions there
        require_home_of_traces(settings)
    serve(
        "services.notifier.app:create",
        service="notifier",
        host=settings.host,
        port=settings.notifier_port,
        connections=settings.client_connections,
        kill_after_seconds=4,  # after four seconds, only streams of clients that do not read are still open
    )
