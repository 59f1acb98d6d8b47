"""Access control: the tests call every route of every service with every role, without a token, as a guest at a table
and from another restaurant. shared/security/permissions.py gives the expected results; a route without an action
fails."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import jwt
import pytest
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from services.notifier import app as notifier
from services.notifier.transports import TRANSPORTS
from services.orders import app as orders
from services.orders.routes import ROUTES as ORDERS
from services.sync import api as sync
from shared.http.authorization import OPEN_PATHS
from shared.http.endpoint import Operation, endpoint
from shared.http.openapi import operations
from shared.security.permissions import ACTIONS, PUBLIC, SCOPES, Scope, allowed, scopes_for
from shared.security.tokens import Identity, Role, Tokens
from shared.settings import Settings
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, expect, made, register_restaurant
from tests.rigs.system import System, eventually

HANDLERS: dict[str, list[HTTPRouteHandler]] = {"orders": ORDERS, "sync": sync.ROUTES, "notifier": TRANSPORTS}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# Routes without a token. A new one must be added here on purpose.
OPEN_TO_ALL = {
    ("orders", "POST", "/api/auth/register-restaurant"),
    ("orders", "POST", "/api/auth/login"),
    ("orders", "POST", "/api/auth/refresh"),
    ("orders", "POST", "/api/auth/logout"),
    ("orders", "POST", "/api/auth/table-session"),
    ("orders", "POST", "/api/auth/password-reset"),
}
SYNC_ORDER = {"items": [{"name": "Margherita", "quantity": 1, "unit_price": 980}]}
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_CONCURRENCY = 8


class Route(Struct, frozen=True):
    service: str
    method: str
    path: str
    operation: Operation

    @property
    def name(self) -> str:
        return f"{self.service} {self.method} {self.path}"

    @property
    def of_one(self) -> bool:
        return "{" in self.path


ROUTES = [
    Route(service, method, path, operation)
    for service, handlers in HANDLERS.items()
    for method, path, operation in operations(handlers)
]
# Routes that read come before routes that write, so that they do not see new entities.
ROUTES.sort(key=lambda route: (["GET", "POST", "PUT", "DELETE"].index(route.method), route.path))
GUARDED = [route for route in ROUTES if route.operation.action != PUBLIC]


class OurRestaurant(Struct, frozen=True):
    """A restaurant with one entity of every kind."""

    restaurant: RestaurantRig
    ids: dict[str, str]
    """Parameter of a path -> id."""
    shown: str
    """A text that appears in everything that guests may see: the menu and the tables."""
    hidden: str
    """A text that appears in everything else."""

    def path(self, route: Route) -> str:
        """Fills in the parameters. A new parameter raises a KeyError: add an entity to `ids` for it."""
        return _PARAMETER.sub(lambda found: self.ids[found[1]], route.path)

    def body(self, route: Route) -> dict[str, Any] | None:
        """Returns a valid body, so that no call is refused because of its body."""
        if route.operation.body is None:
            return None
        bodies: dict[str, dict[str, Any]] = {
            "/api/orders": {"items": [{"menu_item_id": self.ids["menu_item_id"], "quantity": 1}]},
            "/api/menu/availability": {"menu_item_ids": [self.ids["menu_item_id"]], "is_available": True},
            "/api/jobs": {"bay_id": self.ids["bay_id"], "title": "Wash"},
            "/api/jobs/{job_id:str}": {"title": "Wash again"},
            "/api/users": {"email": f"{uuid4().hex}@x.example", "password": "long enough to be good", "role": "staff"},
            "/api/users/{user_id:str}": {"name": "Somebody else"},
            "/api/api-keys": {"name": "Another", "scopes": ["menu:read"]},
            "/api/sync/order": {**SYNC_ORDER, "restaurant_id": self.restaurant.id, "external_id": uuid4().hex},
            "/api/auth/refresh": {"refresh_token": "none"},
            "/api/auth/logout": {"refresh_token": "none"},
            # The right one would end the session of the caller.
            "/api/auth/password": {"current_password": "not the right one", "new_password": "long enough to be new"},
            "/api/ops/conflicts/{conflict_id:str}/resolve": {"keep": self.ids["change_id"], "why": "it was the first"},
        }
        found: dict[str, Any] = bodies.get(route.path) or route.operation.example
        return found

    def leaks(self, text: str, *, path: str, guest: bool = False) -> list[str]:
        """Returns the texts of our restaurant that a reply reveals. Ids that the caller named in the path do not
        count."""
        public = ("menu_item_id", "category_id", "brand_id", "table_id") if guest else ()
        secret = [id_ for name, id_ in self.ids.items() if name not in public and id_ not in path]
        secret += [self.hidden] if guest else [self.hidden, self.shown, self.restaurant.id, self.restaurant.slug]
        return [one for one in secret if one in text]


_LETTER = """
insert into dead_letters (digest, queue, sinks, restaurant_id, reason, error, place, fingerprint, attempts,
    first_failed_at, last_failed_at, headers, body)
values (sha256($2::text::bytea), 'sync.postgres.normal.dead.v1', '{postgres}', $1, 'contract_broken', $2, 'here', 'f',
    '[]', now(), now(), '{}', $2::text::bytea)
returning id::text
"""
_CONFLICT = """
insert into conflicts (restaurant_id, entity, entity_id, version, change_id, other_change_id)
select $1, 'order', $2, 2, min(change_id::text)::uuid, max(change_id::text)::uuid from changes
where restaurant_id = $1 and entity_id = $2
returning id::text, change_id::text
"""
_REPLAY = """
insert into replay_jobs (kind, state, selection, actor) values ('dry_run', 'done', '{}', $1) returning id::text
"""


@pytest.fixture(scope="module")
async def ours(system: System) -> OurRestaurant:
    restaurant = await register_restaurant(system, name=f"shown-{uuid4().hex}")
    shown, hidden = f"shown-{uuid4().hex}", f"hidden-{uuid4().hex}"
    async with restaurant.client(Role.ADMIN) as admin:

        async def one(path: str, **body: Any) -> str:
            return str(made(await admin.post(path, json=body))["id"])

        ids = {
            "category_id": await one("/api/menu/categories", name=shown),
            "brand_id": await one("/api/menu/brands", name=shown),
            "menu_item_id": await one("/api/menu", name=shown, price=900, category=shown),
            "table_id": await one("/api/tables", label=shown, seats=2),
            "bay_id": await one("/api/bays", name=hidden),
            "customer_id": await one("/api/customers", name=hidden, phone="+4930123456"),
            "inventory_item_id": await one("/api/inventory", name=hidden, quantity=7, unit="piece"),
        }
        ids["user_id"] = await one(
            "/api/users", email=f"{hidden}@x.example", password="long enough to be good", role="staff", name=hidden
        )
        ids["api_key_id"] = await one("/api/api-keys", name=hidden, scopes=["menu:read"])
        ids["order_id"] = await one(
            "/api/orders",
            items=[{"menu_item_id": ids["menu_item_id"], "quantity": 2}],
            table_id=ids["table_id"],
            customer_id=ids["customer_id"],
            customer_name=hidden,
        )
        ids["job_id"] = await one("/api/jobs", bay_id=ids["bay_id"], order_id=ids["order_id"], title=hidden)
        made(await admin.post(f"/api/orders/{ids['order_id']}/payments", json={"amount": 100, "method": hidden}))
    async with restaurant.system.client(token=restaurant.token, service="sync") as watcher:

        async def pending() -> int:
            return int(expect(await watcher.get("/api/ops/sync"))["totals"]["pending"])

        # Both stores must have the data, so that the tests cover both.
        await eventually(pending, what="all data in PostgreSQL", until=lambda count: count == 0)
    async with restaurant.system.database() as connection:
        ids["dead_letter_id"] = await connection.fetchval(_LETTER, restaurant.id, hidden)
        conflict = await connection.fetchrow(_CONFLICT, restaurant.id, ids["order_id"])
        assert conflict is not None
        ids["conflict_id"], ids["change_id"] = conflict
        ids["replay_id"] = await connection.fetchval(_REPLAY, hidden)
    return OurRestaurant(restaurant, ids, shown, hidden)


class Answer(Struct, frozen=True):
    route: Route
    path: str
    status: int
    text: str

    @property
    def summary(self) -> str:
        return f"{self.route.name}: {self.status} {self.text[:300]}"


async def walk(
    ours: OurRestaurant, routes: list[Route], authorization: str | None, *, ordered: bool = True
) -> list[Answer]:
    """Calls the routes: GET routes concurrently, and the others one after the other if `ordered`. Of a stream it reads
    only the beginning."""
    headers = {} if authorization is None else {"Authorization": authorization}
    async with http_client(headers=headers, timeout=20.0) as client:
        gate = asyncio.Semaphore(_CONCURRENCY)

        async def call(route: Route) -> Answer:
            path = ours.path(route)
            async with (
                gate,
                client.stream(
                    route.method, f"{ours.restaurant.system.urls[route.service]}{path}", json=ours.body(route)
                ) as reply,
            ):
                if reply.headers.get("content-type", "").startswith("text/event-stream"):
                    text = await anext(reply.aiter_text())
                else:
                    text = (await reply.aread()).decode()
            return Answer(route, path, reply.status_code, text)

        in_turn = [route for route in routes if ordered and route.method != "GET"]
        answers = await asyncio.gather(*(call(route) for route in routes if not ordered or route.method == "GET"))
        return [*answers, *[await call(route) for route in in_turn]]


def bearer(ours: OurRestaurant, role: Role, *, restaurant: str | None = None, session: str | None = None) -> str:
    tokens = Tokens(ours.restaurant.system.env["TICKETRAIL_JWT_SECRET"], ttl_seconds=600)
    tenant = "" if role is Role.OPERATOR else restaurant or ours.restaurant.id
    session = session or f"s-{uuid4()}" if role is Role.CUSTOMER else None
    return f"Bearer {tokens.issue(Identity(str(uuid4()), role, tenant, '', session))}"


def every(answers: list[Answer], right: Callable[[Answer], bool]) -> None:
    assert answers
    wrong = [answer.summary for answer in answers if not right(answer)]
    assert not wrong, "\n".join(wrong)


# -- completeness ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("service", [orders, sync, notifier], ids=lambda module: module.__name__)
def test_every_route_has_an_action(service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.http.service.configure_logging", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    app = service.create(Settings(_env_file=None, home=tmp_path, trace_sample=0)).app
    assert isinstance(app, Litestar)
    declared = {(method, path) for method, path, _ in operations([one for found in HANDLERS.values() for one in found])}
    found = [(handler, route.path) for route in app.routes for handler in getattr(route, "route_handlers", ())]
    assert len(found) > 5
    for handler, path in found:
        if path.startswith(OPEN_PATHS) or handler.http_methods == {"OPTIONS"}:
            continue
        operation = handler.opt.get("operation")
        assert operation is not None, f"{path} is not declared by `endpoint`"
        assert operation.action in ACTIONS
        # Every route is in the list that the tests below call.
        assert {(method, one) for method in handler.http_methods for one in handler.paths} <= declared


def test_undeclared_action_is_refused() -> None:
    with pytest.raises(ValueError, match=r"orders\.burn"):
        endpoint("POST", "/api/burn", action="orders.burn", summary="x", tag="x")


def test_public_routes_are_exactly_the_listed_ones() -> None:
    assert {(one.service, one.method, one.path) for one in ROUTES if one.operation.action == PUBLIC} == OPEN_TO_ALL
    assert ACTIONS[PUBLIC] == frozenset(Role)


def test_every_action_except_those_inside_a_handler_has_a_route() -> None:
    assert set(ACTIONS) - {route.operation.action for route in ROUTES} == {"deleted.read"}


@pytest.mark.parametrize("service", HANDLERS)
async def test_api_document_names_every_route_and_its_roles(system: System, service: str) -> None:
    async with http_client(base_url=system.urls[service]) as client:
        document = (await client.get("/api-docs/openapi.json")).json()
    described = {
        (method.upper(), path): one for path, item in document["paths"].items() for method, one in item.items()
    }
    walked = {
        (one.method, _PARAMETER.sub(r"{\1}", one.path)): one.operation for one in ROUTES if one.service == service
    }
    assert set(described) == set(walked)
    for key, operation in walked.items():
        guarded = operation.action != PUBLIC
        assert ("security" in described[key]) == guarded, key
        if guarded:
            assert {"401", "403"} <= set(described[key]["responses"]), key
            roles = ", ".join(sorted(role for role in Role if allowed(operation.action, role)))
            assert not roles or f"For: {roles}." in described[key]["description"], key
            scopes = ", ".join(scopes_for(operation.action))
            assert not scopes or f"API keys: {scopes}." in described[key]["description"], key


# -- callers -----------------------------------------------------------------------------------------------------


async def test_no_route_answers_without_a_valid_token(ours: OurRestaurant) -> None:
    claims = {
        "iss": "ticketrail",
        "aud": "ticketrail",
        "userId": "u",
        "restaurantId": ours.restaurant.id,
        "role": "admin",
        "exp": int(time.time()) + 600,
    }
    expired = Tokens(ours.restaurant.system.env["TICKETRAIL_JWT_SECRET"], ttl_seconds=-60)
    strangers = [
        None,
        "",
        "Bearer garbage",
        f"Bearer {jwt.encode(claims, '', algorithm='none')}",
        f"Bearer {jwt.encode(claims, 'another-secret-that-is-long-enough-too', algorithm='HS256')}",
        f"Bearer {expired.issue(Identity('u', Role.ADMIN, ours.restaurant.id))}",
        f"Basic {ours.restaurant.token}",
        ours.restaurant.token,
    ]
    for stranger in strangers:
        answers = await walk(ours, GUARDED, stranger, ordered=False)
        every(answers, lambda answer: answer.status == 401 and not ours.leaks(answer.text, path=answer.path))


@pytest.mark.parametrize("role", Role)
async def test_role_can_do_exactly_what_its_permissions_allow(ours: OurRestaurant, role: Role) -> None:
    """The role calls the routes in its own restaurant, which has entities of the same kinds."""
    theirs = await register_restaurant(ours.restaurant.system)
    async with theirs.client(Role.ADMIN) as admin:
        dish = await theirs.dish()
        bay = made(await admin.post("/api/bays", json={"name": "Grill"}))
    there = OurRestaurant(theirs, {**ours.ids, "menu_item_id": dish["id"], "bay_id": bay["id"]}, "", "")
    token = f"Bearer {theirs.token}" if role is Role.ADMIN else bearer(there, role)
    answers = await walk(there, GUARDED, token)

    def right(answer: Answer) -> bool:
        if not allowed(answer.route.operation.action, role):
            return answer.status == 403 and '"code":"forbidden"' in answer.text
        return answer.status not in (401, 403) and answer.status < 500

    every(answers, right)
    may = [answer for answer in answers if allowed(answer.route.operation.action, role)]
    # Most allowed calls must succeed, and not be refused for another reason.
    done = [answer for answer in may if answer.status < 300]
    assert len(done) >= sum(not answer.route.of_one for answer in may), [answer.summary for answer in may]


@pytest.mark.parametrize("role", [Role.ADMIN, Role.STAFF, Role.CUSTOMER])
async def test_another_restaurant_can_see_and_change_nothing(ours: OurRestaurant, role: Role) -> None:
    theirs = await register_restaurant(ours.restaurant.system)
    before = await _all_of(ours)
    token = f"Bearer {theirs.token}" if role is Role.ADMIN else bearer(ours, role, restaurant=theirs.id)
    answers = await walk(ours, ROUTES, token)

    def right(answer: Answer) -> bool:
        if ours.leaks(answer.text, path=answer.path):
            return False
        if not allowed(answer.route.operation.action, role):
            return answer.status == 403
        return answer.status == 404 if answer.route.of_one else answer.status < 500

    every(answers, right)
    for answer in answers:
        if answer.route.method == "GET" and answer.route.operation.many and answer.status == 200:
            rows = json.loads(answer.text)["data"]
            # The other restaurant has only its first admin.
            assert rows == [] or answer.route.path in ("/api/users", "/api/api-keys"), answer.summary
    assert await _all_of(ours) == before


@pytest.mark.parametrize("scope", Scope)
async def test_api_key_can_do_exactly_what_its_scope_allows(ours: OurRestaurant, scope: Scope) -> None:
    """Every route, in the restaurant of the key and in another one."""
    theirs = await register_restaurant(ours.restaurant.system)
    async with theirs.client(Role.ADMIN) as admin:
        dish = await theirs.dish()
        bay = made(await admin.post("/api/bays", json={"name": "Grill"}))
    there = OurRestaurant(theirs, {**ours.ids, "menu_item_id": dish["id"], "bay_id": bay["id"]}, "", "")
    key = f"Bearer {await theirs.api_key(scope)}"
    before = await _all_of(ours)

    def right(answer: Answer) -> bool:
        if ours.leaks(answer.text, path=answer.path):
            return False
        if answer.route.operation.action not in SCOPES[scope]:
            return answer.status == 403 and '"code":"forbidden"' in answer.text
        if '"code":"wrong_restaurant"' in answer.text:
            return answer.route.path == "/api/sync/order"
        return answer.status not in (401, 403) and answer.status < 500

    answers = await walk(there, GUARDED, key)
    every(answers, right)
    abroad = await walk(ours, GUARDED, key)
    every(abroad, lambda answer: right(answer) and (not answer.route.of_one or answer.status in (403, 404)))
    assert any(answer.route.operation.action in SCOPES[scope] for answer in answers)
    assert await _all_of(ours) == before


def test_every_action_of_a_scope_exists_and_is_none_of_an_admin_alone() -> None:
    admins_alone = {action for action, roles in ACTIONS.items() if roles == {Role.ADMIN}}
    assert set(SCOPES) == set(Scope)
    for scope, actions in SCOPES.items():
        assert actions <= set(ACTIONS), scope
        assert actions.isdisjoint(admins_alone - {"menu.change"}), scope


async def _all_of(ours: OurRestaurant) -> dict[str, tuple[int, str]]:
    """Returns all data of our restaurant as its admin reads it, without the sync states."""
    readers = [route for route in GUARDED if route.method == "GET" and route.service == "orders"]
    answers = await walk(ours, readers, f"Bearer {ours.restaurant.token}")
    every(answers, lambda answer: answer.status == 200)
    return {answer.path: (answer.status, re.sub(r'"sync":\{[^}]*\}', "", answer.text)) for answer in answers}


async def test_entities_of_another_restaurant_are_unknown_in_requests(ours: OurRestaurant) -> None:
    theirs = await register_restaurant(ours.restaurant.system)
    ids = ours.ids
    dish = await theirs.dish()
    async with theirs.client(Role.ADMIN) as admin:
        bay = made(await admin.post("/api/bays", json={"name": "Grill"}))["id"]
        consumes = [{"inventory_item_id": ids["inventory_item_id"], "quantity": 1}]
        for path, body, field in (
            ("/api/orders", {"items": [{"menu_item_id": ids["menu_item_id"], "quantity": 1}]}, "items[0].menu_item_id"),
            (
                "/api/menu/availability",
                {"menu_item_ids": [ids["menu_item_id"]], "is_available": False},
                "menu_item_ids[0]",
            ),
            (
                "/api/menu",
                {"name": "x", "price": 1, "category": "x", "consumes": consumes},
                "consumes[0].inventory_item_id",
            ),
            ("/api/jobs", {"bay_id": ids["bay_id"], "title": "x"}, "bay_id"),
            ("/api/jobs", {"bay_id": bay, "order_id": ids["order_id"], "title": "x"}, "order_id"),
        ):
            reply = await admin.post(path, json=body)
            assert expect(reply, 422)["details"]["field"] == field
            assert not ours.leaks(reply.text, path=json.dumps(body))
        for query in (
            f"/api/orders?table_id={ids['table_id']}",
            f"/api/orders?customer_id={ids['customer_id']}&include_deleted=true",
            f"/api/jobs?bay_id={ids['bay_id']}",
            f"/api/jobs?order_id={ids['order_id']}",
            f"/api/payments?order_id={ids['order_id']}",
            f"/api/audit?entity_id={ids['order_id']}",
            f"/api/customers?phone={'%2B'}4930123456",
            f"/api/menu?category={ours.shown}",
        ):
            assert expect(await admin.get(query)) == [], query
        # An order may name a table that its restaurant does not know. The other restaurant's order stays in that
        # restaurant, and our table does not show it.
        body = {"items": [{"menu_item_id": dish["id"], "quantity": 1}], "table_id": ids["table_id"]}
        placed = made(await admin.post("/api/orders", json=body))["id"]
    async with ours.restaurant.client() as staff:
        there = expect(await staff.get(f"/api/tables/{ids['table_id']}"))["current_orders"]
    assert [one["id"] for one in there] == [ids["order_id"]]
    assert placed != ids["order_id"]


async def test_guest_sees_menu_and_tables_and_nothing_of_others(ours: OurRestaurant) -> None:
    async with http_client(base_url=ours.restaurant.system.urls["orders"]) as client:
        body = {"slug": ours.restaurant.slug, "table_id": ours.ids["table_id"]}
        opened = made(await client.post("/api/auth/table-session", json=body))
    answers = await walk(ours, GUARDED, f"Bearer {opened['access_token']}")

    def right(answer: Answer) -> bool:
        if ours.leaks(answer.text, path=answer.path, guest=True):
            return False
        if not allowed(answer.route.operation.action, Role.CUSTOMER):
            return answer.status == 403
        # A guest has no order of others, and no password.
        hidden = "order_id" in answer.route.path or answer.route.path == "/api/auth/password"
        return answer.status == 404 if hidden else answer.status < 300

    every(answers, right)
    assert sum(ours.shown in answer.text for answer in answers) >= 6
    # Only admins see deleted entities.
    async with ours.restaurant.system.client(token=opened["access_token"]) as guest:
        for path in ("/api/menu", "/api/orders", "/api/tables", "/api/menu/categories"):
            assert (await guest.get(f"{path}?include_deleted=true")).status_code == 403


async def test_staff_do_not_see_deleted_entities(ours: OurRestaurant) -> None:
    readers = [
        one for one in ROUTES if one.operation.many and "include_deleted" in one.operation.query.__struct_fields__
    ]
    assert len(readers) >= 10
    async with ours.restaurant.client() as staff, ours.restaurant.client(Role.ADMIN) as admin:
        for route in readers:
            assert (await staff.get(f"{route.path}?include_deleted=true")).status_code == 403, route.name
            assert (await admin.get(f"{route.path}?include_deleted=true")).status_code == 200, route.name


async def test_token_of_an_unknown_restaurant_finds_nothing(ours: OurRestaurant) -> None:
    answers = await walk(ours, GUARDED, bearer(ours, Role.ADMIN, restaurant=str(uuid4())))
    every(
        answers,
        lambda answer: (
            answer.status < 500
            and not ours.leaks(answer.text, path=answer.path)
            and (
                answer.status == 403
                if not allowed(answer.route.operation.action, Role.ADMIN)
                else not answer.route.of_one or answer.status == 404
            )
        ),
    )


async def test_routes_answer_no_other_method(ours: OurRestaurant) -> None:
    known: dict[tuple[str, str], set[str]] = {}
    for route in ROUTES:
        known.setdefault((route.service, route.path), set()).add(route.method)
        if route.method == "GET":
            known[route.service, route.path].add("HEAD")
    others = [
        Route(service, method, path, Operation(action=PUBLIC, summary="", tag=""))
        for (service, path), methods in known.items()
        for method in METHODS
        if method not in methods
    ]
    for token in (None, f"Bearer {ours.restaurant.token}"):
        every(await walk(ours, others, token, ordered=False), lambda answer: answer.status == 405)
