"""The collection of requests for Postman and Bruno: it is made from the API documents, and has every route."""

import json

from deploy import postman
from tests.contract import documents


def test_the_frozen_collection_matches_the_documents() -> None:
    assert postman.COLLECTION.read_text() == postman.text(), "run `make api`"


def test_the_collection_has_every_route_and_every_example() -> None:
    requests = [
        (service["name"], request["request"])
        for service in postman.collection()["item"]
        for topic in service["item"]
        for request in topic["item"]
    ]
    routes = {(name, one["method"], "/" + "/".join(one["url"]["path"])) for name, one in requests}
    expected = {
        (name, method.upper(), path.replace("{", ":").replace("}", ""))
        for name in documents.OPENAPI
        for path, item in documents.document(f"{name}.openapi.json")["paths"].items()
        for method in item
    }
    assert routes == expected
    assert len(requests) == len(expected)
    place = next(one for _, one in requests if one["method"] == "POST" and one["url"]["path"] == ["api", "orders"])
    assert json.loads(place["body"]["raw"])["items"]
    assert {"key": "Idempotency-Key", "value": "{{$guid}}"} in place["header"]
