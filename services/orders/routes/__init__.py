"""The routes of the orders API, one file per topic. A handler parses, calls and replies."""

from services.orders.routes.api_keys import ROUTES as API_KEYS
from services.orders.routes.audit import ROUTES as AUDIT
from services.orders.routes.auth import ROUTES as AUTH
from services.orders.routes.back_office import ROUTES as BACK_OFFICE
from services.orders.routes.entities import ROUTES as ENTITIES
from services.orders.routes.orders import ROUTES as ORDERS
from services.orders.routes.passwords import ROUTES as PASSWORDS
from services.orders.routes.payments import ROUTES as PAYMENTS
from services.orders.routes.users import ROUTES as USERS
from shared.http.openapi import Api

ROUTES = [*ORDERS, *PAYMENTS, *ENTITIES, *BACK_OFFICE, *AUTH, *PASSWORDS, *USERS, *API_KEYS, *AUDIT]
API = Api("Ticketrail: orders", "The API that client applications call.", ROUTES)
