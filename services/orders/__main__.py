"""`python -m services.orders`"""

from shared.home import require_home
from shared.http.server import serve
from shared.security.tokens import Tokens
from shared.settings import Settings
from shared.settings_loading import exit_on_bad_settings

if __name__ == "__main__":
    with exit_on_bad_settings("orders"):
        settings = Settings.load()
        Tokens.of(settings).require_signing()
        settings.require("redis_url")
        require_home(settings, settings.journal_folder)
    serve(
        "services.orders.app:create",
        service="orders",
        host=settings.host,
        port=settings.orders_port,
        connections=settings.client_connections,
    )
