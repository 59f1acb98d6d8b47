"""HTTP as clients expect it (RFC 9110), on the running services."""

import gzip
import json
import unicodedata
import zlib
from typing import Any
from uuid import uuid4

import httpx
import pytest

from shared.http.bodies import MAX_BODY_BYTES
from shared.security.tokens import Role
from tests.contract import documents
from tests.rigs.http_client import http_client
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System

SERVICES = ("orders", "sync", "notifier")


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


async def placed(restaurant: RestaurantRig) -> dict[str, Any]:
    dish = (await restaurant.dish())["id"]
    async with restaurant.client() as staff:
        found: dict[str, Any] = made(
            await staff.post("/api/orders", json={"items": [{"menu_item_id": dish, "quantity": 1}]})
        )
        return found


# -- conditional requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (['"1"'], 304),
        (['W/"1"'], 304),
        (['"0", "1"'], 304),
        (['W/"0",W/"1"'], 304),
        (['"0"', '"1"'], 304),
        (["*"], 304),
        (['"a,b", "1"'], 304),
        (['"2"'], 200),
        (['"1, 2"'], 200),
        (['w/"1"'], 200),
        (["garbage"], 200),
        ([""], 200),
    ],
    ids=str,
)
async def test_read_answers_304_if_a_tag_names_the_version(
    restaurant: RestaurantRig, lines: list[str], status: int
) -> None:
    dish = await restaurant.dish()
    order = await placed(restaurant)
    async with restaurant.client() as staff:
        for path in (f"/api/orders/{order['id']}", f"/api/menu/{dish['id']}"):
            for method in ("GET", "HEAD"):
                headers = [("If-None-Match", line) for line in lines]
                reply = await staff.request(method, path, headers=headers)
                assert (reply.status_code, reply.headers["etag"]) == (status, '"1"'), path
                assert bool(reply.content) == (status == 200 and method == "GET")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (['"1"'], 200),
        (["1"], 200),
        (['W/"1"'], 200),
        (['"7", "1"'], 200),
        (['"7"', '"1"'], 200),
        (["*"], 200),
        (['"0"'], 409),
        (['"2"'], 409),
        (['"12345678901"'], 409),
        (['"new"'], 409),
        (['"01"'], 409),
        (['""'], 409),
        (['"2", "3"'], 409),
        (["0"], 409),
        (["garbage"], 422),
        (['"1'], 422),
        (['"1" "2"'], 422),
        (['*, "1"'], 422),
        ([""], 422),
    ],
    ids=str,
)
async def test_change_is_made_only_if_a_tag_names_the_version(
    restaurant: RestaurantRig, lines: list[str], status: int
) -> None:
    dish, order = await restaurant.dish(), await placed(restaurant)
    async with restaurant.client(Role.ADMIN) as admin:
        for path, change in ((f"/api/orders/{order['id']}", {"notes": "x"}), (f"/api/menu/{dish['id']}", {"price": 2})):
            reply = await admin.put(path, json=change, headers=[("If-Match", line) for line in lines])
            if status == 409:
                assert refused(reply, 409, "version_conflict", "If-Match")["version"] == 1
            elif status == 422:
                refused(reply, 422, "invalid_input", "If-Match")
            else:
                assert expect(reply)["version"] == 2


# -- methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
async def test_head_request_gets_the_reply_of_get_without_content(system: System, service: str) -> None:
    async with http_client(base_url=system.urls[service]) as client:
        for path in ("/health", "/health/live", "/health/ready", "/metrics", "/api-docs", "/api-docs/openapi.json"):
            head, get = await client.head(path), await client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert head.headers["content-type"] == get.headers["content-type"]
            if path.startswith("/api-docs"):
                assert head.headers["content-length"] == str(len(get.content))
        assert (await client.head("/no/such/path")).status_code == 404
        assert (await client.head("/health/live", headers={"Connection": "close"})).status_code == 200


@pytest.mark.parametrize("service", [*SERVICES, "worker"])
async def test_health_is_the_same_as_ready(system: System, service: str) -> None:
    async with http_client(base_url=system.urls[service]) as client:
        alias, ready = await client.get("/health"), await client.get("/health/ready")
    assert (alias.status_code, alias.json()["status"]) == (200, "ready")
    assert alias.json().keys() == ready.json().keys()


async def test_head_request_for_an_order_gets_the_headers_of_get(restaurant: RestaurantRig) -> None:
    order = await placed(restaurant)
    async with restaurant.client() as staff:
        head, get = await staff.head(f"/api/orders/{order['id']}"), await staff.get(f"/api/orders/{order['id']}")
        assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", get.headers["etag"])
        assert (await staff.head("/api/orders")).status_code == 200
        assert (await staff.head(f"/api/orders/{uuid4()}")).status_code == 404
        wrong = await staff.head("/api/auth/login")
        assert (wrong.status_code, wrong.headers["allow"], wrong.content) == (405, "OPTIONS, POST", b"")


async def test_worker_answers_head_too(system: System) -> None:
    async with http_client(base_url=system.urls["worker"]) as client:
        for path in ("/health", "/health/live", "/metrics"):
            reply = await client.head(path)
            assert (reply.status_code, reply.content) == (200, b"")


@pytest.mark.parametrize("service", SERVICES)
async def test_question_whether_a_page_may_call_needs_no_token(system: System, service: str) -> None:
    """CORS is off here, so the answer has no permission, and the browser refuses the call by itself."""
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    async with http_client(base_url=system.urls[service]) as client:
        for path in (*documents.document(f"{service}.openapi.json")["paths"], "/health/live", "/metrics"):
            reply = await client.options(path.replace("{", "").replace("}", ""), headers=asked)
            assert (reply.status_code, reply.content) == (204, b""), path
            assert not [name for name in reply.headers if name.startswith("access-control")]


# -- authentication ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
async def test_every_401_says_how_to_authenticate(system: System, service: str) -> None:
    async with http_client(base_url=system.urls[service]) as client:
        for method, path in (("GET", "/api/orders"), ("GET", "/api/ops/queues"), ("GET", "/api/v1/sync/events")):
            for headers in ({}, {"Authorization": "Basic eA=="}, {"Authorization": "Bearer garbage"}):
                reply = await client.request(method, path, headers=headers)
                assert reply.status_code in (401, 404)
                if reply.status_code == 401:
                    assert reply.headers["www-authenticate"] == "Bearer"
    async with http_client(base_url=system.urls["orders"]) as client:
        reply = await client.post("/api/auth/login", json={"email": "no@body.example", "password": "wrong password"})
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("scheme", ["Bearer  ", "bearer ", "BEARER    "])
async def test_scheme_may_be_followed_by_blanks(restaurant: RestaurantRig, scheme: str) -> None:
    async with http_client(base_url=restaurant.system.urls["orders"]) as client:
        reply = await client.get("/api/orders", headers={"Authorization": f"{scheme}{restaurant.token}"})
        assert reply.status_code == 200


# -- bodies ------------------------------------------------------------------------------------------------------


TABLE = json.dumps({"label": "Größe", "seats": 4}).encode()


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "compress", "gzip, gzip", "garbage"])
async def test_other_encoding_than_gzip_is_refused_by_name(
    system: System, restaurant: RestaurantRig, coding: str
) -> None:
    async with restaurant.client(Role.ADMIN) as admin:
        reply = await admin.post("/api/tables", content=TABLE, headers={"Content-Encoding": coding})
        assert refused(reply, 415, "unsupported_media_type", "Content-Encoding")["allowed"] == ["gzip"]
        assert reply.headers["accept-encoding"] == "gzip"
    token = {"x-sync-token": system.demo["sync_token"], "Content-Encoding": coding}
    async with system.client(service="sync") as client:
        refused(await client.post("/api/sync/order", content=b"{}", headers=token), 415, "unsupported_media_type")


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip", "identity", ""])
async def test_gzip_is_read(restaurant: RestaurantRig, coding: str) -> None:
    body = gzip.compress(TABLE[:9]) + gzip.compress(TABLE[9:]) if "gzip" in coding.lower() else TABLE
    async with restaurant.client(Role.ADMIN) as admin:
        reply = await admin.post("/api/tables", content=body, headers={"Content-Encoding": coding})
        assert made(reply)["label"] == "Größe"


async def test_broken_gzip_is_refused(restaurant: RestaurantRig) -> None:
    whole = gzip.compress(TABLE)
    async with restaurant.client(Role.ADMIN) as admin:
        many = whole + gzip.compress(b"") * 16  # 50,000 of them once stopped the service for a minute
        for body in (TABLE, whole[:-4], whole + b"x", zlib.compress(TABLE), b"", whole[:-8] + bytes(8), many):
            reply = await admin.post("/api/tables", content=body, headers={"Content-Encoding": "gzip"})
            refused(reply, 422, "malformed_gzip", "body")
        bomb = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
        reply = await admin.post("/api/tables", content=bomb, headers={"Content-Encoding": "gzip"})
        refused(reply, 413, "body_too_large", "body")


async def test_byte_order_mark_before_json_is_skipped(system: System, restaurant: RestaurantRig) -> None:
    key, mark = {"Idempotency-Key": str(uuid4())}, b"\xef\xbb\xbf"
    dish = (await restaurant.dish())["id"]
    body = json.dumps({"items": [{"menu_item_id": dish, "quantity": 1.0}]}).encode()
    async with restaurant.client() as staff:
        one = made(await staff.post("/api/orders", content=mark + body, headers=key))
        assert made(await staff.post("/api/orders", content=body, headers=key))["id"] == one["id"]
        assert one["items"][0]["quantity"] == 1
        refused(await staff.post("/api/orders", content=mark + mark + body), 422, "malformed_json")


@pytest.mark.parametrize(
    ("number", "status"),
    [("2.0", 201), ("2e0", 201), ("0.2E+1", 201), ("2.5", 422), ("2e-1", 422), ("2e400", 422), ("2e999999999", 422)],
)
async def test_whole_number_in_any_spelling_is_an_integer(restaurant: RestaurantRig, number: str, status: int) -> None:
    async with restaurant.client(Role.ADMIN) as admin:
        reply = await admin.post("/api/tables", content=f'{{"label":"{uuid4()}","seats":{number}}}')
        if status == 201:
            assert made(reply)["seats"] == 2
        else:
            refused(reply, 422, "invalid_input", "seats")


async def test_repeat_may_spell_a_whole_number_in_another_way(restaurant: RestaurantRig) -> None:
    key, label = {"Idempotency-Key": str(uuid4())}, str(uuid4())
    async with restaurant.client(Role.ADMIN) as admin:
        first, *repeats = [
            await admin.post("/api/tables", content=f'{{"label":"{label}","seats":{seats}}}', headers=key)
            for seats in ("2", "2.0", "2e0")
        ]
        assert {made(reply)["id"] for reply in repeats} == {made(first)["id"]}
        assert all(reply.headers["idempotency-replayed"] == "true" for reply in repeats)


# -- headers that have one value ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "method", "path"),
    [
        ("orders", "POST", "/api/tables"),
        ("sync", "POST", "/api/sync/order"),
        ("notifier", "GET", "/api/v1/sync/events"),
    ],
)
async def test_header_of_one_value_that_is_given_twice_is_refused(
    system: System, restaurant: RestaurantRig, service: str, method: str, path: str
) -> None:
    token = ("Authorization", f"Bearer {restaurant.token}")
    async with http_client(base_url=system.urls[service]) as client:
        for name, lines in (
            ("Authorization", [token, token]),
            ("Authorization", [token, ("authorization", "Bearer other")]),
            ("Idempotency-Key", [token, ("Idempotency-Key", "1"), ("idempotency-key", "2")]),
            ("x-sync-token", [token, ("X-Sync-Token", "1"), ("x-sync-token", "2")]),
        ):
            refused(await client.request(method, path, json={}, headers=lines), 422, "invalid_input", name)


# -- query parameters --------------------------------------------------------------------------------------------


async def test_status_may_be_repeated(restaurant: RestaurantRig) -> None:
    orders = [await placed(restaurant) for _ in range(3)]
    async with restaurant.client(Role.ADMIN) as admin:
        for order, status in zip(orders[1:], ("received", "cancelled"), strict=True):
            expect(await admin.put(f"/api/orders/{order['id']}", json={"status": status}))
        ids = [order["id"] for order in orders]
        for params, found in (
            ({"status": ["pending", "received"]}, ids[:2]),
            ({"status": ["received", "cancelled", "cancelled"]}, ids[1:]),
            ({"status": "received"}, ids[1:2]),
        ):
            reply = await admin.get("/api/orders", params={**params, "limit": 200})
            assert {one["id"] for one in expect(reply)} & set(ids) == set(found)
        details = refused(await admin.get("/api/orders?status=pending&status=eaten"), 422, "invalid_input", "status")
        assert "pending" in details["allowed"]
        for path in ("/api/tables?state=free&state=reserved", "/api/jobs?stage=queued&stage=done"):
            expect(await admin.get(path))


@pytest.mark.parametrize(
    ("service", "path"),
    [
        ("orders", "/api/orders?limit=1&limit=2"),
        ("orders", "/api/orders?table_id={id}&table_id={id}"),
        ("orders", "/api/payments?from=2026-03-01T00:00:00Z&from=2026-03-02T00:00:00Z"),
        ("orders", "/api/users?role=staff&role=admin"),
        ("sync", "/api/ops/conflicts?open=true&open=false"),
        ("notifier", "/api/v1/sync/events?lastEventId=1&lastEventId=2"),
    ],
)
async def test_other_parameter_that_is_given_twice_is_refused(system: System, service: str, path: str) -> None:
    role = "operator" if service == "sync" else "admin"
    async with system.client(role, service=service) as client:
        reply = await client.get(path.replace("{id}", str(uuid4())))
        error = expect(reply, 422)
        assert "given twice" in error["message"]
        assert f"?{error['details']['field']}=" in path


async def test_unknown_parameter_names_the_known_ones_as_clients_send_them(system: System) -> None:
    async with system.client("admin") as admin:
        for path in ("/api/payments", "/api/orders/summary", "/api/audit"):
            error = expect(await admin.get(path, params={"from_": "2026-03-01"}), 422)
            assert error["details"]["field"] == "from_"
            assert " from, to" in error["message"]


# -- Unicode -----------------------------------------------------------------------------------------------------


async def test_texts_are_compared_in_one_normal_form(restaurant: RestaurantRig) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Größe É") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for stored, typed in ((composed, decomposed), (decomposed, composed)):
        group = {"name": stored, "min_choices": 1, "options": [{"name": stored}]}
        dish = await restaurant.dish(category=f"{stored} {uuid4()}", customizations=[group])
        item = {"menu_item_id": dish["id"], "quantity": 1, "customizations": [{"name": typed, "option": typed}]}
        async with restaurant.client(Role.ADMIN) as admin:
            body = {"items": [item], "customer_name": f"{stored} {dish['id']}"}
            order = made(await admin.post("/api/orders", json=body))
            customer = made(await admin.post("/api/customers", json={"name": body["customer_name"]}))
            for path, params, id_ in (
                ("/api/orders", {"customer_name": f" {typed} {dish['id']}"}, order["id"]),
                ("/api/customers", {"name": f"{typed} {dish['id']}"}, customer["id"]),
                ("/api/menu", {"category": dish["category"].replace(composed, typed)}, dish["id"]),
            ):
                assert [one["id"] for one in expect(await admin.get(path, params=params))] == [id_], path


# -- validation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "field", "message"),
    [
        ("/api/menu", {"name": "", "price": 1, "category": "Mains"}, "name", "must not be blank"),
        ("/api/menu", {"name": "\u200b", "price": 1, "category": "Mains"}, "name", "must not be blank"),
        ("/api/tables", {"label": " ", "seats": 1}, "label", "must not be blank"),
        (
            "/api/users",
            {"email": "a@b", "password": "long and unusual", "role": "staff"},
            "email",
            "not an email address",
        ),
        ("/api/users", {"email": "a@b.c", "password": "long and unusual", "role": "x"}, "role", "must be one of admin"),
        ("/api/customers", {"name": "Ada", "email": "ada"}, "email", "not an email address"),
        ("/api/menu", {"name": "a", "price": 1, "category": "a", "image_url": "ftp://x"}, "image_url", "must be a URL"),
    ],
)
async def test_refusal_names_the_fault_in_words(
    restaurant: RestaurantRig, path: str, body: dict[str, Any], field: str, message: str
) -> None:
    async with restaurant.client(Role.ADMIN) as admin:
        error = expect(await admin.post(path, json=body), 422)
    assert error["details"]["field"] == field
    assert error["message"].startswith(message)
    assert "regex" not in error["message"]


async def test_blank_payment_method_is_refused(restaurant: RestaurantRig) -> None:
    order = await placed(restaurant)
    async with restaurant.client() as staff:
        reply = await staff.post(f"/api/orders/{order['id']}/payments", json={"amount": 100, "method": " "})
        refused(reply, 422, "invalid_input", "method")


async def test_sign_in_ignores_blanks_around_the_email(restaurant: RestaurantRig) -> None:
    async with http_client(base_url=restaurant.system.urls["orders"]) as client:
        for email in (f"{restaurant.slug}@shop.example ", f" {restaurant.slug.upper()}@shop.example"):
            body = {"email": email, "password": "long enough to be good"}
            reply: httpx.Response = await client.post("/api/auth/login", json=body)
            assert expect(reply)["user"]["email"] == f"{restaurant.slug}@shop.example"


async def test_country_must_exist(system: System) -> None:
    for field, fields in (
        ("settings.country", {"settings": {"country": "UK"}}),
        ("settings.country", {"settings": {"country": "ZZ"}}),
        ("currency", {"currency": "ZZZ"}),
    ):
        body = {"name": "x", "slug": f"x-{uuid4().hex[:12]}", "email": "x@shop.example", "password": "long and unusual"}
        async with http_client(base_url=system.urls["orders"]) as client:
            reply = await client.post("/api/auth/register-restaurant", json={**body, **fields})
            assert "ISO" in expect(reply, 422)["message"]
            refused(reply, 422, "invalid_input", field)
