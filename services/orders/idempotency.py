"""Recognises repeated requests by their `Idempotency-Key`, so that a repeat creates no second entity. A payment and a
stock move have ids of their own, which `order_commands.py` and `routes/back_office.py` compare.

The id of a new entity is derived from the caller's key, so a repeat has the same id. The mirror then refuses the second
claim, or PostgreSQL already has the entity. `check_replay` decides whether the request is a repeat, or another request
with a used key.
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
    """Returns the header Idempotency-Key, or None without one. Raises InvalidInput."""
    key = request.header(b"idempotency-key")
    if key is not None and not _KEY.match(key):
        raise InvalidInput("must be 1 to 200 visible ASCII characters", field="Idempotency-Key")
    return key


def id_for(identity: Identity, route: str, key: str | None) -> str:
    """Returns the id of a new entity. It is the same for the same caller, route and key, and random without a key."""
    if key is None:
        return str(uuid4())
    return str(uuid5(_NAMESPACE, f"{identity.tenant}|{identity.user_id}|{identity.session_id or ''}|{route}|{key}"))


def check_replay(state: Any, same: Callable[[Any], bool]) -> None:
    """Raises InvalidInput if the key was used for another request. `state` is what was created with the key, and `same`
    returns whether this request would have created it."""
    if not same(state):
        raise InvalidInput(
            "this key was used for another request", field="Idempotency-Key", code="idempotency_key_reused"
        )
