"""Writes docs/ticketrail.postman_collection.json, a collection of requests for Postman, Bruno and similar programs.

It is made from the frozen API documents: a folder for each service and topic, and a request for each route with the
example of its body. Set the variables of the collection: the URLs of the services, and a token.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLLECTION = ROOT / "docs" / "ticketrail.postman_collection.json"
_SERVICES = {"orders": 8001, "sync": 8002, "notifier": 8003}
_SCHEMA = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
# Headers without which a request still makes sense. The others stay in the collection, switched off.
_SENT_HEADERS = {"Idempotency-Key": "{{$guid}}"}


def collection() -> dict[str, Any]:
    """Returns the whole collection."""
    documents = {name: json.loads((ROOT / f"docs/api/{name}.openapi.json").read_text()) for name in _SERVICES}
    variables = [
        *({"key": f"{name}_url", "value": f"http://127.0.0.1:{port}"} for name, port in _SERVICES.items()),
        {"key": "token", "value": ""},
        {"key": "sync_token", "value": ""},
    ]
    return {
        "info": {
            "name": "Ticketrail",
            "description": "Made by `make api` from the API documents. Set the variable `token`.",
            "version": documents["orders"]["info"]["version"],
            "schema": _SCHEMA,
        },
        "auth": {"type": "bearer", "bearer": [{"key": "token", "value": "{{token}}", "type": "string"}]},
        "variable": variables,
        "item": [_folder(name, document) for name, document in documents.items()],
    }


def text() -> str:
    return json.dumps(collection(), indent=2, ensure_ascii=False) + "\n"


def _folder(service: str, document: dict[str, Any]) -> dict[str, Any]:
    topics: dict[str, list[dict[str, Any]]] = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            topics.setdefault(operation["tags"][0], []).append(_request(service, path, method, operation))
    return {"name": service, "item": [{"name": topic, "item": requests} for topic, requests in topics.items()]}


def _request(service: str, path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    parameters = operation.get("parameters", ())
    at = re.sub(r"\{(\w+)\}", r":\1", path)
    url: dict[str, Any] = {
        "raw": f"{{{{{service}_url}}}}{at}",
        "host": [f"{{{{{service}_url}}}}"],
        "path": at.strip("/").split("/"),
    }
    if known := [{"key": one["name"], "value": one["example"]} for one in parameters if one["in"] == "path"]:
        url["variable"] = known
    if queries := [_switched_off(one) for one in parameters if one["in"] == "query"]:
        url["query"] = queries
    headers = [
        {"key": one["name"], "value": _SENT_HEADERS[one["name"]]}
        if one["name"] in _SENT_HEADERS
        else _switched_off(one)
        for one in parameters
        if one["in"] == "header"
    ]
    security = {name for one in operation.get("security", ()) for name in one}
    if "sync_token" in security:
        headers.append({"key": "x-sync-token", "value": "{{sync_token}}"})
    request: dict[str, Any] = {
        "method": method.upper(),
        "description": operation["description"],
        "header": headers,
        "url": url,
    }
    if "bearer" not in security:
        request["auth"] = {"type": "noauth"}
    if "requestBody" in operation:
        example = operation["requestBody"]["content"]["application/json"]["examples"]["example"]["value"]
        body = json.dumps(example, indent=2, ensure_ascii=False)
        request["body"] = {"mode": "raw", "raw": body, "options": {"raw": {"language": "json"}}}
    return {"name": operation["summary"], "request": request}


def _switched_off(parameter: dict[str, Any]) -> dict[str, Any]:
    return {"key": parameter["name"], "value": "", "description": parameter.get("description", ""), "disabled": True}


def main() -> None:
    made = text()
    if not COLLECTION.exists() or COLLECTION.read_text() != made:
        COLLECTION.write_text(made)
        print(f"wrote: {COLLECTION.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
