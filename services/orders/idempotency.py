"""Idempotency: how a repeated request is recognised, so that it makes one order, one payment, one stock move.

The key of a caller gives the id of what is created, so a repeat has the same id: the claim in the mirror refuses it, or
PostgreSQL has it. `check_replay` then decides whether it is a repeat or another request with a used key.
"""

import re
from collections.abc import Callable
from typing import Any
from uuid import NAMESPACE_URL, uuid4, uuid5

from shared.errors import InvalidInput
from shared.http.call import Call
from shared.security.tokens import Identity

_NAMESPACE = uuid5(NAMESPACE_URL, "https://ticketrail.example/idempotency-key")
_KEY = re.compile(r"^[\x21-\x7e]{1,200}$")


def idempotency_key(request: Call) -> str | None:
    """The header Idempotency-Key. Raises InvalidInput."""
    key = request.header(b"idempotency-key")
    if key is not None and not _KEY.match(key):
        raise InvalidInput("must be 1 to 200 visible ASCII characters", field="Idempotency-Key")
    return key


def id_for(identity: Identity, route: str, key: str | None) -> str:
    """The id of the entity to create: the same for one key of one caller and route, and random without a key."""
    if key is None:
        return str(uuid4())
    return str(uuid5(_NAMESPACE, f"{identity.tenant}|{identity.user_id}|{identity.session_id or ''}|{route}|{key}"))


def check_replay(state: Any, same: Callable[[Any], bool]) -> None:
    """`state`: what was created with the key. `same`: whether this request would have created it. Raises InvalidInput
    when the key was used for another request."""
    if not same(state):
        raise InvalidInput(
            "this key was used for another request", field="Idempotency-Key", code="idempotency_key_reused"
        )
