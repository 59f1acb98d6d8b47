"""The frozen documents of docs/api, on which clients and readers of the queues rely.

A failing test here means that a document has changed. Read the difference, decide whether clients can cope with it,
describe it in the changelog, and run `make api`.
"""

import difflib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from click.testing import CliRunner
from faststream.specification.asyncapi.v3_0_0.schema import ApplicationSchema
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from services.orders.pricing import tax
from services.sync.cli import main as cli_main
from services.sync.failures import retry_ladder
from shared.entities.contract import Lane
from shared.entities.registry import ENTITIES
from shared.entities.signal import HEARTBEAT, MARK
from shared.http.openapi import operations
from shared.messaging import asyncapi, topology
from shared.security.permissions import PUBLIC
from shared.settings import Settings
from shared.version import VERSION
from tests.contract import documents
from tests.contract.freeze import SAMPLES, path_of, revisions
from tests.rigs.system import ROOT

FROZEN: dict[str, dict[str, Any]] = {
    name: json.loads(path.read_text()) if (path := documents.FOLDER / name).exists() else {} for name in documents.NAMES
}
ASYNCAPI = FROZEN["asyncapi.json"]
EVENTS = sorted(entity.type(event) for entity in ENTITIES.values() for event in entity.events)
SERVICES = list(documents.OPENAPI)


# -- frozen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", documents.NAMES)
def test_the_frozen_document_matches_the_code(name: str) -> None:
    path = documents.FOLDER / name
    frozen, made = path.read_text() if path.exists() else "", documents.text(name)
    if frozen != made:
        lines = difflib.unified_diff(frozen.splitlines(), made.splitlines(), "frozen", "now", lineterm="", n=2)
        shown = "\n".join(list(lines)[:60])
        pytest.fail(f"docs/api/{name} differs from the code; `make api` freezes the new document.\n{shown}")


def test_every_frozen_document_is_in_use() -> None:
    assert sorted(path.name for path in documents.FOLDER.glob("*")) == sorted(documents.NAMES)


def test_documents_are_the_same_in_every_process_and_environment(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text('TICKETRAIL_RETRY_STEPS_MS="[7]"\n')
    script = "from tests.contract import documents as d; print(*map(d.text, d.NAMES), sep='', end='')"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "4711",
        "TICKETRAIL_RETRY_STEPS_MS": "[5]",
        "TICKETRAIL_CHANGE_LOG_MAX_AGE": "1D",
    }
    made = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout == "".join(map(documents.text, documents.NAMES))


# -- OpenAPI -----------------------------------------------------------------------------------------------------


def _routes(service: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in FROZEN[f"{service}.openapi.json"]["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def _answers(service: str, operation: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    responses = FROZEN[f"{service}.openapi.json"]["components"]["responses"]
    for status, answer in operation["responses"].items():
        yield int(status), responses[answer["$ref"].rpartition("/")[2]] if "$ref" in answer else answer


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for inner in part.values():
            yield from _references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _references(inner)


def _at(document: Any, reference: str) -> Any:
    for name in reference.removeprefix("#/").split("/"):
        document = document[name.replace("~1", "/").replace("~0", "~")]
    return document


def _errors(document: dict[str, Any], schema: dict[str, Any], value: Any) -> list[str]:
    whole = {**schema, "components": document["components"]}
    validator = jsonschema_rs.Draft202012Validator(whole, validate_formats=True)
    return [f"{error.message} at {error.instance_path}" for error in validator.iter_errors(value)]


@pytest.mark.parametrize("service", SERVICES)
def test_the_document_is_valid_openapi_3_1(service: str) -> None:
    document = FROZEN[f"{service}.openapi.json"]
    assert document["openapi"].startswith("3.1.")
    assert not [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(document)]


@pytest.mark.parametrize("name", documents.NAMES)
def test_every_reference_resolves(name: str) -> None:
    found = set(_references(FROZEN[name]))
    assert found
    for reference in found:
        assert _at(FROZEN[name], reference), reference


def test_every_operation_has_a_unique_name_and_a_summary() -> None:
    found = [(route, operation) for service in SERVICES for route, operation in _routes(service)]
    assert len(found) > 70
    names = Counter(operation["operationId"] for _, operation in found)
    assert [name for name, count in names.items() if count > 1] == []
    for route, operation in found:
        assert operation["summary"].strip(), route
        assert operation["tags"], route
        described = operation.get("description", "").rpartition("For: ")[0] or operation.get("description", "")
        assert described.strip() and not described.startswith("For: "), f"{route} has no description"
        for parameter in operation.get("parameters", ()):
            assert parameter["in"] != "path" or "example" in parameter, route


@pytest.mark.parametrize("service", SERVICES)
def test_every_body_and_response_has_an_example_that_fits_its_schema(service: str) -> None:
    document = FROZEN[f"{service}.openapi.json"]
    for route, operation in _routes(service):
        contents = [
            content for _, answer in _answers(service, operation) for content in answer.get("content", {}).values()
        ]
        assert contents, route
        if "requestBody" in operation:
            contents.append(operation["requestBody"]["content"]["application/json"])
        for content in contents:
            assert content["examples"], route
            for example in content["examples"].values():
                assert _errors(document, content["schema"], example["value"]) == [], route


@pytest.mark.parametrize("service", SERVICES)
def test_the_document_has_the_version_of_the_product(service: str) -> None:
    assert FROZEN[f"{service}.openapi.json"]["info"]["version"] == ASYNCAPI["info"]["version"] == VERSION


def _schemas(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        if isinstance(part.get("required"), list):
            yield part
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _schemas(inner)


@pytest.mark.parametrize("service", SERVICES)
def test_no_field_with_a_default_is_required(service: str) -> None:
    for schema in _schemas(FROZEN[f"{service}.openapi.json"]):
        for name in schema["required"]:
            assert "default" not in schema.get("properties", {}).get(name, {}), name


def test_examples_of_orders_are_consistent() -> None:
    paths = FROZEN["orders.openapi.json"]["paths"]

    def shown(path: str, method: str, status: str) -> dict[str, Any]:
        content = paths[path][method]["responses"][status]["content"]["application/json"]
        found: Any = content["examples"]["example"]["value"]["data"]
        return dict(found[0] if isinstance(found, list) else found)

    one = "/api/orders/{order_id}"
    placed, read = shown("/api/orders", "post", "201"), shown(one, "get", "200")
    updated, deleted = shown(one, "put", "200"), shown(one, "delete", "200")
    paid = shown(f"{one}/payments", "post", "201")
    for order in (placed, read, updated, deleted, paid, shown("/api/orders", "get", "200")):
        items = order["items"]
        assert order["subtotal"] == sum(item["line_total"] for item in items)
        assert all(item["line_total"] == item["quantity"] * item["unit_price"] for item in items)
        assert order["tax_amount"] == tax(order["subtotal"], order["tax_basis_points"])
        assert order["total"] == order["subtotal"] + order["tax_amount"] + order["tip_amount"]
    assert [placed["status"], updated["status"]] == ["pending", "received"]
    assert [placed["version"], updated["version"], deleted["version"]] == [1, 2, 2]
    assert placed["deleted_at"] is None and deleted["deleted_at"]
    assert paid["payments"] == [paid["payment"]] and paid["payment_status"] == "partially_paid"
    request = paths["/api/orders"]["post"]["requestBody"]["content"]["application/json"]["examples"]["example"]["value"]
    assert placed["notes"] == request["notes"]
    assert placed["items"][0]["menu_item_id"] == request["items"][0]["menu_item_id"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_code_accepts_the_examples_of_bodies(service: str) -> None:
    for method, path, operation in operations(documents.OPENAPI[service].handlers):
        if operation.body is not None:
            assert msgspec.convert(operation.example, operation.body), f"{method} {path}"


@pytest.mark.parametrize("service", SERVICES)
def test_every_error_of_a_route_is_documented(service: str) -> None:
    declared = {
        (method, path.replace(":str}", "}")): operation
        for method, path, operation in operations(documents.OPENAPI[service].handlers)
    }
    for route, operation in _routes(service):
        method, path = route.split()
        statuses = {status for status, _ in _answers(service, operation)}
        expected = {400, 429, 500, 503}
        if declared[method, path].action != PUBLIC:
            expected |= {401, 403}
        if "requestBody" in operation:
            expected |= {408, 413, 415, 422}
        if operation.get("parameters"):
            expected |= {422}
        if "{" in path:
            expected |= {404}
        assert expected <= statuses, route
        for status, answer in _answers(service, operation):
            assert answer["description"], route
            if status >= 400:
                assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}, route
            header = {401: "WWW-Authenticate", 415: "Accept-Encoding", 429: "Retry-After", 503: "Retry-After"}.get(
                status
            )
            assert header is None or header in answer["headers"], route


def test_internal_fields_are_not_documented() -> None:
    for name in documents.NAMES[:-1]:
        assert "request_hash" not in json.dumps(FROZEN[name]), name


# -- AsyncAPI ----------------------------------------------------------------------------------------------------


def test_the_document_is_valid_asyncapi_3_0() -> None:
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    ApplicationSchema.model_validate(ASYNCAPI)
    for name, channel in ASYNCAPI["channels"].items():
        for message in channel["messages"].values():
            assert message["$ref"].startswith("#/components/messages/"), name
    for operation in ASYNCAPI["operations"].values():
        assert operation["action"] in ("send", "receive")


def test_every_queue_is_documented_with_its_declared_arguments() -> None:
    settings = Settings.model_construct()
    queues = {queue.name: queue for queue in [*topology.queues(settings), *topology.logs(settings)]}
    channels = dict(ASYNCAPI["channels"])
    assert channels.pop("changes")["bindings"]["amqp"]["exchange"]["name"] == topology.CHANGES
    assert set(channels) == set(queues)
    for name, queue in queues.items():
        assert channels[name]["address"] == channels[name]["bindings"]["amqp"]["queue"]["name"] == name
        assert channels[name]["x-arguments"] == queue.arguments
        for lane in queue.bound_to:
            assert lane in channels[name]["description"].partition("Bound to")[2]
    steps = {f"{step}ms" for step in settings.retry_steps_ms}
    assert {name.split(".")[-2] for name in channels if ".retry." in name} == steps


def test_every_event_is_documented_on_the_channels_that_carry_it() -> None:
    channels = {name: set(channel["messages"]) for name, channel in ASYNCAPI["channels"].items()}
    messages = ASYNCAPI["components"]["messages"]
    assert set(messages) == {*EVENTS, HEARTBEAT, MARK, asyncapi.RETRIED, asyncapi.DEAD}
    assert channels["changes"] == {*EVENTS, HEARTBEAT}
    assert channels[topology.LOG] == {*EVENTS, HEARTBEAT, MARK}
    for entity in ENTITIES.values():
        for event in entity.events:
            assert entity.type(event) in channels[topology.lane_queue(entity.lane)]
            assert (entity.type(event) in channels[topology.REFERENCE_LOG]) == (
                entity.lane is not Lane.CRITICAL or entity.type(event) in channels[topology.lane_queue(Lane.BACKGROUND)]
            )


@pytest.mark.parametrize("type_", EVENTS)
def test_the_frozen_sample_of_an_event_fits_the_document(type_: str) -> None:
    entity = next(one for one in ENTITIES.values() if type_.startswith(f"ticketrail.{one.name}."))
    event = json.loads(path_of(type_, revisions(entity.name)).read_bytes())
    payload = ASYNCAPI["components"]["messages"][type_]["payload"]
    assert _errors(ASYNCAPI, payload, [event]) == []
    # Another event, a broken state and more changes than fit into one message do not fit the document.
    assert _errors(ASYNCAPI, payload, [{**event, "type": "ticketrail.other.created.v1"}])
    assert _errors(ASYNCAPI, payload, [{**event, "data": {"after": {**event["data"]["after"], "id": 7}}}])
    assert _errors(ASYNCAPI, payload, [event] * 257)


def test_every_sample_belongs_to_a_documented_event() -> None:
    types = {json.loads(path.read_bytes())["type"] for path in SAMPLES.glob("*.json")}
    assert types == set(EVENTS)


def test_the_documented_headers_of_failed_changes_are_those_that_are_sent() -> None:
    names = ("REASON", "ERROR", "LANE", "FAILED_AT", "FIRST_FAILED_AT", "CHANGE_ID", "RESTAURANT", "SUBJECT")
    sent = {getattr(retry_ladder, name) for name in names}
    for message in (asyncapi.RETRIED, asyncapi.DEAD):
        described = set(ASYNCAPI["components"]["messages"][message]["headers"]["properties"])
        assert described == {topology.ATTEMPT, "ticketrail-log-offset", *sent}


def test_the_command_prints_the_frozen_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TICKETRAIL_")]:
        monkeypatch.delenv(name)
    printed = CliRunner().invoke(cli_main.main, ["asyncapi"], catch_exceptions=False)
    assert printed.exit_code == 0
    assert printed.output == (documents.FOLDER / "asyncapi.json").read_text()


def test_the_command_describes_the_queues_of_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TICKETRAIL_RETRY_STEPS_MS", "[77]")
    printed = json.loads(CliRunner().invoke(cli_main.main, ["asyncapi"], catch_exceptions=False).output)
    assert topology.retry_queue(Lane.NORMAL, 77) in printed["channels"]
