"""`python -m services.orders`"""

from shared.http.server import serve
from shared.security.tokens import Tokens
from shared.settings import Settings
from shared.settings_loading import exit_on_bad_settings

if __name__ == "__main__":
    with exit_on_bad_settings():
        settings = Settings.load()
        Tokens.of(settings).require_signing()
    serve("services.orders.app:create", host=settings.host, port=settings.orders_port)
