"""The documents of the APIs and of the events, frozen in docs/api; `make api` writes them again, and the collection for
Postman, which is made from them.

They use default settings and ignore the environment and any .env file.
"""

import json
from typing import Any

from deploy import postman
from services.notifier.transports import API as NOTIFIER
from services.orders.routes import API as ORDERS
from services.sync.api import API as SYNC
from shared.http import openapi
from shared.messaging import asyncapi
from shared.settings import Settings
from tests.rigs.system import ROOT

FOLDER = ROOT / "docs" / "api"
OPENAPI = {"orders": ORDERS, "sync": SYNC, "notifier": NOTIFIER}
NAMES = [*(f"{service}.openapi.json" for service in OPENAPI), "asyncapi.json"]


def document(name: str) -> dict[str, Any]:
    service = name.removesuffix(".openapi.json")
    return openapi.document(OPENAPI[service]) if service in OPENAPI else asyncapi.document(Settings.model_construct())


def text(name: str) -> str:
    return json.dumps(document(name), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        path, made = FOLDER / name, text(name)
        if not path.exists() or path.read_text() != made:
            path.write_text(made)
            print(f"frozen: docs/api/{name}")
    postman.main()


if __name__ == "__main__":
    main()
