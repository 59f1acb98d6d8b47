"""Builds the JSON that clients see of an entity: its state, its version and its sync state.

{...state..., "version": 3, "sync": {"state": "pending" | "synced" | "failed" | "conflict", ...}}
"""

import re
from typing import Any

import msgspec
from msgspec import Raw

from services.orders.entity_reads import FoundState
from shared.entities.contract import Head, SyncState

# These fields are internal to idempotency. Quotes inside a JSON string are escaped, so only the fields themselves
# match.
_INTERNAL = re.compile(rb',"request_(?:hash|key)":(?:null|"[0-9a-f-]*")')

PENDING: dict[str, Any] = {"state": SyncState.PENDING}


def sync_of(found: FoundState) -> dict[str, Any]:
    """Returns `state`, and for a failed change also `error`, `attempts` and `last_attempt`."""
    state = found.sync_state
    if state is SyncState.FAILED and found.document is not None:
        return {"state": state, **msgspec.json.decode(found.document.failure)}
    return {"state": state}


def state_view(
    state: bytes, head: Head, sync: dict[str, Any], *, shown: frozenset[str] | None = None, **more: Any
) -> Raw:
    """Returns the JSON of an entity. `state` is encoded, and is decoded only if `shown` names the fields to show.
    `more` has further fields."""
    extra = {"version": head.version, "sync": sync, **more}
    state = _INTERNAL.sub(b"", state)
    if shown is not None:
        found = {**msgspec.json.decode(state), **extra}
        return Raw(msgspec.json.encode({name: value for name, value in found.items() if name in shown}))
    return Raw(state[:-1] + b"," + msgspec.json.encode(extra)[1:])
