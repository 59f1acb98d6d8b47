"""Hooks of schemathesis, loaded by its own process: most valid requests name entities that exist.

Paths and bodies name different entities, so that no deleted dish is ordered. Invalid requests are sent unchanged, with
one exception: the user of the token stays an admin. The hooks also count every answer, so that the run knows which
operations it reached.
"""

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import schemathesis

from tests.fuzz.run import COUNTED, GROUND

# One in so many ids keeps its generated value.
_STRANGE = 6

_ground = json.loads(Path(os.environ[GROUND]).read_text())
_changed: dict[str, list[str]] = _ground["changed"]
_referred: dict[str, list[str]] = _ground["referred"]
_seen: Counter[str] = Counter()
_counted: Counter[str] = Counter()


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:  # type: ignore[type-arg]
    path = case.path_parameters or {}
    if path.get("user_id") == _ground["admin_id"]:
        path["user_id"] = _changed["user_id"][0]
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    for name, value in path.items():
        path[name] = _known(_changed, name, value)
    for name, value in (case.query or {}).items():
        case.query[name] = _known(_referred, name, value)
    if isinstance(case.body, dict | list):
        case.body = _meant(case.body)
    _fresh(case)


def _known(ids: dict[str, list[str]], name: str, value: Any) -> Any:
    found = ids.get(name)
    if not found or not isinstance(value, str) or value in found:
        return value
    number = crc32(value.encode("utf-8", "replace"))
    return value if number % _STRANGE == 0 else found[number % len(found)]


def _meant(body: Any) -> Any:
    if isinstance(body, list):
        return [_meant(one) for one in body]
    if not isinstance(body, dict):
        return body
    if set(body) == {"name", "option"}:
        return _ground["choice"]
    found = {}
    for name, value in body.items():
        if isinstance(value, list) and name.removesuffix("s") in _changed:
            found[name] = list(dict.fromkeys(_known(_changed, name.removesuffix("s"), one) for one in value))
        else:
            found[name] = _meant(value) if isinstance(value, dict | list) else _known(_referred, name, value)
    return found


def _fresh(case: schemathesis.Case) -> None:  # type: ignore[type-arg]
    """Replaces most repeated values that may be used only once; a few repeats stay, because they are worth testing."""
    headers = case.headers or {}  # type: ignore[var-annotated]
    if _is_repeated(headers.get("Idempotency-Key")):
        headers["Idempotency-Key"] = uuid4().hex
    if isinstance(case.body, dict) and case.path in ("/api/auth/register-restaurant", "/api/users"):
        for name, new in (("slug", f"fuzz-{uuid4().hex[:12]}"), ("email", f"{uuid4().hex[:12]}@fuzz.example")):
            if _is_repeated(case.body.get(name)):
                case.body[name] = new


def _is_repeated(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    _seen[value] += 1
    return _seen[value] % _STRANGE != 1


@schemathesis.hook
def after_call(context: schemathesis.HookContext, case: schemathesis.Case, response: schemathesis.Response) -> None:  # type: ignore[type-arg]
    _counted[f"{case.operation.label} {response.status_code}"] += 1


@atexit.register
def _tell() -> None:
    Path(os.environ[COUNTED]).write_text(json.dumps(_counted))
