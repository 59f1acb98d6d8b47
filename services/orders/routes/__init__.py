"""The routes of the orders API, a file per part of it. A handler parses, calls and replies."""

from services.orders.routes.audit import ROUTES as AUDIT
from services.orders.routes.auth import ROUTES as AUTH
from services.orders.routes.back_office import ROUTES as MOVES
from services.orders.routes.entities import ROUTES as ENTITIES
from services.orders.routes.orders import ROUTES as ORDERS
from services.orders.routes.payments import ROUTES as PAYMENTS
from services.orders.routes.users import ROUTES as USERS
from shared.http.openapi import Api

ROUTES = [*ORDERS, *PAYMENTS, *ENTITIES, *MOVES, *AUTH, *USERS, *AUDIT]
API = Api("Ticketrail: orders", "What client apps call.", ROUTES)
