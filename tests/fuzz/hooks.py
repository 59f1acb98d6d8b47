"""Hooks of schemathesis, loaded by its own process: most valid requests name entities that exist.

Paths and bodies name different entities, so that a request deletes no dish that another one orders. Invalid requests
are sent unchanged, with one exception: none names the user of the token, who must stay an admin. The hooks also count
the replies by operation and status, so that the run knows which operations it reached.
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

from tests.fuzz.run import COUNTS_VARIABLE, KNOWN_ENTITIES_VARIABLE

# One id out of this many keeps its generated value.
_KEEP_ONE_IN = 6

_entities = json.loads(Path(os.environ[KNOWN_ENTITIES_VARIABLE]).read_text())
_changed: dict[str, list[str]] = _entities["changed"]
_referenced: dict[str, list[str]] = _entities["referenced"]
_seen: Counter[str] = Counter()
_counts: Counter[str] = Counter()


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: "schemathesis.Case[Any]", kwargs: dict[str, Any]) -> None:
    path = case.path_parameters or {}
    if path.get("user_id") == _entities["admin_id"]:
        path["user_id"] = _changed["user_id"][0]
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    for name, value in path.items():
        path[name] = _known_id(_changed, name, value)
    for name, value in (case.query or {}).items():
        case.query[name] = _known_id(_referenced, name, value)
    if isinstance(case.body, dict | list):
        case.body = _with_known_ids(case.body)
    _replace_used_values(case)


def _known_id(ids: dict[str, list[str]], name: str, value: Any) -> Any:
    found = ids.get(name)
    if not found or not isinstance(value, str) or value in found:
        return value
    number = crc32(value.encode("utf-8", "replace"))
    return value if number % _KEEP_ONE_IN == 0 else found[number % len(found)]


def _with_known_ids(body: Any) -> Any:
    if isinstance(body, list):
        return [_with_known_ids(one) for one in body]
    if not isinstance(body, dict):
        return body
    if set(body) == {"name", "option"}:
        return _entities["choice"]
    found = {}
    for name, value in body.items():
        if isinstance(value, list) and name.removesuffix("s") in _changed:
            found[name] = list(dict.fromkeys(_known_id(_changed, name.removesuffix("s"), one) for one in value))
        else:
            found[name] = (
                _with_known_ids(value) if isinstance(value, dict | list) else _known_id(_referenced, name, value)
            )
    return found


def _replace_used_values(case: "schemathesis.Case[Any]") -> None:
    """Replaces values that may be used only once and were used before. Keeps a few of them, because a repeat is a case
    worth testing."""
    headers: Any = case.headers or {}
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
    return _seen[value] % _KEEP_ONE_IN != 1


@schemathesis.hook
def after_call(
    context: schemathesis.HookContext, case: "schemathesis.Case[Any]", response: schemathesis.Response
) -> None:
    _counts[f"{case.operation.label} {response.status_code}"] += 1


@atexit.register
def _write_counts() -> None:
    Path(os.environ[COUNTS_VARIABLE]).write_text(json.dumps(_counts))
