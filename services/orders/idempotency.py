"""The Idempotency-Key of a request, and its owner. shared/rail/idempotency.py says what a repeat does."""

from uuid import UUID

from msgspec import Struct

from shared.http.call import Call
from shared.rail.idempotency import FactId, checked_key, entity_id, request_hash


class RequestKey(Struct, frozen=True):
    """The Idempotency-Key of one request. The same key of another caller, or on another route, is another key."""

    caller: str
    route: str
    key: str | None

    @classmethod
    def of(cls, request: Call, route: str) -> "RequestKey":
        """`route`: the method and the path of the route, such as "POST /api/orders". Raises InvalidInput."""
        identity = request.identity
        caller = f"{identity.tenant}|{identity.user_id}|{identity.session_id or ''}"
        return cls(caller, route, checked_key(request.header(b"idempotency-key")))

    def entity_id(self) -> str:
        return entity_id(self.caller, self.route, self.key)

    def hash_of(self, body: bytes) -> str | None:
        """Returns the hash of the request, which the new entity keeps; None without a key."""
        return None if self.key is None else request_hash(body)

    def fact_id(self, given: UUID | None, target: str) -> FactId:
        """`given`: the id in the body. `target`: the id of the entity that gets the fact."""
        return FactId.of(given, target, self.caller, self.route, self.key)
