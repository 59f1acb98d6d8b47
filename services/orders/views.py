"""How an entity looks to a client: its state, and beside it its version and what is known of its way to PostgreSQL.

{…the state…, "version": 3, "sync": {"state": "pending" | "synced" | "failed" | "conflict", …}}
"""

import re
from typing import Any

import msgspec
from msgspec import Raw

from services.orders.entity_reads import FoundState
from shared.entities.contract import Head, SyncState

# Internal to idempotency. Inside a JSON text its quotes would be escaped, so only the field itself matches.
_REQUEST_HASH = re.compile(rb',"request_hash":(?:null|"[0-9a-f]*")')

PENDING: dict[str, Any] = {"state": SyncState.PENDING}


def sync_of(found: FoundState) -> dict[str, Any]:
    state = found.sync_state
    if state is SyncState.FAILED and found.document is not None:
        return {"state": state, **msgspec.json.decode(found.document.failure)}
    return {"state": state}


def state_view(
    state: bytes, head: Head, sync: dict[str, Any], *, chosen: frozenset[str] | None = None, **more: Any
) -> Raw:
    """`state` is encoded already, and stays so: what is not part of it is appended. `chosen`: these fields alone."""
    extra = {"version": head.version, "sync": sync, **more}
    if chosen is not None:
        found = {**msgspec.json.decode(state), **extra}
        return Raw(msgspec.json.encode({name: value for name, value in found.items() if name in chosen}))
    return Raw(_REQUEST_HASH.sub(b"", state, count=1)[:-1] + b"," + msgspec.json.encode(extra)[1:])
