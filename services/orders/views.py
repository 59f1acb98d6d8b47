"""Builds the JSON that clients see of an entity: its state, its version and its sync state.

{...state..., "version": 3, "sync": {"state": "pending" | "synced" | "failed" | "conflict", ...}}
"""

from typing import Any

import msgspec
from msgspec import Raw

from services.orders.entity_reads import FoundState
from shared.entities.contract import Head, SyncState
from shared.entities.internal_fields import without_internal_fields
from shared.security.permissions import may
from shared.security.tokens import Identity, Role

# Actions of which a caller must be allowed one to see a field. Both fields tell what a dish is made of.
_SEEN_WITH = {"consumes": ("inventory.read", "menu.change"), "holds": ("inventory.read", "orders.change")}
_FAILURE_SEEN_WITH = "sync.read"
_NOTHING: frozenset[str] = frozenset()
PENDING: dict[str, Any] = {"state": SyncState.PENDING}


def hidden_from(identity: Identity) -> frozenset[str]:
    """Returns the fields of states that this caller does not see."""
    if identity.scopes is None and identity.role is not Role.CUSTOMER:
        return _NOTHING
    return frozenset(
        name for name, actions in _SEEN_WITH.items() if not any(may(identity, action) for action in actions)
    )


def sync_of(found: FoundState, identity: Identity) -> dict[str, Any]:
    """Returns `state`, and for a failed change also `error`, `attempts` and `last_attempt`. A caller who may not read
    the sync status, such as a guest, sees the state alone, because the error is a text of the database."""
    state = found.sync_state
    if state is SyncState.FAILED and found.document is not None and may(identity, _FAILURE_SEEN_WITH):
        return {"state": state, **msgspec.json.decode(found.document.failure)}
    return {"state": state}


def state_view(
    state: bytes,
    head: Head,
    sync: dict[str, Any],
    *,
    shown: frozenset[str] | None = None,
    hidden: frozenset[str] = frozenset(),
    **more: Any,
) -> Raw:
    """Returns the JSON of an entity. `state` is encoded, and is decoded only if `shown` names the fields to show, or if
    it may have a field that is `hidden`. `more` has further fields."""
    extra = {"version": head.version, "sync": sync, **more}
    state = without_internal_fields(state)
    if shown is not None or any(f'"{name}":'.encode() in state for name in hidden):
        found = {**msgspec.json.decode(state), **extra}
        kept = {name for name in found if name not in hidden and (shown is None or name in shown)}
        return Raw(msgspec.json.encode({name: value for name, value in found.items() if name in kept}))
    return Raw(state[:-1] + b"," + msgspec.json.encode(extra)[1:])
