"""`python -m services.orders`"""

from shared.http.server import serve
from shared.settings import Settings

if __name__ == "__main__":
    settings = Settings()
    serve("services.orders.app:create", host=settings.host, port=settings.orders_port)
