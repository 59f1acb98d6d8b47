"""`/.well-known/jwks.json`: the public keys with which other systems can verify our tokens (RFC 7517)."""

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from shared.security.tokens import Tokens

_CACHE_SECONDS = 300


def jwks_route(tokens: Tokens) -> HTTPRouteHandler:
    """Returns the route. Its list is empty if tokens are signed with a secret."""
    body = msgspec.json.encode({"keys": tokens.public_keys()})

    @get("/.well-known/jwks.json", sync_to_thread=False)
    def keys() -> Response[bytes]:
        return Response(
            body, media_type="application/jwk-set+json", headers={"Cache-Control": f"public, max-age={_CACHE_SECONDS}"}
        )

    return keys
