"""The texts of requests: which ones are refused, in which form they are kept, and the sentence of every pattern."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import phonenumbers
import pytest

from services.notifier.transports import API as NOTIFIER
from services.orders.requests import (
    CreateCustomer,
    CreateJob,
    CreateMenuItem,
    CreateTable,
    OrdersQuery,
    PlaceOrder,
    RecordPayment,
)
from services.orders.routes import API as ORDERS
from services.orders.routes.auth import RegisterRestaurant
from services.orders.routes.users import CreateUser
from services.sync.api import API as SYNC
from services.sync.imports.external_orders import ExternalOrder
from shared.errors import InvalidInput
from shared.http.bodies import read_body
from shared.http.field_rules import field_rules
from shared.http.openapi import operations
from shared.iso_codes import COUNTRIES, CURRENCIES

DISH = {"name": "Dosa", "price": 1, "category": "Mains"}
USER = {"email": "kim@shop.example", "password": "another long passphrase", "role": "staff"}
SHOP = {"name": "Shop", "slug": "shop", "email": "kim@shop.example", "password": "another long passphrase"}


def escaped(value: Any) -> bytes:
    """Returns JSON that is ASCII, with escapes for other characters."""
    return json.dumps(value).encode()


def refusal(type_: Any, **fields: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as refused:
        read_body(msgspec.json.encode(fields), type_)
    return refused.value


BLANK = [
    "",
    " ",
    "   ",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\u200d",
    "\u2060 \u00ad",
    "\u2800",
    "\U000e0041",
    "\U000e0100",
]
CONTROL = [
    "\x00",
    "a\x00",
    "a\tb",
    "a\nb",
    "a\n",
    "\x1b[31mred",
    "a\x7f",
    "a\x85b",
    "a\u2028b",
    "a\u202eb",
    "a\u200bb",
    "\ufeffa",
    "a\ufff9b",
]


@pytest.mark.parametrize("text", [*BLANK, *CONTROL], ids=ascii)
@pytest.mark.parametrize(
    ("type_", "fields", "field"),
    [
        (CreateMenuItem, DISH, "name"),
        (CreateMenuItem, DISH, "brand"),
        (CreateTable, {"label": "1", "seats": 2}, "label"),
        (RecordPayment, {"amount": 1, "method": "card"}, "method"),
        (CreateUser, USER, "name"),
        (RegisterRestaurant, SHOP, "name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_blank_label_and_one_with_control_characters_are_refused(
    type_: Any, fields: dict[str, Any], field: str, text: str
) -> None:
    refused = refusal(type_, **{**fields, field: text})
    assert refused.details["field"] == field
    assert "must not be blank" in refused.message
    assert "control characters" in refused.message


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("  Dosa ", "Dosa"),
        ("Gro\u0308\u00dfe L", "Gr\u00f6\u00dfe L"),
        ("\u00a0Pho\u3000", "Pho"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("\U0001f468\u200d\U0001f373", "\U0001f468\u200d\U0001f373"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4\U000e0067\U000e0062\U000e007f"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("encode", [msgspec.json.encode, escaped])
def test_label_is_kept_in_nfc_without_blanks_around_it(sent: str, kept: str, encode: Callable[[Any], bytes]) -> None:
    dish = {**DISH, "name": sent, "customizations": [{"name": sent, "options": [{"name": sent}]}]}
    found = read_body(encode(dish), CreateMenuItem)
    group = found.customizations[0]
    assert [found.name, group.name, group.options[0].name] == [kept, kept, kept]
    choice = {"menu_item_id": "7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11", "quantity": 1}
    order = {"items": [{**choice, "customizations": [{"name": sent, "option": sent}]}]}
    chosen = read_body(encode(order), PlaceOrder).items[0].customizations[0]
    assert (chosen.name, chosen.option) == (kept, kept)


@pytest.mark.parametrize("encode", [msgspec.json.encode, escaped])
def test_note_is_kept_in_nfc(encode: Callable[[Any], bytes]) -> None:
    order = {"items": [{"menu_item_id": "7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11", "quantity": 1}], "notes": "cafe\u0301"}
    assert read_body(encode(order), PlaceOrder).notes == "caf\u00e9"


def test_order_number_of_another_system_may_be_missing_and_has_no_control_characters() -> None:
    order = {
        "restaurant_id": "7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11",
        "items": [{"name": "Dosa", "quantity": 1, "unit_price": 1}],
    }
    for sent, kept in (("", ""), (" A-1 ", "A-1")):
        body = msgspec.json.encode({**order, "order_number": sent})
        assert read_body(body, ExternalOrder).order_number == kept
    for number in ("\x1b[2J", "1\u202e2", "\u200b"):
        refused = refusal(ExternalOrder, **order, order_number=number)
        assert (refused.details["field"], "control characters" in refused.message) == ("order_number", True)


def test_note_keeps_its_lines_and_blanks() -> None:
    order = {"items": [{"menu_item_id": "7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11", "quantity": 1}], "notes": " a\n b "}
    assert read_body(msgspec.json.encode(order), PlaceOrder).notes == " a\n b "


@pytest.mark.parametrize("email", ["a@b", "a", "a@b.", "a@.b", "a b@c.d", "a@b..c", "a\u200b@b.c", "@b.c", ""])
@pytest.mark.parametrize(
    ("type_", "fields"),
    [(CreateUser, USER), (RegisterRestaurant, SHOP), (CreateCustomer, {"name": "Ada"})],
    ids=["user", "restaurant", "customer"],
)
def test_every_email_obeys_one_rule(type_: Any, fields: dict[str, Any], email: str) -> None:
    refused = refusal(type_, **{**fields, "email": email})
    assert (refused.message, refused.details) == ("not an email address", {"field": "email"})
    assert read_body(msgspec.json.encode({**fields, "email": " Ada@x.example "}), type_).email == "Ada@x.example"


@pytest.mark.parametrize(
    ("fields", "field", "word"),
    [
        ({"currency": "ZZZ"}, "currency", "ISO 4217"),
        ({"currency": "eur"}, "currency", "ISO 4217"),
        ({"currency": "XXX"}, "currency", "ISO 4217"),
        ({"settings": {"country": "UK"}}, "settings.country", "ISO 3166-1"),
        ({"settings": {"country": "ZZ"}}, "settings.country", "ISO 3166-1"),
        ({"settings": {"country": "gb"}}, "settings.country", "ISO 3166-1"),
    ],
)
def test_country_and_currency_are_codes_of_iso(fields: dict[str, Any], field: str, word: str) -> None:
    refused = refusal(RegisterRestaurant, **{**SHOP, **fields})
    assert refused.details == {"field": field}
    assert word in refused.message


def test_lists_of_codes_are_complete() -> None:
    countries, currencies = COUNTRIES.split(), CURRENCIES.split()
    assert (len(countries), len(set(countries))) == (249, 249)
    # phonenumbers also has Ascension Island, Tristan da Cunha and Kosovo, which have no code of their own.
    assert phonenumbers.SUPPORTED_REGIONS - {"AC", "TA", "XK"} <= set(countries)
    assert len(set(currencies)) == len(currencies) > 150
    assert {"EUR", "GBP", "USD", "CHF", "JPY", "INR", "PLN", "XCG"} <= set(currencies)


def test_error_of_an_enumeration_lists_the_allowed_values() -> None:
    refused = refusal(CreateUser, **{**USER, "role": "chef"})
    assert refused.message == "must be one of admin, staff, customer"
    assert refused.details == {"field": "role", "allowed": ["admin", "staff", "customer"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bay_id": "x"}, "must be a UUID"),
        ({"scheduled_at": "tomorrow"}, "must be a time with a zone, such as 2026-03-01T12:00:00Z"),
        ({"scheduled_at": "2026-03-01T12:00:00"}, "must be a time with a zone, such as 2026-03-01T12:00:00Z"),
    ],
)
def test_error_of_an_id_or_a_time_has_an_example_and_no_name_of_a_standard(
    fields: dict[str, Any], message: str
) -> None:
    job = {"bay_id": "7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11", "title": "wash"}
    assert refusal(CreateJob, **{**job, **fields}).message == message


def test_every_pattern_of_a_request_has_a_sentence() -> None:
    """Without one, the client reads that the text `has the wrong form`."""
    found = 0
    for _, path, operation in operations([*ORDERS.handlers, *SYNC.handlers, *NOTIFIER.handlers]):
        for type_ in (operation.body, operation.query):
            for rule in field_rules(type_) if type_ is not None else ():
                if rule.pattern is not None:
                    found += 1
                    assert rule.sentence, (path, rule.path, rule.pattern)
    assert found > 50
    assert [rule.path for rule in field_rules(OrdersQuery) if rule.allowed] == ["sync_state", "status[]"]


@pytest.mark.parametrize("number", ["1.0", "1e0", "10e-1", "100E-2", "1.000000000000000000000000000000000"])
def test_whole_number_is_an_integer_however_it_is_written(number: str) -> None:
    body = f'{{"amount": {number}, "method": "card"}}'.encode()
    assert read_body(body, RecordPayment).amount == 1


def test_body_with_too_many_floats_is_refused_and_not_converted() -> None:
    def refused_field(floats: int) -> str:
        body = b'{"tip_amount": 1.0, "items": [%b]}' % b",".join([b"1.0"] * floats)
        with pytest.raises(InvalidInput) as refused:
            read_body(body, PlaceOrder)
        return str(refused.value.details["field"])

    assert (refused_field(100), refused_field(10_000)) == ("items[0]", "tip_amount")


@pytest.mark.parametrize(
    "number", ["1.5", "1e-1", "1e999999999", "1e99999999999999999999999", "-1e400", "1.00000000000000000001", "1e13"]
)
def test_other_numbers_are_not_integers(number: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_body(f'{{"amount": {number}, "method": "card"}}'.encode(), RecordPayment)
    assert refused.value.details["field"] == "amount"


def test_large_whole_number_keeps_every_digit() -> None:
    assert read_body(b'{"amount": 999999999999.0, "method": "card"}', RecordPayment).amount == 999_999_999_999


def test_text_that_cannot_be_stored_is_refused_beside_a_whole_number() -> None:
    with pytest.raises(InvalidInput) as refused:
        read_body(b'{"amount": 1.0, "method": "\\ud800"}', RecordPayment)
    assert refused.value.details["field"] in ("method", "amount")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_constant_that_is_not_json_is_refused_also_beside_a_whole_number_with_a_point(constant: str) -> None:
    """Such a number is decoded a second time, by a decoder that takes these constants and makes them null."""
    body = f'{{"external_id": "x", "tip_amount": 1.0, "total": {constant}, "items": []}}'
    with pytest.raises(InvalidInput) as refused:
        read_body(body.encode(), ExternalOrder)
    assert (refused.value.details["field"], refused.value.error_code) == ("body", "malformed_json")
    assert constant in refused.value.message
