"""The JSON that clients see of an entity: its state, its version and its sync state.

{...state..., "version": 3, "sync": {"state": "pending" | "synced" | "failed" | "conflict", ...}}
"""

import re
from typing import Any

import msgspec
from msgspec import Raw

from services.orders.entity_reads import FoundState
from shared.entities.contract import Head, SyncState

# The hash is internal to idempotency. Quotes inside a JSON string are escaped, so only the field itself matches.
_REQUEST_HASH = re.compile(rb',"request_hash":(?:null|"[0-9a-f]*")')

PENDING: dict[str, Any] = {"state": SyncState.PENDING}


def sync_of(found: FoundState) -> dict[str, Any]:
    """`state`, and for a failed change `error`, `attempts` and `last_attempt`."""
    state = found.sync_state
    if state is SyncState.FAILED and found.document is not None:
        return {"state": state, **msgspec.json.decode(found.document.failure)}
    return {"state": state}


def state_view(
    state: bytes, head: Head, sync: dict[str, Any], *, chosen: frozenset[str] | None = None, **more: Any
) -> Raw:
    """`state`: encoded JSON, which is not decoded unless `chosen` names the only fields to show. `more`: further
    fields."""
    extra = {"version": head.version, "sync": sync, **more}
    if chosen is not None:
        found = {**msgspec.json.decode(state), **extra}
        return Raw(msgspec.json.encode({name: value for name, value in found.items() if name in chosen}))
    return Raw(_REQUEST_HASH.sub(b"", state, count=1)[:-1] + b"," + msgspec.json.encode(extra)[1:])
